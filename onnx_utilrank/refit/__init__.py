"""Fit each layer anew to what it really gets behind the layers that were compressed before it."""
