"""Passes: analyses return values, transforms take a program and return one. One pass a file."""
