"""Where the work is done: here, or by many workers."""
