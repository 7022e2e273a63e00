"""Training: the state, one step, the loop."""
