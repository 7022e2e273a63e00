"""The model without its numbers."""

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
    return abstract_module(lambda: Transformer(cfg, mesh, jax.random.key(0)), mesh)
