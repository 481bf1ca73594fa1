"""Time and memory of several models beside each other."""
