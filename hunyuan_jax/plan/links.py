"""How long a collective keeps the links between the chips of a slice busy.

A model, not a measurement.  Each mesh axis is laid along the torus (parallel/mesh.py).  Gathers
and reductions over it run on rings whose neighbours exchange data in both directions.  In an
all-to-all every device sends to every other.  A transfer takes the shortest way, one dim of the
torus after the other.  Transfers that use the same link share it.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

# One way, by jax-ml.github.io/scaling-book/tpus: 4.5e10 on v4 and v5e, 9e10 on v5p, v6e and tpu7x.
# Google's pages of v5p say 1200 GB/s both ways a chip, 100 GB/s a link.
LINK_BYTES_PER_S = {"v4": 4.5e10, "v5e": 4.5e10, "v5p": 9e10, "v6e": 9e10, "tpu7x": 9e10}
# Between the two devices of a tpu7x chip: six times a link (Google's documentation of tpu7x).
_ON_CHIP_LINKS = 6
# Between slices, per chip: 200 Gbit/s a host of four chips (the same book).
_NETWORK_BYTES_PER_S = 6.25e9
# A dim of the torus is closed to a ring if it has a multiple of this many chips.
_WRAPS_AT = {"v4": 4, "v5e": 16, "v5p": 4, "v6e": 16, "tpu7x": 4}

Coordinates = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Ring:
    """A mesh axis on the torus.

    size: devices of the axis.
    chips: chips of one ring; two devices of a tpu7x chip may be on one axis.
    flows: transfers between neighbours that share the busiest link, in each direction.
    messages: those that the busiest link carries if every device sends one to every other.
    """

    size: int
    chips: int
    flows: int
    messages: int


@dataclasses.dataclass(frozen=True)
class Links:
    """The links of a mesh's axes.

    rings: by axis.
    link_bytes_per_s: bandwidth of a link in one direction.
    """

    rings: Mapping[str, Ring]
    link_bytes_per_s: float

    def seconds(self, kind: str, axes: Sequence[str], num_bytes: int) -> float:
        """Returns how long a collective keeps the links of its axes busy.

        Args:
          kind: as in HLO.
          axes: mesh axes, "slices" for the network between slices, "?" for unknown ones.
          num_bytes: per device: of the result for an all-gather, else of the operands.
        """
        if axes == ("slices",):
            return num_bytes / _NETWORK_BYTES_PER_S
        names = [axis.partition("/")[0] for axis in axes]  # a part of an axis counts as the axis
        rings = [self.rings[name] for name in names if name in self.rings] or [
            max(self.rings.values(), key=lambda ring: ring.size)
        ]
        n = math.prod(ring.size for ring in rings)
        if n == 1:
            return 0.0
        flows = max(ring.flows for ring in rings)
        one_way = self.link_bytes_per_s / flows
        if kind == "collective-permute":
            return num_bytes / one_way
        if kind in ("all-to-all", "ragged-all-to-all"):
            messages = max(ring.messages for ring in rings)
            return num_bytes / n * messages / self.link_bytes_per_s
        passes = 2 if kind == "all-reduce" else 1
        chips = math.prod(ring.chips for ring in rings)
        seconds = num_bytes * (chips - 1) / chips / (2 * one_way)
        if chips < n:
            seconds += num_bytes / 2 / (_ON_CHIP_LINKS * self.link_bytes_per_s)
        return passes * seconds


def links_of(mesh: Mesh, chip: str, share: float = 1.0) -> Links:
    """Returns the links of a mesh of TPUs of the generation `chip`.

    Args:
      mesh: its devices have coordinates on the torus.
      share: of LINK_BYTES_PER_S that is reached.
    """
    shape = _torus(mesh)
    wraps = tuple(size % _WRAPS_AT[chip] == 0 for size in shape)
    rings = {
        axis: _ring(mesh, axis, shape, wraps) for axis, size in mesh.shape.items() if size > 1
    }
    return Links(rings, share * LINK_BYTES_PER_S[chip])


def _torus(mesh: Mesh) -> Coordinates:
    """Number of chips along each dim."""
    coordinates = np.array([device.coords for device in mesh.devices.flat])
    return tuple(int(size) for size in coordinates.max(0) - coordinates.min(0) + 1)


def _ring(mesh: Mesh, axis: str, shape: Coordinates, wraps: tuple[bool, ...]) -> Ring:
    """Takes the order of the ring with the least sharing: the mesh's, or a snake through the box
    that its chips fill.
    """
    number = mesh.axis_names.index(axis)
    groups = [
        [tuple(device.coords) for device in row]
        for row in np.moveaxis(mesh.devices, number, -1).reshape(-1, mesh.shape[axis])
    ]
    # Where two devices of a chip are on one axis, the chips make the ring.
    rings = [list(dict.fromkeys(group)) for group in groups]
    if len(rings[0]) < len(groups[0]):
        rings = list({tuple(ring): ring for ring in rings}.values())
    orders = [rings, *([snake(ring) for ring in rings] for snake in _snakes(len(shape)))]
    neighbours = (
        [
            pair
            for ring in order
            for here, there in zip(ring, [*ring[1:], ring[0]], strict=True)
            for pair in ((here, there), (there, here))
        ]
        for order in orders
    )
    all_pairs = [pair for group in groups for pair in itertools.permutations(group, 2)]
    return Ring(
        mesh.shape[axis],
        len(rings[0]),
        min(_busiest_link(pairs, shape, wraps) for pairs in neighbours),
        _busiest_link(all_pairs, shape, wraps),
    )


def _snakes(num_dims: int) -> Iterator[Callable[[list[Coordinates]], list[Coordinates]]]:
    """Functions that sort the chips of a box into a snake, or into one that returns along a side
    of the box: two for each order of its dims.
    """

    def snake(members: list[Coordinates], dims: tuple[int, ...]) -> list[Coordinates]:
        values = {dim: sorted({member[dim] for member in members}) for dim in dims}

        def place(member):
            found, is_reversed = [], False
            for dim in dims:
                index = values[dim].index(member[dim])
                found.append(len(values[dim]) - 1 - index if is_reversed else index)
                is_reversed ^= index % 2 == 1
            return found

        return sorted(members, key=place)

    def loop(members: list[Coordinates], dims: tuple[int, ...]) -> list[Coordinates]:
        first = min(member[dims[-1]] for member in members)
        side = [member for member in members if member[dims[-1]] == first]
        others = [member for member in members if member[dims[-1]] != first]
        return snake(others, dims) + snake(side, dims)[::-1]

    for dims in itertools.permutations(range(num_dims)):
        yield functools.partial(snake, dims=dims)
        yield functools.partial(loop, dims=dims)


def _busiest_link(
    pairs: Iterable[tuple[Coordinates, Coordinates]], shape: Coordinates, wraps: tuple[bool, ...]
) -> int:
    """How many of the transfers (from, to) use the busiest link in its busier direction."""
    load = collections.Counter()
    for here, there in pairs:
        load.update(_route(here, there, shape, wraps))
    return max(load.values(), default=1)


def _route(
    start: Coordinates, end: Coordinates, shape: Coordinates, wraps: tuple[bool, ...]
) -> Iterator[tuple[Coordinates, Coordinates]]:
    """The directed links from one chip to another, dim by dim, the shorter way around."""
    here = list(start)
    for dim, size in enumerate(shape):
        distance = end[dim] - here[dim]
        is_far = abs(distance) * 2 > size
        # Half way around either way is as short: even places go one way, odd ones the other.
        is_half = abs(distance) * 2 == size and (start[dim] % 2 == 1) == (distance > 0)
        if wraps[dim] and (is_far or is_half):
            distance -= math.copysign(size, distance)
        for _ in range(int(abs(distance))):
            there = here.copy()
            there[dim] += int(math.copysign(1, distance))
            if wraps[dim]:
                there[dim] %= size
            yield tuple(here), tuple(there)
            here = there
