"""Passes that read a program and return data about it."""
