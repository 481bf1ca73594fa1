"""Bring back what quantization lost, by low-rank branches beside the quantized nodes."""
