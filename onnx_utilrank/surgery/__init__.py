"""Apply a plan to a model."""
