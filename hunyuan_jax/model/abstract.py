"""The model without its numbers: shapes and where they lie."""

import re
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel import rules


def abstract_model(
    cfg: ModelConfig, mesh: Mesh
) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """(graph_def, shapes, shardings) of the model; nothing is allocated."""
    graph_def, state = nnx.split(nnx.eval_shape(lambda: Transformer(cfg, mesh, jax.random.key(0))))
    shapes = nnx.to_pure_dict(state)
    declared = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    shape_leaves, treedef = jax.tree.flatten_with_path(shapes)

    def sharding(path, shape, param):
        # Stacked parameters have one more dim, the CLA group, than their declaration named.
        logical = param.get_metadata("logical")
        logical = ("layers",) * (len(shape.shape) - len(logical)) + logical
        return rules.stored_sharding(mesh, logical, shape.shape, path_of(path))

    shardings = [
        sharding(path, shape, param)
        for (path, shape), param in zip(shape_leaves, declared, strict=True)
    ]
    return graph_def, shapes, jax.tree.unflatten(treedef, shardings)


def dtype_in_use(path: str, cfg: ModelConfig) -> str:
    """The dtype in which the model multiplies with a parameter: norms, biases and the router stay
    float32.
    """
    return cfg.dtype if re.search(r"/(w|embedding_)[^/]*$", path) else "float32"


def path_of(path: tuple) -> str:
    """A jax tree path as names with slashes between."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
