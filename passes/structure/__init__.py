"""Transforms from masks to structure that is the same for every target."""
