"""Pruning without labels or training: each layer is refitted to what the dense network computes."""
