"""Reads the weights that a run starts from (config.train.init_from) and checks their model."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from hunyuan_jax.config import LoraConfig, ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.params import abstract
from hunyuan_jax.weights.open import open_model

# Fields that a run may change.  All others decide what the weights mean.
_FREE = {
    "max_position",
    "attention_dropout",
    "hidden_dropout",
    "init_std",
    "pad_token_id",
    "bos_token_id",
    "eos_token_ids",
}
_FREE |= {"dtype", "remat", "kernels", "lora", "fp32_head", "num_mtp_layers", "mtp_loss_weight"}
_FREE_MOE = {
    "dispatch",
    "capacity_factor",
    "min_capacity",
    "group_size",
    "aux_loss_weight",
    "z_loss_weight",
    "bias_rate",
    "bias_limit",
}


def read_weights(path: str, cfg: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Returns the parameters of a model on the mesh, a nested dict of arrays.

    They are float32 like a run's master weights, or have the dtype of `cfg` if LoRA freezes them.

    Args:
      path: a model folder or its hub id, a converted checkpoint, or a workdir, whose newest
        checkpoint is read.
      cfg: the model that the run trains.
      mesh: that of the run.

    Raises:
      ConfigError: the folder does not exist, or its model differs from `cfg`; the message names
        the first field that differs.
    """
    opened = open_model(path, cfg.dtype if cfg.lora.rank else "float32")
    require_same_model(path, opened.cfg, cfg)
    # A layer of multi-token prediction that one of the two lacks is drawn, or left out.
    stored = {"num_mtp_layers": opened.cfg.num_mtp_layers, "mtp_loss_weight": 0.0}
    plain = dataclasses.replace(cfg, lora=LoraConfig(), **stored)
    params = opened.read(abstract.shardings(abstract_model(plain, mesh)[1]))
    unused = () if cfg.num_mtp_layers else ("mtp", "mtp_groups")
    return {name: tree for name, tree in params.items() if name not in unused}


def require_same_model(path: str, theirs: ModelConfig, ours: ModelConfig) -> None:
    """Raises ConfigError at the first field that gives the weights of `path` another meaning."""
    for prefix, a, b, free in (
        ("", theirs, ours, _free(ours)),
        ("moe.", theirs.moe, ours.moe, _FREE_MOE),
    ):
        for field in dataclasses.fields(a):
            here, there = getattr(b, field.name), getattr(a, field.name)
            if field.name not in free and field.name != "moe" and here != there:
                raise ConfigError(
                    f"config.train.init_from = {path!r} holds a model with {prefix}{field.name} = "
                    f"{there!r}; config.model.{prefix}"
                    f"{field.name} is {here!r}. Set it to {there!r}, or start from other weights."
                )


def _free(cfg: ModelConfig) -> set[str]:
    return _FREE | {
        name
        for name, rope_type in (("rope_alpha", "alpha"), ("rope_factor", "linear"))
        if cfg.rope_type != rope_type
    }
