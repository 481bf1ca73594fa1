"""What layers and moves cost in time, measured where the model is to run."""
