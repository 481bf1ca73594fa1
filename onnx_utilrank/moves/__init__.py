"""What can be put in the place of a weight: one module a move."""
