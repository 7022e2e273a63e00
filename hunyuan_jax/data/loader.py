"""Documents to packed batches: endless and resumable for training, a fixed list for validation.

Shapes: B rows of the global batch, R of them kept by one process, T positions of a row.  A batch is a dict of numpy arrays, all
[R, T]:

  tokens        int32    input ids; pad_id where the segment is 0
  targets       int32    the id that follows the token in its document; pad_id where the segment is 0
  segment_ids   int32    1, 2, ... per document piece in the row, 0 for padding
  positions     int32    0, 1, ... restarting at every document piece
  loss_weights  float32  1 where there is a target, 0 for padding

A document becomes bos, its tokens, eos, and then (token, target) pairs; rows are packed from the pairs by concatenation and
splitting.  So a target never crosses documents, each pair appears exactly once an epoch, and only the last row of an epoch
holds padding.  The piece that continues a document in another row is a new segment and starts at position 0, without bos.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hunyuan_jax.config import ConfigError
from hunyuan_jax.data.source import Document
from hunyuan_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]

_PREFETCH_BATCHES = 8
_VALIDATION_SEED = 0  # not the run's: runs with different seeds are compared on the same rows


class TrainIterator(Iterator[Batch]):
    """Endless batches.  The state names the last batch yielded, never one that is only prefetched.

    Close it (`contextlib.closing`), or grain's destructors may print errors at interpreter exit.
    """

    def __init__(self, batches: "grain.DatasetIterator"):
        self._batches = batches

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Position after the last batch yielded: a small dict that survives JSON."""
        return self._batches.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on behind the batch after which `state` was taken, from an iterator made with the same arguments."""
        self._batches.set_state(state)

    def close(self) -> None:
        """Stops the prefetch thread; the iterator cannot be used afterwards."""
        self._batches.close()
        del self._batches


def train_iterator(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    rows: np.ndarray | None = None,
) -> TrainIterator:
    """Endless batches [R, T], prefetched by a thread; every epoch has its own order.

    All processes pack the same global batch of batch_size rows, a function of the arguments and the step alone, and each keeps its
    own R `rows` of it (all if None).  (So every host tokenizes everything: right for text that fits one host's memory.)

    Raises:
      ConfigError: no documents.
    """
    if not documents:
        raise ConfigError("config.data.source leaves 0 documents to train on; at least 1 is needed. Point it at more text.")
    import grain

    from hunyuan_jax.data import pack

    def rows_of_epoch(epoch: int) -> grain.IterDataset:
        return pack.epoch_rows(documents, tokenizer, seq_len, pack.epoch_seed(seed, epoch))

    to_batch = functools.partial(_to_batch, pad_id=tokenizer.pad_id, kept=slice(None) if rows is None else rows)
    batches = pack.stack_rows(pack.Epochs(rows_of_epoch), batch_size).map(to_batch)
    return TrainIterator(iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_PREFETCH_BATCHES)))


def validation_batches(
    documents: Sequence[Document], tokenizer: Tokenizer, *, batch_size: int, seq_len: int, num_batches: int, rows: np.ndarray | None = None
) -> list[Batch]:
    """The first `num_batches` batches [R, T] of one fixed shuffle, fewer if the documents end before; [] without documents.

    Batches have batch_size rows, of which each process keeps its own R `rows` (all if None).  The shuffle makes few batches a sample
    of all documents.  The last batch is filled with rows of padding.
    """
    if not documents:
        return []
    from hunyuan_jax.data import pack

    to_batch = functools.partial(_to_batch, pad_id=tokenizer.pad_id, kept=slice(None) if rows is None else rows)
    batches = pack.stack_rows(pack.epoch_rows(documents, tokenizer, seq_len, _VALIDATION_SEED), batch_size).map(to_batch)
    with contextlib.closing(iter(batches)) as iterator:
        return list(itertools.islice(iterator, num_batches))


def _to_batch(rows: Mapping[str, np.ndarray], *, pad_id: int, kept: slice | np.ndarray) -> Batch:
    """Names, padding and loss weights for the `kept` ones of packed rows ([B, T, 2] and twice [B, T])."""
    segment_ids = rows["pairs_segment_ids"][kept]
    is_pair = segment_ids > 0
    pairs = np.where(is_pair[..., None], rows["pairs"][kept], np.int32(pad_id))
    return {
        "tokens": np.ascontiguousarray(pairs[..., 0]),
        "targets": np.ascontiguousarray(pairs[..., 1]),
        "segment_ids": segment_ids,
        "positions": rows["pairs_positions"][kept],
        "loss_weights": is_pair.astype(np.float32),
    }
