"""Weights that a run starts from (config.train.init_from): read, and compared with the model that
the run is to train.
"""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from hunyuan_jax.config import LoraConfig, ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import user_path
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.params import abstract
from hunyuan_jax.weights.open import open_model

# How the model is computed, trained and ended: a run may choose these anew.  Everything else
# decides what the weights mean.
_FREE = {
    "max_position",
    "attention_dropout",
    "hidden_dropout",
    "init_std",
    "pad_token_id",
    "bos_token_id",
    "eos_token_ids",
}
_FREE |= {"dtype", "remat", "kernels", "lora"}
_FREE_MOE = {
    "dispatch",
    "capacity_factor",
    "min_capacity",
    "group_size",
    "aux_loss_weight",
    "z_loss_weight",
}


def read_weights(path: str, cfg: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """The parameters of a model folder, a converted checkpoint or the newest checkpoint of a
    workdir, a nested dict of arrays.

    They are on the mesh: float32, as a run's master weights are, or in the dtype of `cfg` where
    LoRA freezes them.

    Raises:
      ConfigError: no such folder, or another model than `cfg`, naming the first field that
        differs.
    """
    path = user_path(path)
    opened = open_model(path, cfg.dtype if cfg.lora.rank else "float32")
    require_same_model(path, opened.cfg, cfg)
    plain = dataclasses.replace(cfg, lora=LoraConfig())
    return opened.read(abstract.shardings(abstract_model(plain, mesh)[1]))


def require_same_model(path: str, theirs: ModelConfig, ours: ModelConfig) -> None:
    """Raises ConfigError at the first field in which the weights of `path` mean something else
    than those of `ours`.
    """
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
