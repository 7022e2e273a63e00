"""Parameters as a train state and its checkpoints hold them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig, StateDtype
from hunyuan_jax.layers import lora
from hunyuan_jax.model.abstract import abstract_model, dtype_in_use, path_of
from hunyuan_jax.parallel import rules
from hunyuan_jax.quant.scaled import Scaled, is_scaled, store_params


def stored_params(
    params: dict[str, Any], cfg: ModelConfig, state_dtype: StateDtype
) -> dict[str, Any]:
    """Master weights of what is trained, in `state_dtype`; what LoRA freezes in the dtype in which
    the model uses it.
    """
    trained, frozen = lora.split(params, cfg)
    trained = store_params(jax.tree.map(lambda a: a.astype(jnp.float32), trained), state_dtype)
    frozen = jax.tree.map_with_path(
        lambda path, a: a.astype(dtype_in_use(path_of(path), cfg)), frozen
    )
    return lora.join(frozen, trained)


def abstract_stored_params(
    cfg: ModelConfig, mesh: Mesh, state_dtype: StateDtype
) -> dict[str, Any]:
    """Shapes, dtypes and shardings of `stored_params`: the target of a restore."""
    _, shapes, shardings = abstract_model(cfg, mesh)
    stored = jax.eval_shape(lambda params: stored_params(params, cfg, state_dtype), shapes)

    def place(leaf, sharding):
        if not is_scaled(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return Scaled(place(leaf.value, sharding), place(leaf.inv_scale, rules.sharding(mesh, ())))

    return jax.tree.map(place, stored, shardings, is_leaf=is_scaled)
