"""Dtypes of the parameters in a train state and in its checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig, StateDtype
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.parallel import rules
from hunyuan_jax.params.abstract import structs
from hunyuan_jax.params.tree import join, split
from hunyuan_jax.quant.array import is_quantized
from hunyuan_jax.quant.scaled import Scaled, is_scaled, store_params


def stored_params(
    params: dict[str, Any], specs: dict[str, Any], compute_dtype: str, state_dtype: StateDtype
) -> dict[str, Any]:
    """Returns the parameters as a train state holds them.

    Trained parameters are master weights in `state_dtype`.  Parameters that are not trained have
    the dtype in which the model computes with them, or are QuantArrays and stay so.

    Args:
      params: nested dict of arrays.
      specs: nested dict of their `ParamSpec`s.
      compute_dtype: config.model.dtype.
      state_dtype: config.optimizer.state_dtype.
    """
    (trained, frozen), (trained_specs, frozen_specs) = (
        split(tree, specs) for tree in (params, specs)
    )
    trained = jax.tree.map(lambda a: a.astype(jnp.float32), trained)
    frozen = jax.tree.map(
        lambda a, spec: a if is_quantized(a) else a.astype(spec.dtype_in_use(compute_dtype)),
        frozen,
        frozen_specs,
        is_leaf=is_quantized,
    )
    return join(frozen, store_params(trained, trained_specs, state_dtype))


def abstract_stored_params(
    cfg: ModelConfig, mesh: Mesh, state_dtype: StateDtype
) -> dict[str, Any]:
    """Returns shapes, dtypes and shardings of `stored_params`, to restore into."""
    _, specs = abstract_model(cfg, mesh)
    stored = jax.eval_shape(
        lambda params: stored_params(params, specs, cfg.dtype, state_dtype), structs(specs)
    )

    def place(leaf, sharding):
        if not is_scaled(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return Scaled(place(leaf.value, sharding), place(leaf.inv_scale, rules.sharding(mesh, ())))

    return jax.tree.map(
        lambda leaf, spec: place(leaf, spec.sharding), stored, specs, is_leaf=is_scaled
    )
