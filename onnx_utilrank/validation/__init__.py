"""Compare a candidate with its reference: outputs, size, FLOPs, latency."""
