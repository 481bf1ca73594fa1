"""Second moments, spectra and optimal factors: pure numpy, no ONNX."""
