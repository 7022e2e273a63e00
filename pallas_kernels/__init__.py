"""Pallas kernels for TPUs and GPUs.  A leaf package: it imports jax only; docs/kernels.md tells
how each kernel works.
"""
