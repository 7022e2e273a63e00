"""Batches of a run, by number: what the training loop asks of its data.

A batch is a dict of numpy arrays, the fields of the objective's batch_spec.  R of its B examples
are kept by one process.
"""

import functools
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hunyuan_jax.errors import ConfigError

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]

_PREFETCH_BATCHES = 8
_NUM_THREADS = 2


class DataStream(Protocol):
    """An endless sequence of batches.  A batch depends on the config and its number alone, so a
    run continues anywhere without reading what came before.
    """

    @property
    def rows_per_epoch(self) -> int:
        """Rows that hold all training data once."""

    def batch(self, step: int, rows: np.ndarray | None = None) -> Batch:
        """Returns the batch of 0-based `step`, or only the examples `rows` of it, [R, ...]."""

    def validation(self, num_batches: int, rows: np.ndarray | None = None) -> list[Batch]:
        """Returns at most `num_batches` held-out batches, the same in every run; [] if none."""

    def rows_before(self, step: int) -> dict[str, int]:
        """Returns how many examples of each source come before 0-based `step`."""

    def identity(self) -> dict[str, Any]:
        """Returns what tells this data from any other: a small dict that survives JSON."""

    def describe(self, step: int) -> dict[str, Any]:
        """Returns what is in the batch of 0-based `step`; survives JSON.

        "rows" lists its examples: each has a "source" and "documents", each of those a "name".
        """

    def __str__(self) -> str:
        """Returns the lines that the log shows about the data."""


class BatchIterator(Iterator[Batch]):
    """Endless batches of a stream.  Its state names the next batch, never a prefetched one.

    Close it (`contextlib.closing`), or grain's destructors may print errors at interpreter exit.
    """

    def __init__(self, batches: "grain.DatasetIterator", stream: DataStream):
        self._batches, self._stream = batches, stream

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch yielded: a small dict that survives JSON."""
        state = self._batches.get_state()
        return {**state, "rows": self._stream.rows_before(state["next_index"])}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch at which `state` was taken, from an iterator made with the
        same arguments.

        Raises:
          ConfigError: the state is of another mixture, or of a version that cannot be continued.
        """
        if set(state) != {"next_index", "rows"}:
            raise ConfigError(
                f"the checkpoint's data position {dict(state)} is of an earlier version of "
                "hunyuan_jax; use another --workdir."
            )
        expected = self._stream.rows_before(state["next_index"])
        if state["rows"] != expected:
            raise ConfigError(
                f"the checkpoint was made after {state['rows']} rows of each source; "
                "config.data.phases and train.num_steps now give "
                f"{expected} by batch {state['next_index']}. Phases may change only from the "
                "checkpoint on; set back what came before."
            )
        self._batches.set_state({"next_index": state["next_index"]})

    def follow(self, state: Any) -> None:
        """Shows the train state after the last step, which batches that a model writes need; these
        here are read.
        """

    def close(self) -> None:
        """Stops the reading threads; the iterator cannot be used afterwards."""
        self._batches.close()
        del self._batches


def read_ahead(
    stream: DataStream, rows: np.ndarray | None = None, num_threads: int = _NUM_THREADS
) -> BatchIterator:
    """Returns endless batches, read ahead by `num_threads` threads; `rows` of each (None: all)."""
    import grain

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=_PREFETCH_BATCHES)
    batches = grain.MapDataset.range(sys.maxsize).map(functools.partial(stream.batch, rows=rows))
    return BatchIterator(iter(batches.to_iter_dataset(options)), stream)
