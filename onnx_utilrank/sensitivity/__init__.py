"""What a change of each layer costs the model: label-free Fisher information, by gradients."""
