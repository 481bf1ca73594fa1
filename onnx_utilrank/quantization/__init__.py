"""Weights in fewer bits: one module a family of schemes."""
