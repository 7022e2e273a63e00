"""The model without its numbers."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.params.abstract import ParamSpec, abstract_module
from hunyuan_jax.params.roles import Role


def abstract_model(cfg: ModelConfig, mesh: Mesh) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """(graph_def, nested dict of `ParamSpec`s) of the model; nothing is allocated.

    Raises:
      ConfigError: a dim that does not divide over the mesh.
    """
    graph_def, specs = _abstract_model(cfg, mesh)
    return graph_def, jax.tree.map(lambda spec: spec, specs)


@functools.lru_cache(maxsize=16)
def _abstract_model(cfg: ModelConfig, mesh: Mesh) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """As `abstract_model`, the same dicts for the same arguments: loading asks several times."""
    graph_def, specs = abstract_module(lambda: Transformer(cfg, mesh, jax.random.key(0)), mesh)
    return graph_def, {
        name: jax.tree.map(functools.partial(_with_training, cfg, name), part)
        for name, part in specs.items()
    }


def _with_training(cfg: ModelConfig, name: str, spec: ParamSpec) -> ParamSpec:
    """A parameter's spec, with whether it is trained: only adapters are if there are some, the
    biases that balance experts are not, and multi-token prediction only if its loss has a weight.
    """
    is_trained = spec.role != Role.BALANCE
    if cfg.lora.rank:
        is_trained = spec.role == Role.ADAPTER
    elif name in ("mtp", "mtp_groups"):
        is_trained &= cfg.mtp_loss_weight > 0
    return dataclasses.replace(spec, is_trained=is_trained)
