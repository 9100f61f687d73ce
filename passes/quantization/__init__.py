"""From a program in floating point to one that rounds as integers do."""
