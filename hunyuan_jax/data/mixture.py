"""Chooses the source of each row of a run, with random access.

Row g draws u(g) = (A g + c) mod 2^32, a low-discrepancy (golden ratio) sequence.  It takes the
source whose interval of [0, 2^32) contains u(g).  Each phase of the run has its own intervals.
Any range of rows therefore has its shares to within a few rows.  The number of rows that a source
has given before row g is a sum of floors, which Euclid's algorithm computes in a few dozen steps.
"""

import bisect
import itertools
from collections.abc import Sequence

_MODULUS = 2**32
_STEP = 2_654_435_769  # 2^32 / golden ratio, odd, so the period is 2^32 rows


class Mixture:
    """The sources of rows 0, 1, ... of a run."""

    def __init__(self, starts: Sequence[int], weights: Sequence[Sequence[float]], offset: int):
        """Creates a mixture of phases.

        Args:
          starts: first row of each phase; starts[0] is 0.
          weights: for each phase, the weight of each source.
          offset: c of the sequence; depends on the seed.
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
        """Returns the index of a row's phase; the last one if several begin at the row."""
        return bisect.bisect_right(self._starts, row) - 1

    def source(self, row: int) -> int:
        """Returns the index of the source that a row comes from."""
        return (
            bisect.bisect_right(
                self._bounds[self.phase(row)], (_STEP * row + self._offset) % _MODULUS
            )
            - 1
        )

    def counts(self, row: int) -> list[int]:
        """Returns how many of the rows [0, row) come from each source."""
        phase = self.phase(row)
        inside = self._counts(phase, self._starts[phase], row)
        return [before + count for before, count in zip(self._before[phase], inside, strict=True)]

    def _counts(self, phase: int, start: int, stop: int) -> list[int]:
        """Returns how many of the rows [start, stop) fall into each interval of a phase."""
        below = [
            self._below(bound, stop) - self._below(bound, start) for bound in self._bounds[phase]
        ]
        return [high - low for low, high in itertools.pairwise(below)]

    def _below(self, bound: int, row: int) -> int:
        """Returns how many g in [0, row) have u(g) < bound.

        floor(x / m) - floor((x - bound) / m) is 1 if x mod m < bound, else 0.
        """
        return _floor_sum(row, self._offset) - _floor_sum(row, self._offset - bound)


def _bounds(weights: Sequence[float]) -> list[int]:
    """Returns the bounds of the intervals, [0, ..., 2^32]."""
    total = sum(weights)
    return [
        0,
        *(round(_MODULUS * (sums / total)) for sums in itertools.accumulate(weights[:-1])),
        _MODULUS,
    ]


def _floor_sum(count: int, offset: int) -> int:
    """Returns the sum of floor((_STEP g + offset) / _MODULUS) over g in [0, count).

    Uses Euclid's algorithm on (_STEP, _MODULUS).
    """
    total, step, modulus = 0, _STEP, _MODULUS
    while count > 0:
        total += count * (count - 1) // 2 * (step // modulus) + count * (offset // modulus)
        step, offset = step % modulus, offset % modulus
        # The rest counts lattice points under a line: exchange the axes.
        top = step * count + offset
        count, offset = top // modulus, top % modulus
        step, modulus = modulus, step
    return total
