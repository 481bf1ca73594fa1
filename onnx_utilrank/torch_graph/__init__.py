"""Run an ONNX graph in torch, differentiably, with its initializers as parameters."""
