"""Pre-training: cross entropy of the next token in packed documents, and of the one after it if
the model has a layer that predicts it (config.model.mtp_loss_weight).

Letters: B batch, T tokens.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hunyuan_jax.config import Config
from hunyuan_jax.data import loader
from hunyuan_jax.data.stream import Batch, BatchIterator, DataStream, read_ahead
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.tokenizer import Tokenizer
from hunyuan_jax.train.objective import BatchSpec, Field, LossMetrics, Totals


class Pretrain:
    """The pre-training objective; the loss is in nats per target."""

    name = "pretrain"

    def __init__(self, config: Config):
        assert config.objective.name == self.name  # another one is `post.build.build_objective`
        self.config = config

    @property
    def batch_spec(self) -> BatchSpec:
        """The [B, T] arrays that data/loader.py describes."""
        dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), "int32")
        return {
            name: self._field(dtype)
            for name, dtype in (dtypes | {"loss_weights": "float32"}).items()
        }

    @property
    def eval_spec(self) -> BatchSpec:
        """The fields of training, and target_bytes, the bytes of text of each target."""
        return {**self.batch_spec, "target_bytes": self._field("float32")}

    def open_stream(self, tokenizer: Tokenizer) -> DataStream:
        """Opens the text or the token shards of config.data."""
        data = self.config.data
        return loader.PackedRows(loader.open_corpus(data, tokenizer), data, self.config.train)

    def batches(self, stream: DataStream, rows: np.ndarray) -> BatchIterator:
        """Reads ahead."""
        return read_ahead(stream, rows)

    def prepare(self, program: Any, workdir: str, initial_params: Callable[[], Any]) -> None:
        """Needs nothing."""

    def initial_weights(self, mesh: Mesh) -> dict[str, Any]:
        """None but random ones."""
        return {}

    def constants(self, mesh: Mesh) -> dict[str, Any]:
        """Needs none."""
        return {}

    def read_constants(self, mesh: Mesh) -> dict[str, Any]:
        """Needs none."""
        return {}

    def totals(self, batch: dict[str, jax.Array]) -> Totals:
        """Returns the number of targets, at least 1."""
        return {"targets": jax.numpy.maximum(batch["loss_weights"].sum(), 1.0)}

    def loss(
        self, model: Transformer, batch: dict[str, jax.Array], totals: Totals, key: jax.Array
    ) -> tuple[jax.Array, LossMetrics]:
        """Returns (cross entropy in nats, a mean over the batch's targets; metrics)."""
        places = (batch["positions"], batch["segment_ids"])
        output = model(batch["tokens"], *places, key=key, is_training=True)
        loss_BT = model.token_losses(output.hidden_BTD, batch["targets"])
        loss = (loss_BT * batch["loss_weights"]).sum() / totals["targets"]
        if not model.cfg.mtp_loss_weight:
            return loss, LossMetrics({}, output.stats)
        further = model.predict_next(
            output.hidden_BTD, batch["targets"], *places, key=key, is_training=True
        )
        targets_BT, weights_BT = after_next(batch)
        further_BT = model.token_losses(further.hidden_BTD, targets_BT) * weights_BT
        mtp = further_BT.sum() / totals["targets"]
        # The layer's figures are those of one more group.
        router = {
            name: jax.numpy.concatenate([figures, further.stats[name]])
            for name, figures in output.stats.items()
        }
        sums = {"next_token": loss, "mtp": mtp}
        return loss + model.cfg.mtp_loss_weight * mtp, LossMetrics(sums, router)

    def evaluate(self, model: Transformer, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the summed cross entropy, the number of targets and the bytes of text."""
        output = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        loss_BT = model.token_losses(output.hidden_BTD, batch["targets"])
        return {
            "nats": (loss_BT * batch["loss_weights"]).sum(),
            "targets": batch["loss_weights"].sum(),
            "bytes": batch["target_bytes"].sum(),
        }

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Returns the loss in nats per target, perplexity and bits per byte.

        Bits per byte are the cross entropy of all targets, including those that end a document, in
        bits, divided by the bytes of text.  They are left out if no target is text.
        """
        loss = sums["nats"] / sums["targets"]
        bits = (
            {"validation_bits_per_byte": sums["nats"] / math.log(2) / sums["bytes"]}
            if sums["bytes"]
            else {}
        )
        return {
            "validation_loss": loss,
            "validation_perplexity": math.exp(min(loss, 700.0)),  # about the largest float
            **bits,
        }

    def random_batch(self) -> Batch:
        """Returns random tokens; every sequence is one document."""
        shape = self._shape
        tokens = (
            np.random.default_rng(0)
            .integers(0, self.config.model.vocab_size, (shape[0], shape[1] + 1))
            .astype(np.int32)
        )
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": np.ones(shape, np.int32),
            "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
            "loss_weights": np.ones(shape, np.float32),
        }

    @property
    def _shape(self) -> tuple[int, int]:
        return self.config.train.batch_size, self.config.train.seq_len

    def _field(self, dtype: str) -> Field:
        return Field(self._shape, dtype, ("batch", "seq"))


def after_next(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns (the token after the next of each, its weight), [B, T]; the weight is 0 where it is
    another document's, or beyond the row.
    """
    shifted = {name: jax.numpy.roll(batch[name], -1, axis=1) for name in batch}
    is_same_BT = (shifted["segment_ids"] == batch["segment_ids"]).at[:, -1].set(False)
    weights_BT = batch["loss_weights"] * shifted["loss_weights"] * is_same_BT.astype("float32")
    return shifted["targets"], weights_BT
