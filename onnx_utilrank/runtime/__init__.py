"""The only place that opens ONNX Runtime sessions."""
