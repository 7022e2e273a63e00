"""Packs tokenised documents into rows of fixed length, with random access to any row.

Row r of epoch e is a function of (tokens, seed, e, r).

Shapes: S shards, T positions of a row.  The (token, target) pairs of a shard's training or
held-out side form one ring of documents.  An epoch cuts the ring into rows of T pairs.  The first
cut depends on seed and epoch, so documents are cut at different places in each epoch.  Each pair
is in exactly one row.  The last row of a shard ends in padding.  Rows are numbered over all
shards, and `order` shuffles the numbers.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from hunyuan_jax.data.tokens import Tokens
from hunyuan_jax.errors import ConfigError

MAX_ROWS = 2**32  # the limit of grain's index_shuffle


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """Pairs [start, stop) of a piece.

    is_new: False if the slice continues the document of the slice before it.
    """

    piece: int
    start: int
    stop: int
    is_new: bool


class Rows:
    """The rows of one side of a token source."""

    def __init__(
        self, tokens: Tokens, first_S: np.ndarray, stop_S: np.ndarray, seq_len: int, seed: str
    ):
        """Takes pieces [first, stop) of each shard.

        Raises:
          ConfigError: more than MAX_ROWS rows.
        """
        self.tokens, self._seq_len, self._seed = tokens, seq_len, seed
        begin_S = np.array(
            [int(tokens.ends[first - 1]) if first else 0 for first in first_S], np.int64
        )
        end_S = np.array([int(tokens.ends[stop - 1]) if stop else 0 for stop in stop_S], np.int64)
        self._first_S, self._stop_S, self._begin_S = first_S, stop_S, begin_S
        self._pairs_S = np.where(stop_S > first_S, end_S - begin_S, 0)
        self._rows_S = np.cumsum(-(-self._pairs_S // seq_len))  # up to and including each shard
        self.num_pairs = int(self._pairs_S.sum())
        if len(self) >= MAX_ROWS:
            raise ConfigError(
                f"a source has {len(self)} rows of {seq_len} tokens, but at most {MAX_ROWS} can "
                "be shuffled; split it into several sources."
            )

    def __len__(self) -> int:
        """Returns the number of rows of an epoch."""
        return int(self._rows_S[-1])

    def order(self, epoch: int, index: int) -> int:
        """Returns the row at place `index` of an epoch's shuffled order."""
        return shuffled(index, len(self), self._seed, "order", epoch)

    def slices(self, epoch: int, row: int) -> list[Slice]:
        """Returns the slices of pieces that make up a row, in order."""
        shard = int(np.searchsorted(self._rows_S, row, side="right"))
        row -= int(self._rows_S[shard - 1]) if shard else 0
        begin, num_pairs = int(self._begin_S[shard]), int(self._pairs_S[shard])
        start = (
            draw(num_pairs, self._seed, "start", epoch, shard) + row * self._seq_len
        ) % num_pairs
        left = min(self._seq_len, num_pairs - row * self._seq_len)
        parts: list[Slice] = []
        while left:
            stop = min(start + left, num_pairs)
            parts += self._between(
                begin + start, begin + stop, int(self._first_S[shard]), int(self._stop_S[shard])
            )
            left -= stop - start
            start = 0
        return parts

    def fill(
        self,
        epoch: int,
        row: int,
        tokens_T: np.ndarray,
        targets_T: np.ndarray,
        segment_ids_T: np.ndarray,
        positions_T: np.ndarray,
    ) -> None:
        """Writes a row into int32 arrays [T] that are filled with padding."""
        place, segment, position = 0, 0, 0
        for part in self.slices(epoch, row):
            ids = self.tokens.read(part.piece)[part.start : part.stop + 1]
            count = part.stop - part.start
            segment, position = (segment + 1, 0) if part.is_new else (segment, position)
            here = slice(place, place + count)
            tokens_T[here], targets_T[here] = ids[:-1], ids[1:]
            segment_ids_T[here] = segment
            positions_T[here] = np.arange(position, position + count)
            place, position = place + count, position + count

    def _between(self, start: int, stop: int, first: int, last: int) -> Iterator[Slice]:
        """Yields the slices that cover pairs [start, stop) of the source.

        The pairs lie in pieces [first, last).
        """
        ends = self.tokens.ends
        piece = first + int(np.searchsorted(ends[first:last], np.uint64(start), side="right"))
        is_new = True
        while start < stop:
            begin, end = int(ends[piece - 1]) if piece else 0, int(ends[piece])
            yield Slice(piece, start - begin, min(stop, end) - begin, is_new)
            start, piece = end, piece + 1
            is_new = start < stop and not self._continues(piece)

    def _continues(self, piece: int) -> bool:
        """Whether a piece continues the document of the piece before it."""
        numbers, hashes = self.tokens.numbers, self.tokens.hashes
        return (
            int(numbers[piece]) == int(numbers[piece - 1]) + 1
            and hashes[piece] == hashes[piece - 1]
        )


def split(tokens: Tokens, validation_fraction: float, option: str) -> np.ndarray:
    """Returns the number of held-out pieces at the start of each shard, int64 [S].

    A document is held out if the hash of its name is below the fraction.  Other documents, their
    order and the seed do not matter, so a growing corpus moves no text from one side to the other.
    If a side would be empty, the document whose hash is nearest to the threshold moves there.

    Raises:
      ConfigError: a fraction above 0 with a single document.
    """
    shards = list(
        zip(tokens.shard_pieces[:-1].tolist(), tokens.shard_pieces[1:].tolist(), strict=True)
    )
    if validation_fraction == 0:
        return np.zeros(len(shards), np.int64)
    lowest = min(int(tokens.hashes[first]) for first, _ in shards)
    highest = max(int(tokens.hashes[stop - 1]) for _, stop in shards)
    if lowest == highest:
        raise ConfigError(
            f"config.data.validation_fraction = {validation_fraction} needs at least 2 documents, "
            f"{option} holds 1; whole documents are held out. Set it to 0, or split the text into "
            "more files or rows."
        )
    threshold = np.uint64(min(max(int(validation_fraction * 2**64), lowest + 1), highest))
    return np.array(
        [np.searchsorted(tokens.hashes[first:stop], threshold) for first, stop in shards], np.int64
    )


def sides(
    tokens: Tokens, validation_fraction: float, seq_len: int, seed: str, option: str
) -> tuple[Rows, Rows]:
    """Returns the (training, held-out) rows of a source."""
    first_S, stop_S = tokens.shard_pieces[:-1], tokens.shard_pieces[1:]
    middle_S = first_S + split(tokens, validation_fraction, option)
    return Rows(tokens, middle_S, stop_S, seq_len, seed), Rows(
        tokens, first_S, middle_S, seq_len, "validation"
    )


def shuffled(index: int, count: int, *key: int | str) -> int:
    """Returns the image of `index` under a permutation of range(count) seeded by `key`."""
    import grain  # loads jax

    return int(
        grain.experimental.index_shuffle(
            index, max_index=count - 1, seed=draw(2**32, *key), rounds=4
        )
    )


def draw(below: int, *key: int | str) -> int:
    """Returns a number in [0, below) that depends on `key` alone; uniform up to 2^-64."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big") % below
