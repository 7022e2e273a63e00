"""Packed rows of text: the data stream of pre-training.

Shapes: B rows of the global batch, R of them kept by one process, T positions of a row.  A batch
is a dict of numpy arrays, all [R, T]:

  tokens        int32    input ids; pad_id where the segment is 0
  targets       int32    the id that follows the token in its document; pad_id like tokens
  segment_ids   int32    1, 2, ... per document piece in the row, 0 for padding
  positions     int32    0, 1, ... restarting at every document piece
  loss_weights  float32  1 where there is a target, 0 for padding
  target_bytes  float32  validation only: UTF-8 bytes of text that the target stands for

A document becomes bos, its tokens, eos, and then (token, target) pairs; rows are cut from the
pairs of consecutive documents (pack.py).  So a target never crosses documents, each pair appears
exactly once an epoch of its source, and only the last row of a shard holds padding.  The piece
that continues a document in another row is a new segment and starts at position 0, without bos.

Batch s of a run is rows [s B, (s + 1) B) of one endless sequence.  The mixture says which source a
row comes from; the source's rows are taken epoch by epoch, each epoch in its own order.  All of
that is a function of (data, train.seed, row).  It does not depend on processes, on threads or on
where a run was resumed, and each process reads its own rows only.
"""

import dataclasses
import os
from typing import Any

import numpy as np

from hunyuan_jax.config import DataConfig, SourceConfig, TrainConfig
from hunyuan_jax.data import pack, source, tokens
from hunyuan_jax.data.mixture import Mixture
from hunyuan_jax.data.stream import Batch
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import user_path
from hunyuan_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The opened sources of a config, and the tokenizer that they were made with."""

    names: tuple[str, ...]
    sources: tuple[tokens.Tokens, ...]
    tokenizer: Tokenizer

    def identity(self) -> dict[str, Any]:
        """Returns what tells this text from any other: a small dict that survives JSON."""
        return {
            name: opened.identity() for name, opened in zip(self.names, self.sources, strict=True)
        }


def open_corpus(config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """Opens token shards, reads and tokenises text.

    Raises:
      ConfigError: a source that does not exist, holds nothing usable, too much that is not, too
        much for memory, or tokens of another tokenizer.
    """
    opened = []
    for entry, path in zip(
        config.sources or (SourceConfig("text", config.source),), _paths(config), strict=True
    ):
        option = f"config.data.sources[{entry.name!r}]" if config.sources else "config.data.source"
        if tokens.is_shards(path):
            opened.append(tokens.open_shards(path, tokenizer, config.tokenizer))
            continue
        spans = source.find_files(entry.path, option)
        tally = source.Tally(config.max_bad_fraction, "config.data.max_bad_fraction")
        opened.append(
            tokens.in_memory(
                spans, config.text_field, tokenizer, tally, f"{option} = {entry.path!r}"
            )
        )
    names = tuple(entry.name for entry in config.sources) or ("text",)
    return Corpus(names, tuple(opened), tokenizer)


def damaged_shards(config: DataConfig) -> list[str]:
    """Files of the config's token shards that are not what their manifest says; reads all of them.

    Raises:
      ConfigError: no source is a folder of token shards.
    """
    folders = [path for path in _paths(config) if tokens.is_shards(path)]
    if not folders:
        raise ConfigError(
            f"none of the sources {_paths(config)} is a folder of token shards; only these have "
            "hashes."
        )
    return [
        os.path.join(folder, name) for folder in folders for name in tokens.damaged_files(folder)
    ]


def _paths(config: DataConfig) -> list[str]:
    return [user_path(entry.path) for entry in config.sources] or [user_path(config.source)]


class PackedRows:
    """The DataStream of a corpus: which rows make up each batch of a run."""

    def __init__(self, corpus: Corpus, config: DataConfig, train: TrainConfig):
        """Makes no batch yet.

        Raises:
          ConfigError: a source that cannot be split, or has too many rows.
        """
        self._corpus, self._batch_size, self._seq_len = corpus, train.batch_size, train.seq_len
        self._phase_names = [phase.name for phase in config.phases] or ["all"]
        both = [
            pack.sides(
                opened, config.validation_fraction, train.seq_len, f"{train.seed}/{name}", name
            )
            for name, opened in zip(corpus.names, corpus.sources, strict=True)
        ]
        self._training, self._held_out = [sides[0] for sides in both], [sides[1] for sides in both]
        starts = [
            round(phase.start * train.num_steps) * train.batch_size for phase in config.phases
        ] or [0]
        weights = [phase.weights for phase in config.phases] or [(1.0,)]
        self._mixture = Mixture(starts, weights, pack.draw(2**32, train.seed, "mixture"))

    def batch(self, step: int, rows: np.ndarray | None = None) -> Batch:
        """The batch of 0-based `step`, [B, T], or `rows` of it, [R, T]."""
        places = [self._place(step * self._batch_size + int(row)) for row in self._kept(rows)]
        return self._stack([(self._training[index], epoch, row) for index, epoch, row in places])

    def validation(self, num_batches: int, rows: np.ndarray | None = None) -> list[Batch]:
        """Returns at most `num_batches` batches of held-out rows; [] if nothing is held out.

        They come from one fixed shuffle over all sources that does not depend on the run's seed,
        so runs are compared on the same rows.  Each process keeps its own `rows` (all if None).
        The last batch is filled with rows of padding.
        """
        ends = np.cumsum([len(held_out) for held_out in self._held_out])
        batches = []
        for step in range(min(num_batches, -(-int(ends[-1]) // self._batch_size))):
            places = []
            for number in (step * self._batch_size + int(row) for row in self._kept(rows)):
                if number >= ends[-1]:
                    places.append(None)
                    continue
                row = pack.shuffled(number, int(ends[-1]), "validation")
                index = int(np.searchsorted(ends, row, side="right"))
                places.append(
                    (self._held_out[index], 0, row - int(ends[index - 1]) if index else row)
                )
            batches.append(self._stack(places))
        return with_target_bytes(batches, self._corpus.tokenizer)

    def identity(self) -> dict[str, Any]:
        """That of the corpus."""
        return self._corpus.identity()

    def rows_before(self, step: int) -> dict[str, int]:
        """How many rows of each source come before 0-based `step`."""
        return dict(
            zip(self._corpus.names, self._mixture.counts(step * self._batch_size), strict=True)
        )

    def describe(self, step: int) -> dict[str, Any]:
        """What is in the batch of 0-based `step`: phase, efficiency, and of each row source, epoch
        and documents; survives JSON.

        A document has a name, the `piece` of it that was read, and the range [start, stop) of its
        tokens (bos is token 0) that are inputs here.
        """
        first = step * self._batch_size
        described, num_pairs = [], 0
        for number in range(first, first + self._batch_size):
            index, epoch, row = self._place(number)
            opened, documents = self._corpus.sources[index], []
            for part in self._training[index].slices(epoch, row):
                piece = int(opened.numbers[part.piece])
                start, stop = (
                    piece * tokens.PIECE_PAIRS + place for place in (part.start, part.stop)
                )
                documents.append(
                    {
                        "name": opened.document(part.piece),
                        "piece": piece,
                        "start": start,
                        "stop": stop,
                    }
                )
                num_pairs += stop - start
            described.append(
                {"source": self._corpus.names[index], "epoch": epoch, "documents": documents}
            )
        return {
            "phase": self._phase_names[self._mixture.phase(first)],
            "efficiency": num_pairs / (self._batch_size * self._seq_len),
            "rows": described,
        }

    def __str__(self) -> str:
        """For the log: each source with its report, what is held out, and the share of positions
        that are no padding.
        """
        lines = []
        for name, opened, rows, held_out in zip(
            self._corpus.names, self._corpus.sources, self._training, self._held_out, strict=True
        ):
            first, *rest = str(opened).splitlines()
            prefix = f"{name}: " if len(self._training) > 1 else ""
            lines.append(
                f"{prefix}{first}; {rows.num_pairs:,} training and {held_out.num_pairs:,} "
                f"held-out tokens; {len(rows):,} rows an epoch, "
                f"{rows.num_pairs / (len(rows) * self._seq_len):.2%} full"
            )
            lines += rest
        return "\n".join(lines)

    def _kept(self, rows: np.ndarray | None) -> np.ndarray:
        return np.arange(self._batch_size) if rows is None else rows

    def _place(self, number: int) -> tuple[int, int, int]:
        """(source, epoch, row of it) of the run's row `number`."""
        index = self._mixture.source(number)
        rows = self._training[index]
        epoch, place = divmod(
            self._mixture.counts(number)[index] if len(self._training) > 1 else number, len(rows)
        )
        return index, epoch, rows.order(epoch, place)

    def _stack(self, places: list[tuple[pack.Rows, int, int] | None]) -> Batch:
        """Rows of (rows, epoch, row), or of padding for None, as a batch."""
        shape = (len(places), self._seq_len)
        batch = {
            name: np.full(shape, self._corpus.tokenizer.pad_id, np.int32)
            for name in ("tokens", "targets")
        }
        batch |= {name: np.zeros(shape, np.int32) for name in ("segment_ids", "positions")}
        for place, *arrays in zip(places, *batch.values(), strict=True):
            if place is not None:
                rows, epoch, row = place
                rows.fill(epoch, row, *arrays)
        return {**batch, "loss_weights": (batch["segment_ids"] > 0).astype(np.float32)}


def with_target_bytes(batches: list[Batch], tokenizer: Tokenizer) -> list[Batch]:
    """Returns the batches with target_bytes, float32 [R, T]: UTF-8 bytes of text that each target
    stands for; 0 for padding, eos and other special tokens.

    These are bytes of the text as the tokenizer sees it: of its NFC form for Hunyuan's.
    """
    if not batches:
        return []
    bytes_V = np.array(
        [len(tokenizer.decode_bytes([i], skip_special=True)) for i in range(tokenizer.vocab_size)],
        np.float32,
    )
    return [
        {**batch, "target_bytes": bytes_V[batch["targets"]] * (batch["loss_weights"] > 0)}
        for batch in batches
    ]
