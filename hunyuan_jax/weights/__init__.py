"""Converts official PyTorch checkpoints to ours and back, with one table of names."""
