"""Direct preference optimisation (arXiv 2305.18290) on packed pairs of answers.

Letters: B batch, T tokens, Q pairs of a row, V vocabulary.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hunyuan_jax.config import Config, DpoConfig, LoraConfig, to_dict
from hunyuan_jax.data import examples
from hunyuan_jax.data.pairs import PackedPairs, max_pairs, pair_of
from hunyuan_jax.data.stream import Batch, BatchIterator, DataStream
from hunyuan_jax.files import write_whole
from hunyuan_jax.layers.loss import TokenFigures
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel import hosts
from hunyuan_jax.params.tree import part_like
from hunyuan_jax.post.online import FIGURES, OnlinePairs
from hunyuan_jax.tokenizer import Tokenizer
from hunyuan_jax.train.objective import BatchSpec, Field, LossMetrics, Totals
from hunyuan_jax.train.pretrain import Pretrain
from hunyuan_jax.train.state import Program
from hunyuan_jax.train.step import feed, make_outputs_step
from hunyuan_jax.weights.open import open_model


class Dpo(Pretrain):
    """The objective of preferences; the loss is a mean over pairs.

    With objective.dpo.sft_weight the cross entropy of the chosen answers is added, a mean over
    their tokens in the whole batch.
    """

    name = "dpo"

    def __init__(self, config: Config):
        super().__init__(config)
        self._stream: PackedPairs | None = None
        self._online: OnlinePairs | None = None
        self._has_online = config.objective.dpo.online.share > 0
        self._pairs_per_row = 1 if self._has_online else max_pairs(config.train.seq_len)

    @property
    def batch_spec(self) -> BatchSpec:
        """The fields of pre-training, those of data/pairs.py, and with online pairs those of
        post/online.py.
        """
        B = self.config.train.batch_size
        per_row = Field((B,), "float32", ("batch",))
        return {
            **super().batch_spec,
            "is_pair": Field((B, self._pairs_per_row), "float32", ("batch", "example_rows")),
            "reference": self._field("float32"),
            **(dict.fromkeys(FIGURES, per_row) if self._has_online else {}),
        }

    @property
    def eval_spec(self) -> BatchSpec:
        """The fields of training."""
        return self.batch_spec

    def open_stream(self, tokenizer: Tokenizer) -> DataStream:
        """Reads the pairs of config.data, and the prompts of online pairs."""
        data, train, online = self.config.data, self.config.train, self.config.objective.dpo.online
        num_online = round(online.share * train.batch_size)
        if num_online < train.batch_size:
            found = examples.read_examples(
                data, train.seq_len, lambda row: pair_of(row, tokenizer)
            )
            train = dataclasses.replace(
                train, batch_size=train.batch_size - num_online, grad_accum_steps=1
            )
            self._stream = PackedPairs(found, data, train, tokenizer.pad_id, self._pairs_per_row)
        if not num_online:
            return self._stream
        self._online = OnlinePairs(self.config, self._stream, tokenizer)
        return self._online

    def batches(self, stream: DataStream, rows: np.ndarray) -> BatchIterator:
        """Those of the stream, or with the pairs that the weights write."""
        return self._online.batches if self._online else super().batches(stream, rows)

    def prepare(
        self, program: Program, workdir: str, initial_params: Callable[[], dict[str, Any]]
    ) -> None:
        """Gives the data the reference's log-probabilities: those of an earlier run with the same
        weights and data, or computed and stored now.  Online pairs get those of each batch.
        """
        is_stored = self.config.objective.dpo.reference == "stored"
        if self._online:
            reference = self._reference_of(program, initial_params()) if is_stored else None
            self._online.start(program, workdir, reference)
        elif is_stored:
            paths = _places(self.config.data.source, workdir, f".reference-{self._key()}.npy")
            found = _read_first(paths)
            if found is None:
                found = self._reference(program, initial_params())
                if hosts.is_first():
                    _write_first(paths, found)
            self._stream.set_reference(found)

    def _key(self) -> str:
        """A hash of the weights and the data, and of what decides the last bits."""
        init_from = self.config.train.init_from
        weights = open_model(init_from).fingerprint if init_from else self.config.train.seed
        quantize = self.config.model.lora.quantize
        weights = weights if quantize == "none" else [weights, quantize]
        model = to_dict(dataclasses.replace(self.config.model, lora=LoraConfig()))
        num_micro_batches = self.config.train.grad_accum_steps
        text = json.dumps([weights, model, num_micro_batches, self._stream.layout()])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def _reference(self, program: Program, params: dict[str, Any]) -> np.ndarray:
        """Returns the log-probabilities of all rows, float32 [R, T]."""
        reference_of, kept = self._reference_of(program, params), feed(program)[0]
        rows, size = self._stream.all_rows, self.config.train.batch_size
        return np.concatenate(
            [
                reference_of(self._stream.stack([rows[first + row] for row in kept]))
                for first in range(0, len(rows), size)
            ]
        )

    def _reference_of(
        self, program: Program, params: dict[str, Any]
    ) -> Callable[[Batch], np.ndarray]:
        """Returns batch, of which this process has its part -> log-probabilities of the whole
        batch's targets, float32 [B, T].
        """
        outputs = make_outputs_step(program, lambda model, batch: self._log_probs(model, batch)[0])
        to_devices = feed(program)[1]
        return lambda batch: np.asarray(outputs(params, to_devices(batch))[0])

    def totals(self, batch: dict[str, jax.Array]) -> Totals:
        """Returns the numbers of pairs and of learned tokens: of all answers, and of those chosen
        and rejected.
        """
        weights_B2 = jnp.stack(
            [(batch["loss_weights"] * _is_side(batch, side)).sum(-1) for side in (0, 1)], -1
        )
        found = {
            "pairs": batch["is_pair"].sum(),
            "chosen": weights_B2[:, 0].sum(),
            "rejected": weights_B2[:, 1].sum(),
        }
        if self._has_online:
            found["online"] = batch["is_online"].sum()
        return {name: jnp.maximum(total, 1.0) for name, total in found.items()}

    def loss(
        self, model: Transformer, batch: dict[str, jax.Array], totals: Totals, key: jax.Array
    ) -> tuple[jax.Array, LossMetrics]:
        """Returns (the loss, metrics by the names of TRL)."""
        log_probs_BT, figures, router = self._log_probs(model, batch, key)
        reference_BT = batch["reference"]
        if self.config.objective.dpo.reference == "adapter_off":
            plain = self._without_adapters(model)
            reference_BT = jax.lax.stop_gradient(self._log_probs(plain, batch)[0])
        sums = self._sums(log_probs_BT, reference_BT, figures, batch)
        means = {name: value / totals[_TOTAL.get(name, "pairs")] for name, value in sums.items()}
        loss = means.pop("loss")
        sft_weight = self.config.objective.dpo.sft_weight
        loss = loss + sft_weight * means["nll_loss"] if sft_weight else loss
        means["num_tokens"] = (batch["segment_ids"] > 0).sum(dtype=jnp.float32)
        means["entropy"] = (figures.entropy * batch["loss_weights"]).sum() / (
            totals["chosen"] + totals["rejected"]
        )
        if self._has_online:
            for name in FIGURES[1:]:
                means[f"online/{name}"] = batch[name].sum() / totals["online"]
        return loss, LossMetrics(jax.lax.stop_gradient(means), router)

    def evaluate(self, model: Transformer, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns sums over the pairs, and the numbers of pairs and of chosen tokens."""
        log_probs_BT, figures, _ = self._log_probs(model, batch)
        reference_BT = batch["reference"]
        if self.config.objective.dpo.reference == "adapter_off":
            reference_BT = self._log_probs(self._without_adapters(model), batch)[0]
        sums = self._sums(log_probs_BT, reference_BT, figures, batch)
        return {
            **sums,
            "pairs": batch["is_pair"].sum(),
            "chosen": (batch["loss_weights"] * _is_side(batch, 0)).sum(),
        }

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Returns the loss, the rewards' accuracy and margin, and the loss of the chosen."""
        nll = sums["nll_loss"] / sums["chosen"]
        pairs = sums["pairs"]
        return {
            "validation_loss": sums["loss"] / pairs + self.config.objective.dpo.sft_weight * nll,
            "validation_accuracy": sums["rewards/accuracies"] / pairs,
            "validation_margin": sums["rewards/margins"] / pairs,
            "validation_nll_loss": nll,
        }

    def random_batch(self) -> Batch:
        """Returns random tokens; a row is one pair."""
        batch = super().random_batch()
        half = self.config.train.seq_len // 2
        batch["segment_ids"][:, half:] = 2
        shape = self.batch_spec["is_pair"].shape
        is_pair = np.zeros(shape, np.float32)
        is_pair[:, 0] = 1
        reference = np.zeros(batch["tokens"].shape, np.float32)
        figures = {name: np.ones(len(is_pair), np.float32) for name in FIGURES}
        batch |= {"is_pair": is_pair, "reference": reference}
        return batch | figures if self._has_online else batch

    def _log_probs(
        self, model: Transformer, batch: dict[str, jax.Array], key: jax.Array | None = None
    ) -> tuple[jax.Array, TokenFigures, dict[str, jax.Array]]:
        """Returns (log-probabilities of the learned tokens [B, T], 0 elsewhere; figures of all
        tokens; router figures).  Dropout acts if there is a key.
        """
        output = model(
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            key=key,
            is_training=key is not None,
        )
        figures = model.token_figures(output.hidden_BTD, batch["targets"])
        return -figures.loss * batch["loss_weights"], figures, output.stats

    def _without_adapters(self, model: Transformer) -> Transformer:
        plain = dataclasses.replace(model.cfg, lora=LoraConfig())
        graph_def, specs = abstract_model(plain, model.mesh)
        params = nnx.to_pure_dict(nnx.split(model)[1])
        return nnx.merge(graph_def, part_like(params, specs))

    def _sums(
        self,
        log_probs_BT: jax.Array,
        reference_BT: jax.Array,
        figures: TokenFigures,
        batch: dict[str, jax.Array],
    ) -> dict[str, jax.Array]:
        """Returns sums over the pairs, or over the tokens of one side (`_TOTAL`)."""
        cfg, is_pair_BQ = self.config.objective.dpo, batch["is_pair"]
        # Token by token, so that equal policies have a ratio of exactly 0 in whatever order it is
        # added up.
        ratio_BQ2 = _per_answer(log_probs_BT - reference_BT, batch)
        log_probs_BQ2 = _per_answer(log_probs_BT, batch)
        rewards_BQ2 = cfg.beta * ratio_BQ2
        margin_BQ = rewards_BQ2[..., 0] - rewards_BQ2[..., 1]
        length_BQ2 = jnp.maximum(_per_answer(batch["loss_weights"], batch), 1.0)
        loss_BQ = preference_loss(cfg, ratio_BQ2, length_BQ2)
        chosen_BT, rejected_BT = (batch["loss_weights"] * _is_side(batch, side) for side in (0, 1))

        def of_pairs(a_BQ):
            return (a_BQ * is_pair_BQ).sum()

        return {
            "loss": of_pairs(loss_BQ),
            "nll_loss": (figures.loss * chosen_BT).sum(),
            "rewards/chosen": of_pairs(rewards_BQ2[..., 0]),
            "rewards/rejected": of_pairs(rewards_BQ2[..., 1]),
            "rewards/accuracies": of_pairs((margin_BQ > 0).astype(jnp.float32)),
            "rewards/margins": of_pairs(margin_BQ),
            "logps/chosen": of_pairs(log_probs_BQ2[..., 0]),
            "logps/rejected": of_pairs(log_probs_BQ2[..., 1]),
            "logits/chosen": (figures.mean_logit * chosen_BT).sum(),
            "logits/rejected": (figures.mean_logit * rejected_BT).sum(),
            "mean_token_accuracy": (figures.is_top * chosen_BT).sum(),
        }


# What a sum of `Dpo._sums` is divided by, if not by the number of pairs.
_TOTAL = {
    "nll_loss": "chosen",
    "logits/chosen": "chosen",
    "logits/rejected": "rejected",
    "mean_token_accuracy": "chosen",
}


def preference_loss(cfg: DpoConfig, ratio_BQ2: jax.Array, length_BQ2: jax.Array) -> jax.Array:
    """Returns the loss of each pair, float32 [B, Q].

    Args:
      cfg: names the loss.
      ratio_BQ2: log-probability of the policy over that of the reference, of chosen and rejected.
      length_BQ2: their tokens.
    """
    if cfg.loss == "ipo":
        per_token_BQ2 = ratio_BQ2 / length_BQ2
        return (per_token_BQ2[..., 0] - per_token_BQ2[..., 1] - 1 / (2 * cfg.beta)) ** 2
    margin_BQ = cfg.beta * (ratio_BQ2[..., 0] - ratio_BQ2[..., 1])
    if cfg.loss == "hinge":
        return jax.nn.relu(1 - margin_BQ)
    smoothing = cfg.label_smoothing
    loss_BQ = -(1 - smoothing) * jax.nn.log_sigmoid(margin_BQ)
    return loss_BQ - smoothing * jax.nn.log_sigmoid(-margin_BQ) if smoothing else loss_BQ


def _is_side(batch: dict[str, jax.Array], side: int) -> jax.Array:
    """float32 [B, T]: 1 for tokens of the chosen (side 0) or rejected answers."""
    segment_BT = batch["segment_ids"]
    return ((segment_BT > 0) & ((segment_BT - 1) % 2 == side)).astype(jnp.float32)


def _per_answer(a_BT: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns the sums over the segments of each row, [B, Q, 2]."""
    num_pairs = batch["is_pair"].shape[1]
    segments = jnp.arange(1, 2 * num_pairs + 1)
    is_in_BTS = (batch["segment_ids"][..., None] == segments).astype(a_BT.dtype)
    sums_BS = jnp.einsum("BT,BTS->BS", a_BT, is_in_BTS, precision="highest")
    return sums_BS.reshape(-1, num_pairs, 2)


def _places(source: str, workdir: str, name: str) -> list[Path]:
    """Where a file beside the data may be, the best first: a URL, or a folder that cannot be
    written to, leaves the workdir.
    """
    folders = [source if os.path.isdir(source) else os.path.dirname(source)]
    return [Path(folder, name) for folder in [*folders * ("://" not in source), workdir]]


def _read_first(paths: list[Path]) -> np.ndarray | None:
    return next((np.load(path) for path in paths if path.is_file()), None)


def _write_first(paths: list[Path], array: np.ndarray) -> None:
    """Writes to the first path that can be written to."""
    data = io.BytesIO()
    np.save(data, array)
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data.getvalue())
        except OSError:
            if path == paths[-1]:
                raise
        else:
            return
