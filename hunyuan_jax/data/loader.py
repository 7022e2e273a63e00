"""Packed rows of text: the data stream of pre-training.

Shapes: B rows of the global batch, R rows of one process, T positions of a row.  A batch is a dict
of numpy arrays [R, T]:

  tokens        int32    input ids; pad_id for padding
  targets       int32    the next id of the document; pad_id for padding
  segment_ids   int32    1, 2, ... per document in the row; 0 for padding
  positions     int32    0, 1, ... restarting in every segment
  loss_weights  float32  1 where there is a target; 0 for padding
  target_bytes  float32  validation only: UTF-8 bytes of text that the target stands for

A document is bos, its tokens, eos.  Its (token, target) pairs are concatenated with those of the
next documents and cut into rows (pack.py).  A target never crosses documents.  Each pair appears
exactly once per epoch of its source.  Only the last row of a shard has padding.  If a document
continues in another row, it is a new segment there and starts at position 0, without bos.

Batch s of a run is rows [s B, (s + 1) B) of one endless sequence.  The mixture chooses the source
of each row.  The rows of a source are taken epoch by epoch, in a new order each.  All of this is a
function of (data, train.seed, row).  It does not depend on processes, threads or the step at which
a run was resumed.  Each process reads its own rows only.
"""

import dataclasses
import os
from typing import Any

import numpy as np

from hunyuan_jax.config import DataConfig, SourceConfig, TrainConfig
from hunyuan_jax.data import pack, source, tokens
from hunyuan_jax.data.lengths import TokensOfLength
from hunyuan_jax.data.mixture import Mixture
from hunyuan_jax.data.stream import Batch
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The opened sources of a config, and the tokenizer that they were made with."""

    names: tuple[str, ...]
    sources: tuple[tokens.Tokens, ...]
    tokenizer: Tokenizer

    def identity(self) -> dict[str, Any]:
        """Returns a small dict of JSON values that differs for any other text."""
        return {
            name: opened.identity() for name, opened in zip(self.names, self.sources, strict=True)
        }


def open_corpus(config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """Opens the sources that are token shards; reads and tokenises those that are text.

    Raises:
      ConfigError: a source does not exist, has no usable document or too many bad rows, is too
        large for memory, or was made with another tokenizer.
    """
    opened = []
    for entry, path in zip(
        config.sources or (SourceConfig("text", config.source),), _paths(config), strict=True
    ):
        option = f"config.data.sources[{entry.name!r}]" if config.sources else "config.data.source"
        if tokens.is_shards(path):
            found = tokens.open_shards(path, tokenizer, config.tokenizer)
        else:
            spans = source.find_files(entry.path, option)
            tally = source.Tally(config.max_bad_fraction, "config.data.max_bad_fraction")
            found = tokens.in_memory(
                spans, config.text_field, tokenizer, tally, f"{option} = {entry.path!r}"
            )
        if entry.min_tokens or entry.max_tokens:
            found = TokensOfLength(
                found, entry.min_tokens, entry.max_tokens, f"{option} = {entry.path!r}"
            )
        opened.append(found)
    names = tuple(entry.name for entry in config.sources) or ("text",)
    return Corpus(names, tuple(opened), tokenizer)


def damaged_shards(config: DataConfig) -> list[str]:
    """Returns the files of the config's token shards whose hash is not the manifest's.

    Reads all of them.

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
    return [entry.path for entry in config.sources] or [config.source]


class PackedRows:
    """The DataStream of a corpus: finds the rows of each batch of a run."""

    def __init__(self, corpus: Corpus, config: DataConfig, train: TrainConfig):
        """Splits the sources and plans the mixture; makes no batch yet.

        Raises:
          ConfigError: a source cannot be split, or has too many rows.
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

    @property
    def rows_per_epoch(self) -> int:
        """See `DataStream.rows_per_epoch`; of all sources."""
        return sum(map(len, self._training))

    def batch(self, step: int, rows: np.ndarray | None = None) -> Batch:
        """Returns the batch of 0-based `step`, [B, T], or `rows` of it, [R, T]."""
        places = [self._place(step * self._batch_size + int(row)) for row in self._kept(rows)]
        return self._stack([(self._training[index], epoch, row) for index, epoch, row in places])

    def validation(self, num_batches: int, rows: np.ndarray | None = None) -> list[Batch]:
        """Returns at most `num_batches` batches of held-out rows; [] if nothing is held out.

        They come from a fixed shuffle over all sources that does not depend on the run's seed, so
        runs are compared on the same rows.  Each process keeps its own `rows` (all if None).  The
        last batch is filled with padding rows.
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
        """Returns the corpus's identity."""
        return self._corpus.identity()

    def rows_before(self, step: int) -> dict[str, int]:
        """Returns how many rows of each source come before 0-based `step`."""
        return dict(
            zip(self._corpus.names, self._mixture.counts(step * self._batch_size), strict=True)
        )

    def describe(self, step: int) -> dict[str, Any]:
        """Returns what is in the batch of 0-based `step`, as JSON values.

        phase: name of the mixture's phase.
        efficiency: share of positions without padding.
        rows: source, epoch and documents of each row.  A document has a name, the `piece` that was
          read, and the range [start, stop) of its tokens (bos is token 0) that are inputs here.
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
        """Returns the lines of the log: counts, held-out tokens and fill of each source."""
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
        """Returns (source, epoch, row of the source) of the run's row `number`."""
        index = self._mixture.source(number)
        rows = self._training[index]
        epoch, place = divmod(
            self._mixture.counts(number)[index] if len(self._training) > 1 else number, len(rows)
        )
        return index, epoch, rows.order(epoch, place)

    def _stack(self, places: list[tuple[pack.Rows, int, int] | None]) -> Batch:
        """Stacks rows given as (rows, epoch, row) into a batch; None is a padding row."""
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
    """Returns the batches with target_bytes, float32 [R, T].

    It is the number of UTF-8 bytes of text that each target stands for: 0 for padding, eos and
    other special tokens.  They are bytes of the text as the tokenizer sees it: of its NFC form for
    Hunyuan's.
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
