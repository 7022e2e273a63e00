"""Low-precision tensors."""
