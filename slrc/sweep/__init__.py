"""Families of compiled models from one dense start: points, who works on which, and what came of them."""
