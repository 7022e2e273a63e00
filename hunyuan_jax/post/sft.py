"""Supervised fine-tuning: cross entropy of what the assistant says, in packed chats.

Letters: B batch, T tokens.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hunyuan_jax.config import Config
from hunyuan_jax.data import chats, examples
from hunyuan_jax.data.stream import DataStream
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.tokenizer import Tokenizer
from hunyuan_jax.train.objective import BatchSpec, LossMetrics, Totals
from hunyuan_jax.train.pretrain import Pretrain


class Sft(Pretrain):
    """The objective of fine-tuning on chats; the loss is in nats per learned token.

    A batch is that of pre-training, with loss_weights 1 on the learned tokens alone.
    """

    name = "sft"

    @property
    def eval_spec(self) -> BatchSpec:
        """The fields of training."""
        return self.batch_spec

    def open_stream(self, tokenizer: Tokenizer) -> DataStream:
        """Reads the chats of config.data."""
        return open_chats(self.config, tokenizer)

    def loss(
        self, model: Transformer, batch: dict[str, jax.Array], totals: Totals, key: jax.Array
    ) -> tuple[jax.Array, LossMetrics]:
        """Returns (cross entropy in nats, a mean over the batch's learned tokens; metrics)."""
        output = model(
            batch["tokens"], batch["positions"], batch["segment_ids"], key=key, is_training=True
        )
        figures = model.token_figures(output.hidden_BTD, batch["targets"])
        share_BT = batch["loss_weights"] / totals["targets"]
        sums = {
            "mean_token_accuracy": (figures.is_top * share_BT).sum(),
            "entropy": (figures.entropy * share_BT).sum(),
            "num_tokens": (batch["segment_ids"] > 0).sum(dtype=jnp.float32),
        }
        loss = (figures.loss * batch["loss_weights"]).sum() / totals["targets"]
        return loss, LossMetrics(jax.lax.stop_gradient(sums), output.stats)

    def evaluate(self, model: Transformer, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns sums over the learned tokens: cross entropy, right predictions, their number."""
        output = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        figures = model.token_figures(output.hidden_BTD, batch["targets"])
        return {
            "nats": (figures.loss * batch["loss_weights"]).sum(),
            "right": (figures.is_top * batch["loss_weights"]).sum(),
            "targets": batch["loss_weights"].sum(),
        }

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Returns the loss in nats per learned token, and the share that was predicted."""
        return {
            "validation_loss": sums["nats"] / sums["targets"],
            "validation_token_accuracy": sums["right"] / sums["targets"],
        }


def open_chats(config: Config, tokenizer: Tokenizer) -> DataStream:
    """Reads the chats of config.data, packed into rows, with weights on what is learned."""
    data, train = config.data, config.train
    found = examples.read_examples(data, train.seq_len, lambda row: chats.chat_of(row, tokenizer))
    return examples.PackedExamples(found, data, train, tokenizer.pad_id, train.seq_len)
