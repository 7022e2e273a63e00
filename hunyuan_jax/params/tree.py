"""Nested dicts of parameters: paths in them, what is trained of them."""

from typing import Any

import jax


def path_of(path: tuple) -> str:
    """A jax tree path as names with slashes between."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def split(tree: dict[str, Any], specs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is trained, what is frozen) of a nested dict of parameters.

    Args:
      tree: nested dict of parameters.
      specs: the same of their `ParamSpec`s.
    """
    return _select(tree, specs, is_trained=True), _select(tree, specs, is_trained=False)


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `split`; a parameter that both hold comes from the second."""
    both = {
        name: join(first[name], second[name]) if isinstance(second[name], dict) else second[name]
        for name in first.keys() & second.keys()
    }
    return {**first, **second, **both}


def part_like(tree: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Returns what a nested dict has under the names that `part`, another, has."""
    return {
        name: part_like(tree[name], value) if isinstance(value, dict) else tree[name]
        for name, value in part.items()
    }


def _select(tree: dict[str, Any], specs: dict[str, Any], *, is_trained: bool) -> dict[str, Any]:
    found = {}
    for name, value in tree.items():
        if isinstance(specs[name], dict):
            if part := _select(value, specs[name], is_trained=is_trained):
                found[name] = part
        elif specs[name].is_trained == is_trained:
            found[name] = value
    return found
