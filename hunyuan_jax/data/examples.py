"""Whole examples packed into rows: the data streams of fine-tuning.

An example is one chat, or several texts that belong together, such as a pair of answers.  Each of
its texts is a segment of a row.  An example is never cut: one that is longer than a row is left
out, counted and reported.

The rows of a run are made once.  An epoch has each of them once, in a new order.  Batch s is rows
[s B, (s + 1) B) of the epochs laid end to end, so it depends on (data, train.seed, s) alone.
The fields of a batch are those of data/loader.py; loss_weights is 1 where the target is learned.

Letters: B rows of a batch, R rows of one process, T positions of a row, n tokens of a text.
"""

import bisect
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hunyuan_jax.config import DataConfig, TrainConfig
from hunyuan_jax.data import pack, source
from hunyuan_jax.data.stream import Batch
from hunyuan_jax.data.tokens import name_hash
from hunyuan_jax.errors import ConfigError


class Text(NamedTuple):
    """ids: int32 [n]; is_learned: bool [n], whether the model learns to write the token there."""

    ids: np.ndarray
    is_learned: np.ndarray


class Example(NamedTuple):
    """name: of its row in the files; texts: its segments."""

    name: str
    texts: tuple[Text, ...]

    @property
    def num_pairs(self) -> int:
        """Positions that it takes: pairs of a token and its target."""
        return sum(len(text.ids) - 1 for text in self.texts)


@dataclasses.dataclass(frozen=True)
class Examples:
    """What was read: `kept`, in the order of the files, and what was not.

    num_long, longest: how many are longer than a row; the name and positions of the longest.
    """

    kept: list[Example]
    num_long: int
    longest: tuple[str, int]
    tally: source.Tally


def text_of(ids: Sequence[int], is_learned: Sequence[bool]) -> Text:
    """Returns a Text from lists."""
    return Text(np.asarray(ids, np.int32), np.asarray(is_learned, bool))


def read_examples(
    data: DataConfig, max_pairs: int, make: Callable[[Mapping[str, Any]], tuple[Text, ...]]
) -> Examples:
    """Reads all rows of data.source.

    Args:
      data: names the files.
      max_pairs: positions of a row.
      make: returns the texts of a row of fields; raises ValueError, with one line, for a row that
        cannot be used.

    Raises:
      ConfigError: no such files, more bad rows than data.max_bad_fraction, or no row that can be
        used.
    """
    if data.sources:
        raise ConfigError(
            f"config.data.sources {[s.name for s in data.sources]} mixes texts for pre-training; "
            "set config.data.source to the files of all examples."
        )
    tally = source.Tally(data.max_bad_fraction, "config.data.max_bad_fraction")
    kept, lengths = [], []
    for span in source.find_files(data.source, "config.data.source"):
        for record in source.read_records(span):
            if isinstance(record, source.Bad):
                tally.add_bad(span.name, record)
                continue
            try:
                example = Example(record.name, make(record.fields))
            except ValueError as error:
                tally.add_bad(span.name, source.Bad(record.name, str(error)))
                continue
            tally.add_document(span.name, 0)
            if example.num_pairs > max_pairs:
                lengths.append((example.num_pairs, example.name))
            else:
                kept.append(example)
    num_long, longest = len(lengths), max(lengths, default=(0, ""))
    if not kept:
        why = f"; {num_long} are longer than config.train.seq_len = {max_pairs}" * bool(num_long)
        raise ConfigError(
            f"config.data.source = {data.source!r} holds no example that can be used{why}"
            f"{tally.skipped()}"
        )
    return Examples(kept, num_long, (longest[1], longest[0]), tally)


def pack_rows(lengths: Sequence[int], seq_len: int, max_examples: int) -> list[list[int]]:
    """Returns rows of indices into `lengths`: best fit, the longest first.

    Args:
      lengths: positions of each example, at most seq_len.
      seq_len: positions of a row.
      max_examples: of a row.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # sorted; rooms that some row in `open_rows` has left
    open_rows: dict[int, list[int]] = {}

    def leave_open(row: int, room: int) -> None:
        if room and len(rows[row]) < max_examples:
            if room not in open_rows:
                bisect.insort(rooms, room)
                open_rows[room] = []
            open_rows[room].append(row)

    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(rooms, lengths[index])
        if place == len(rooms):
            rows.append([index])
            leave_open(len(rows) - 1, seq_len - lengths[index])
            continue
        room = rooms[place]
        row = open_rows[room].pop()
        if not open_rows[room]:
            del open_rows[room], rooms[place]
        rows[row].append(index)
        leave_open(row, room - lengths[index])
    return rows


def stack(rows: Sequence[Sequence[Example]], seq_len: int, pad_id: int) -> Batch:
    """Returns the batch of rows of examples; each of their texts is a segment."""
    shape = (len(rows), seq_len)
    tokens, targets = (np.full(shape, pad_id, np.int32) for _ in range(2))
    segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(2))
    loss_weights = np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        start = 0
        texts = [text for example in row for text in example.texts]
        for segment, text in enumerate(texts, start=1):
            here = (r, slice(start, start + len(text.ids) - 1))
            tokens[here], targets[here] = text.ids[:-1], text.ids[1:]
            segment_ids[here] = segment
            positions[here] = np.arange(len(text.ids) - 1)
            loss_weights[here] = text.is_learned[1:]
            start = here[1].stop
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": segment_ids,
        "positions": positions,
        "loss_weights": loss_weights,
    }


class PackedExamples:
    """The DataStream of examples."""

    def __init__(
        self,
        examples: Examples,
        data: DataConfig,
        train: TrainConfig,
        pad_id: int,
        max_examples: int,
    ):
        """Splits the examples and packs both sides into rows of at most `max_examples`.

        Raises:
          ConfigError: a single example of which a share is to be held out.
        """
        self._examples, self._train, self._pad_id = examples, train, pad_id
        self.training, self.held_out = (
            _rows_of(side, train.seq_len, max_examples)
            for side in _split(examples.kept, data.validation_fraction)
        )

    @property
    def rows_per_epoch(self) -> int:
        """See `DataStream.rows_per_epoch`."""
        return len(self.training)

    def batch(self, step: int, rows: np.ndarray | None = None) -> Batch:
        """Returns the batch of 0-based `step`, [B, T], or `rows` of it, [R, T]."""
        first = step * self._train.batch_size
        return self.stack([self.training[self._place(first + row)[1]] for row in self._kept(rows)])

    def validation(self, num_batches: int, rows: np.ndarray | None = None) -> list[Batch]:
        """Returns at most `num_batches` batches of held-out rows, the last filled with padding
        rows; [] if nothing is held out.
        """
        size = self._train.batch_size
        return [
            self.stack(
                [
                    self.held_out[number] if number < len(self.held_out) else []
                    for number in (step * size + row for row in self._kept(rows))
                ]
            )
            for step in range(min(num_batches, -(-len(self.held_out) // size)))
        ]

    def stack(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """Returns the batch of these rows, each a list of examples."""
        return stack(rows, self._train.seq_len, self._pad_id)

    def rows_before(self, step: int) -> dict[str, int]:
        """Returns how many rows come before 0-based `step`."""
        return {"examples": step * self._train.batch_size}

    def identity(self) -> dict[str, Any]:
        """Returns the number of examples and the hash of their tokens and labels."""
        digest = hashlib.blake2b(digest_size=16)
        for example in self._examples.kept:
            for text in example.texts:
                digest.update(text.ids.tobytes() + text.is_learned.tobytes() + b"/")
        return {
            "examples": {"count": len(self._examples.kept), "hash": digest.hexdigest()},
        }

    def describe(self, step: int) -> dict[str, Any]:
        """Returns what is in the batch of 0-based `step`: see `DataStream.describe`."""
        first = step * self._train.batch_size
        described, num_pairs = [], 0
        for number in range(first, first + self._train.batch_size):
            epoch, row = self._place(number)
            described.append(
                {
                    "source": "examples",
                    "epoch": epoch,
                    "documents": [{"name": example.name} for example in self.training[row]],
                }
            )
            num_pairs += sum(example.num_pairs for example in self.training[row])
        efficiency = num_pairs / (self._train.batch_size * self._train.seq_len)
        return {"efficiency": efficiency, "rows": described}

    def __str__(self) -> str:
        """Returns the lines of the log: counts, rows, and what was left out."""
        found, seq_len = self._examples, self._train.seq_len
        num_held_out = sum(map(len, self.held_out))
        texts = [text for row in self.training for example in row for text in example.texts]
        num_pairs = sum(len(text.ids) - 1 for text in texts)
        num_learned = sum(int(text.is_learned[1:].sum()) for text in texts)
        line = (
            f"{len(found.kept) - num_held_out:,} training and {num_held_out:,} held-out examples; "
            f"{num_pairs:,} training tokens, {num_learned / max(num_pairs, 1):.1%} of them "
            f"learned; {len(self.training):,} rows an epoch, "
            f"{num_pairs / (len(self.training) * seq_len):.1%} full"
        )
        if found.num_long:
            name, longest = found.longest
            line += (
                f"; {found.num_long:,} longer than config.train.seq_len = {seq_len} left out, the "
                f"longest {name} with {longest}"
            )
        return line + found.tally.skipped()

    def _kept(self, rows: np.ndarray | None) -> list[int]:
        return list(range(self._train.batch_size)) if rows is None else [int(r) for r in rows]

    def _place(self, number: int) -> tuple[int, int]:
        """Returns (epoch, index of the row) of the run's row `number`."""
        epoch, place = divmod(number, len(self.training))
        return epoch, pack.shuffled(place, len(self.training), self._train.seed, "rows", epoch)


def _rows_of(examples: list[Example], seq_len: int, max_examples: int) -> list[list[Example]]:
    packed = pack_rows([example.num_pairs for example in examples], seq_len, max_examples)
    return [[examples[index] for index in row] for row in packed]


def _split(
    examples: list[Example], validation_fraction: float
) -> tuple[list[Example], list[Example]]:
    """Returns (training, held out), each sorted by the hash of its examples' names.

    An example is held out if that hash is below the fraction, so what is added later moves none.
    Each side gets one at least.
    """
    ordered = sorted(examples, key=lambda example: (name_hash(example.name), example.name))
    if not validation_fraction:
        return ordered, []
    if len(ordered) < 2:
        raise ConfigError(
            f"config.data.validation_fraction = {validation_fraction} needs at least 2 examples, "
            "config.data.source holds 1. Set it to 0, or add examples."
        )
    hashes = [name_hash(example.name) for example in ordered]
    num_held_out = bisect.bisect_left(hashes, int(validation_fraction * 2**64))
    num_held_out = min(max(num_held_out, 1), len(ordered) - 1)
    return ordered[num_held_out:], ordered[:num_held_out]
