"""Attention of a few new tokens to a long cache of keys and values."""

from pallas_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
