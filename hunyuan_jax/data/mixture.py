"""Which source each row of a run comes from: a function of the row's number, countable up to any
row without walking there.

Row g draws u(g) = (A g + c) mod 2^32, a low-discrepancy (golden ratio) sequence, and takes the
source whose interval of [0, 2^32) holds u(g); the intervals are those of the phase that g falls
into.  So every stretch of rows has its shares to within a few rows, and the number of rows that a
source has given before row g is a sum of floors, which Euclid's algorithm finds in a few dozen
steps.
"""

import bisect
import itertools
from collections.abc import Sequence

_MODULUS = 2**32
_STEP = 2_654_435_769  # 2^32 over the golden ratio, odd: a period of 2^32 rows


class Mixture:
    """The sources of rows 0, 1, ... of a run."""

    def __init__(self, starts: Sequence[int], weights: Sequence[Sequence[float]], offset: int):
        """Phase p begins at row starts[p] (starts[0] is 0) and has weights[p], one for each
        source; `offset` is the seed's.
        """
        self._starts, self._offset = list(starts), offset % _MODULUS
        self._bounds = [_bounds(row) for row in weights]
        self._before = [[0] * len(weights[0])]  # rows of each source before each phase
        for phase, (start, stop) in enumerate(itertools.pairwise(self._starts)):
            inside = self._counts(phase, start, stop)
            self._before.append(
                [before + count for before, count in zip(self._before[-1], inside, strict=True)]
            )

    def phase(self, row: int) -> int:
        """Number of the phase that a row belongs to; where several begin at one row, the last."""
        return bisect.bisect_right(self._starts, row) - 1

    def source(self, row: int) -> int:
        """Number of the source that a row comes from."""
        return (
            bisect.bisect_right(
                self._bounds[self.phase(row)], (_STEP * row + self._offset) % _MODULUS
            )
            - 1
        )

    def counts(self, row: int) -> list[int]:
        """How many of the rows [0, row) come from each source."""
        phase = self.phase(row)
        inside = self._counts(phase, self._starts[phase], row)
        return [before + count for before, count in zip(self._before[phase], inside, strict=True)]

    def _counts(self, phase: int, start: int, stop: int) -> list[int]:
        """How many of the rows [start, stop) fall into each interval of a phase."""
        below = [
            self._below(bound, stop) - self._below(bound, start) for bound in self._bounds[phase]
        ]
        return [high - low for low, high in itertools.pairwise(below)]

    def _below(self, bound: int, row: int) -> int:
        """How many g in [0, row) have u(g) < bound: floor(x / m) - floor((x - bound) / m) is 1
        where x mod m < bound, else 0.
        """
        return _floor_sum(row, self._offset) - _floor_sum(row, self._offset - bound)


def _bounds(weights: Sequence[float]) -> list[int]:
    """Bounds of the intervals, [0, ..., 2^32]."""
    total = sum(weights)
    return [
        0,
        *(round(_MODULUS * (sums / total)) for sums in itertools.accumulate(weights[:-1])),
        _MODULUS,
    ]


def _floor_sum(count: int, offset: int) -> int:
    """Sum of floor((_STEP g + offset) / _MODULUS) over g in [0, count), by Euclid's algorithm on
    (_STEP, _MODULUS).
    """
    total, step, modulus = 0, _STEP, _MODULUS
    while count > 0:
        total += count * (count - 1) // 2 * (step // modulus) + count * (offset // modulus)
        step, offset = step % modulus, offset % modulus
        # What is left counts lattice points under a line; exchange the axes.
        top = step * count + offset
        count, offset = top // modulus, top % modulus
        step, modulus = modulus, step
    return total
