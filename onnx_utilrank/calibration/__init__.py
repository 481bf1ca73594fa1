"""Calibration: read the user's samples, tap the graph, collect second moments."""
