"""Converts a train state from one `optimizer.state_dtype` to another."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hunyuan_jax.config import StateDtype
from hunyuan_jax.optim.build import Optimizer, QuantizedState
from hunyuan_jax.quant.scaled import is_scaled, load_params, quantize, store_params


def convert_state(
    params: Any, specs: Any, opt_state: Any, state_dtype: StateDtype, optimizer: Optimizer
) -> tuple[Any, Any]:
    """Returns (params, opt_state) in the layout of `optimizer`.

    Each number is rounded once, as if it had just been computed.  Conversion to a wider dtype and
    back is the identity, except that float8 gets new scales.

    Args:
      params: made by any optimizer of `build_optimizer`.
      specs: the parameters' `ParamSpec`s.
      opt_state: made by the same optimizer as params.
      state_dtype: that of `optimizer`.
      optimizer: the target.
    """
    count, mu, nu = _moments(opt_state)
    params = store_params(load_params(params), specs, state_dtype)
    fresh = optimizer.init(params)
    if isinstance(fresh, QuantizedState):
        return params, QuantizedState(
            count, _stored(fresh.mu, mu), _stored(fresh.root_nu, jax.tree.map(jnp.sqrt, nu))
        )

    def fill(part):
        if isinstance(part, optax.ScaleByAdamState):
            return optax.ScaleByAdamState(
                count, *(optax.tree.cast(moment, jnp.dtype(state_dtype)) for moment in (mu, nu))
            )
        return (
            optax.ScaleByScheduleState(count)
            if isinstance(part, optax.ScaleByScheduleState)
            else part
        )

    return params, jax.tree.map(fill, fresh, is_leaf=_is_filled)


def _moments(opt_state: Any) -> tuple[jax.Array, Any, Any]:
    """Returns (int32 steps done, first moments, second moments); the moments are float32."""
    if isinstance(opt_state, QuantizedState):
        return (
            opt_state.count,
            load_params(opt_state.mu),
            jax.tree.map(jnp.square, load_params(opt_state.root_nu)),
        )
    (adam,) = (
        part
        for part in jax.tree.leaves(opt_state, is_leaf=_is_filled)
        if isinstance(part, optax.ScaleByAdamState)
    )
    return adam.count, *(optax.tree.cast(moment, jnp.float32) for moment in (adam.mu, adam.nu))


def _stored(fresh: Any, values: Any) -> Any:
    """Returns the float32 arrays `values` in the dtypes of `fresh`."""
    return jax.tree.map(
        lambda old, x: quantize(x, old.value.dtype, old.inv_scale) if is_scaled(old) else x,
        fresh,
        values,
        is_leaf=is_scaled,
    )


def _is_filled(part: Any) -> bool:
    return isinstance(part, optax.ScaleByAdamState | optax.ScaleByScheduleState)
