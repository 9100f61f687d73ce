"""What is to be pruned, as data: patterns, plans and masks."""
