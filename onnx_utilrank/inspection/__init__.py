"""What a model file holds, and what could be done to it, told without data."""
