"""What a run minimises: the batch it needs, its loss, and its validation.

`train/step.py`, `train/loop.py`, `plan` and `bench` know an objective through this protocol only.
Pre-training is `train/pretrain.py`; the others are files of `post/`, where `build_objective`
finds the one that a config names.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from hunyuan_jax.config import Config
from hunyuan_jax.data.stream import Batch, BatchIterator, DataStream
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hunyuan_jax.train.state import Program


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a batch: its shape over all hosts, its dtype and the logical name of each dim.

    The first dim is "batch": examples.  Processes and micro-batches split it, so an example that
    has several rows, such as a pair, has them in a dim of its own.
    """

    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]


BatchSpec = Mapping[str, Field]
Totals = dict[str, jax.Array]


class LossMetrics(NamedTuple):
    """What a loss reports beside its value.

    sums: float32 scalars that add up over the micro-batches to a figure of the batch, which is
      logged under its name.
    router: router figures of the model's forward pass, `Output.stats`.
    """

    sums: dict[str, jax.Array]
    router: dict[str, jax.Array]


class Objective(Protocol):
    """Made from a Config.  `loss` and `evaluate` see a micro-batch at a time: part of the batch's
    examples.

    A loss is divided by a total of the whole batch, over all micro-batches and hosts.  Every
    labelled token therefore counts the same, however many its micro-batch has.
    """

    @property
    def batch_spec(self) -> BatchSpec:
        """Fields of a training batch."""

    @property
    def eval_spec(self) -> BatchSpec:
        """Fields of a validation batch."""

    def open_stream(self, tokenizer: Tokenizer) -> DataStream:
        """Opens the data that config.data names.

        Raises:
          ConfigError: it does not exist or cannot be used.
        """

    def batches(self, stream: DataStream, rows: np.ndarray) -> BatchIterator:
        """Returns the batches of training, in order; of each the examples `rows`."""

    def prepare(
        self, program: "Program", workdir: str, initial_params: Callable[[], dict[str, Any]]
    ) -> None:
        """Computes what the data needs of the weights that the run starts from.

        Every process calls it once, after `open_stream` and before training, also in a run that is
        resumed.  `initial_params` makes these weights, as in `TrainState.params`.
        """

    def initial_weights(self, mesh: Mesh) -> dict[str, Any]:
        """Returns the parameters that a run without train.init_from starts with, in place of
        random ones: a nested dict of arrays on the mesh, {} for none.
        """

    def constants(self, mesh: Mesh) -> dict[str, Any]:
        """Returns what a batch on the mesh has beside its fields, whole in every micro-batch, such
        as a teacher's parameters: shapes and shardings by name, {} for none.
        """

    def read_constants(self, mesh: Mesh) -> dict[str, Any]:
        """Returns the arrays of `constants`."""

    def totals(self, batch: dict[str, jax.Array]) -> Totals:
        """Returns what losses and metrics are divided by: float32 scalars above 0, by name.

        `batch` is the whole batch.  A total is a number of labelled tokens, of pairs and the like.
        """

    def loss(
        self, model: Transformer, batch: dict[str, jax.Array], totals: Totals, key: jax.Array
    ) -> tuple[jax.Array, LossMetrics]:
        """Returns (this micro-batch's part of the loss, float32 scalar; metrics).

        The parts of all micro-batches add up to the loss of the batch, whose totals are `totals`.
        The router losses are not part of it: the train step adds them.  `key` is that of the
        micro-batch, for routing and dropout.
        """

    def evaluate(self, model: Transformer, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns float32 scalars that are added up over the validation batches."""

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Returns the row of metrics.jsonl for these sums of `evaluate`.

        It has "validation_loss", by which the best checkpoint is chosen.
        """

    def random_batch(self) -> Batch:
        """Returns a batch of random tokens that fills every position, for benchmarks."""


BuildObjective = Callable[[Config], Objective]
