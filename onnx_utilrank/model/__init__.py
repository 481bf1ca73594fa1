"""ONNX in and out: loading and saving, constants, and the seam to onnx-graphsurgeon."""
