"""What a compile found, as data, as a page, as plots and as tables."""
