"""What is installed, and what works of it."""
