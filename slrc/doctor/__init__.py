"""Examining a workload before anybody trains: what can be captured, pruned, timed and trained, and how far it goes."""
