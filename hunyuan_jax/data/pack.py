"""The grain pipeline behind loader.py: documents to shuffled, packed rows, epoch after epoch, and rows to batches.

Apart from loader.py because grain loads jax and costs most of a second, which an error in config or data should not wait for.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from hunyuan_jax.data.source import Document
from hunyuan_jax.tokenizer import Tokenizer

# Rows are shuffled within windows of this many tokens (16 bytes each in memory).  Documents are shuffled already, but one that
# fills hundreds of rows would otherwise fill whole batches.  Restoring a state repacks at most one window.
SHUFFLE_TOKENS = 2**20


def epoch_rows(documents: Sequence[Document], tokenizer: Tokenizer, seq_len: int, seed: int) -> grain.IterDataset:
    """Rows of one pass over the documents: pairs [T, 2], pairs_segment_ids [T] and pairs_positions [T], all int32.

    A pair is (token, target).  The rows are full, but for the last one packed, which ends in zeros.
    """
    pairs = (
        grain.MapDataset.source(documents)
        .shuffle(seed)
        .map(functools.partial(_document_pairs, tokenizer=tokenizer))
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )
    packed = grain.experimental.ConcatThenSplitIterDataset(pairs, length_struct={"pairs": seq_len})
    return grain.experimental.WindowShuffleIterDataset(packed, window_size=max(1, SHUFFLE_TOKENS // seq_len), seed=seed)


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed per epoch; hashed, for with `seed + epoch` run 1 would repeat the epochs of run 0.

    31 bits: grain adds the number of the shuffle window, and the sum must fit 32.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=4).digest(), "big") >> 1


def stack_rows(rows: grain.IterDataset, batch_size: int) -> grain.IterDataset:
    """Rows stacked [B, ...]; a last batch with fewer rows is filled up with zeros."""
    return rows.batch(batch_size, batch_fn=functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size))


class Epochs(grain.IterDataset):
    """The rows of epoch 0, then of epoch 1, ... without end.

    An endless stream of documents (`repeat`) would be less code, but its shuffle windows reach across epochs: a small corpus
    would show some rows many times before others.
    """

    def __init__(self, rows_of_epoch: Callable[[int], grain.IterDataset]):
        super().__init__()
        self._rows_of_epoch = rows_of_epoch

    def __iter__(self) -> "_EpochsIterator":
        return _EpochsIterator(self._rows_of_epoch)


class _EpochsIterator(grain.DatasetIterator):
    """State: the epoch, and the state of grain's iterator inside it."""

    def __init__(self, rows_of_epoch: Callable[[int], grain.IterDataset]):
        super().__init__()
        self._rows_of_epoch = rows_of_epoch
        self._start(0)

    def _start(self, epoch: int) -> None:
        self._epoch = epoch
        self._rows = iter(self._rows_of_epoch(epoch))

    def __next__(self) -> dict[str, np.ndarray]:
        while True:
            try:
                return next(self._rows)
            except StopIteration:
                self._start(self._epoch + 1)

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "rows": self._rows.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._start(state["epoch"])
        self._rows.set_state(_restored_tuples(state["rows"]))


def _document_pairs(document: Document, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """pairs [n + 1, 2] int32 of the n tokens with bos and eos around them: each token and the one that follows it."""
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id], np.int32)
    return {"pairs": np.lib.stride_tricks.sliding_window_view(ids, 2)}


def _restored_tuples(state: Any) -> Any:
    """A copy of a state that has been through JSON, with the tuples JSON turned into lists.

    grain 0.2.18 compares each of `remainder_slices` with a tuple; from a list it concludes that a piece of a document is left
    over where none is, and loses that document.
    """
    if not isinstance(state, Mapping):
        return state
    return {
        key: {name: tuple(ends) for name, ends in value.items()} if key == "remainder_slices" else _restored_tuples(value)
        for key, value in state.items()
    }
