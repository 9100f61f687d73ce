"""Passes that decide what to keep and in what order."""
