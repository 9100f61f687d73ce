"""Transforms that give layers their form on a target."""
