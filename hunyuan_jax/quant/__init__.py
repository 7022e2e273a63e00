"""Tensors in few bits."""
