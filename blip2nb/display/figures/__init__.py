"""A module for each figure, each with the same four functions: available, draw, alt_text, table."""
