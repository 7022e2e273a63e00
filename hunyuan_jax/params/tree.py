"""Paths in nested dicts of parameters."""

import jax


def path_of(path: tuple) -> str:
    """A jax tree path as names with slashes between."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
