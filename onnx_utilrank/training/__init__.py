"""Train the weights of a graph: after its original's outputs, after labels, or both."""
