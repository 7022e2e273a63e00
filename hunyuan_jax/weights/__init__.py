"""Official PyTorch checkpoints and ours: one table of names, read and written in both directions."""
