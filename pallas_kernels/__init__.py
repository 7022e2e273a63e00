"""Pallas kernels for TPUs and GPUs.

A leaf package that imports only jax and numpy; docs/kernels.md explains how each kernel works.
"""
