"""Finds the mesh axes that a compiled collective spans, from the text of its replica groups."""

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

Groups = list[list[int]]

_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")


def parse(attributes: str, num_devices: int) -> Groups | None:
    """Returns an op's groups of device positions, or None if their form is not known.

    `replica_groups` has three forms, all in positions of the flattened mesh:

    * `mesh['a'=2,'b'=4] {'b'}`: one group per combination of the axes that are not named.
      `'b':(1)2` is the part of b of size 2 with 1 before it.
    * `[2,4]<=[8]T(..)`: the rows of a transposed range.
    * `{{0,1},{2,3}}`: lists; `{}` is one group of all devices.

    The `source_target_pairs` of a permutation are groups of two.
    """
    if match := _MESH.search(attributes):
        return _mesh_groups(match[1], match[2])
    if match := _IOTA.search(attributes):
        shape, dims, order = (_ints(part) for part in match.groups())
        positions = np.arange(math.prod(dims)).reshape(dims)
        return np.transpose(positions, order or None).reshape(shape).tolist()
    if match := _LISTS.search(attributes):
        return [_ints(group) for group in re.findall(r"\{([\d,]*)\}", match[1])] or [
            list(range(num_devices))
        ]
    return None


def axes_of(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the axes along which members of a group differ, in mesh order.

    'data/4' is a part of size 4 of a larger axis.

    Args:
      groups: device positions, numbered as in the flattened mesh.
      mesh: axis sizes in mesh order.
    """
    coordinates = np.unravel_index(np.arange(math.prod(mesh.values())), tuple(mesh.values()))
    extents = [
        max(len({int(coordinate[i]) for i in group}) for group in groups)
        for coordinate in coordinates
    ]
    return tuple(
        axis if extent == mesh[axis] else f"{axis}/{extent}"
        for axis, extent in zip(mesh, extents, strict=True)
        if extent > 1
    )


def _mesh_groups(mesh_text: str, axes_text: str) -> Groups:
    """Returns the groups of the `mesh[..] {..}` form."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh_text)}
    # Every axis is cut into (before, part, after); a complete axis of size n is (1, n, 1).
    parts = {name: (1, 1, size) for name, size in sizes.items()}
    for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes_text):
        part = int(size) if size else sizes[name]
        parts[name] = (int(before or 1), part, sizes[name] // (int(before or 1) * part))
    dims = list(itertools.chain.from_iterable(parts.values()))
    inside = [3 * i + 1 for i in range(len(parts))]
    outside = [dim for dim in range(len(dims)) if dim not in inside]
    positions = np.arange(math.prod(dims)).reshape(dims).transpose(outside + inside)
    return positions.reshape(-1, math.prod(dims[dim] for dim in inside)).tolist()


def _ints(text: str | None) -> list[int]:
    return [int(number) for number in text.split(",") if number] if text else []
