"""This machine: its processor, its cores, and where caches and locks live."""
