"""The model without its numbers."""

import functools
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.params.abstract import abstract_module


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
    return abstract_module(lambda: Transformer(cfg, mesh, jax.random.key(0)), mesh)
