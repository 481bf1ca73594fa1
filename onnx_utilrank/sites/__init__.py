"""Which nodes can be factored: one file an operator."""
