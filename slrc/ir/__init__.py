"""The captured graph: programs, their operators, how they are traced, and their form on disk."""
