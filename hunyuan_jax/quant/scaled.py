"""Tensors in few bits with power-of-two scales, and which parameters of `state_dtype = "fp8_lm"`
are kept so.

FP8-LM (arXiv 2310.18313) stores a master weight in float16 and
Adam's moments in float8 and float16, each tensor with one scale.  "One tensor" is one layer's
here, and one expert's: a stacked parameter [P, ...] has P scales, the routed experts [P, E, ...]
have P * E, embedding and head have one.  Letters: P CLA groups, E experts.

Two parts of the paper have nothing to do on this mesh.  Its greedy placement (Algorithm 1)
balances ranks that each hold whole tensors; every tensor is split evenly over the mesh here, so
all shards are equal already.  Its shared minimum of the scales makes the ranks' float8 gradients
comparable; gradients are not float8 here, and a maximum over a sharded tensor under jit is one
over all shards (XLA adds the all-reduce), so each has the same scale.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hunyuan_jax.config import StateDtype

_MAX_EXPONENT = 126  # 2**126 and its inverse are both normal float32 numbers


class Scaled(NamedTuple):
    """The tensor value * inv_scale, where inv_scale is repeated over the trailing dims of value.

    value: float16 or float8_e4m3fn; inv_scale: float32 powers of two, of shape [], [P] or [P, E],
    the leading dims of value.
    """

    value: jax.Array
    inv_scale: jax.Array


def quantize(x: jax.Array, dtype: jax.typing.DTypeLike, old_inv_scale: jax.Array) -> Scaled:
    """The float32 tensor x in `dtype`, with fresh scales; as many leading dims have a scale each
    as old_inv_scale has dims.

    The scale is 2**floor(log2(largest number of dtype / amax)), so that amax lands in the top
    binade; where amax is 0 or not finite, the old one is kept (MS-AMP).  Rounds to nearest, but
    towards zero below the smallest normal number: there a moment that decays by a tenth would
    round back to where it was and never reach zero.
    """
    amax = jnp.max(jnp.abs(x), axis=tuple(range(old_inv_scale.ndim, x.ndim)))
    inv_scale = jnp.where(
        jnp.isfinite(amax) & (amax > 0), _inverse_scale(amax, dtype), old_inv_scale
    )
    scaled = x * _over_trailing_dims(1.0 / inv_scale, x)
    smallest, smallest_normal = (
        float(getattr(jnp.finfo(dtype), name))
        for name in ("smallest_subnormal", "smallest_normal")
    )
    scaled = jnp.where(
        jnp.abs(scaled) < smallest_normal, jnp.trunc(scaled / smallest) * smallest, scaled
    )
    return Scaled(scaled.astype(dtype), inv_scale)


def dequantize(scaled: Scaled, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The tensor in `dtype`; exact in float32."""
    x = scaled.value.astype(jnp.float32) * _over_trailing_dims(scaled.inv_scale, scaled.value)
    return x.astype(dtype)


def store_params(
    params: dict[str, Any], specs: dict[str, Any], state_dtype: StateDtype
) -> dict[str, Any]:
    """Fresh float32 parameters as the train state keeps them: in "fp8_lm" each matrix is a Scaled
    float16, otherwise unchanged.

    Args:
      params: nested dict of arrays.
      specs: the same of their `ParamSpec`s, whose `num_scale_dims` decide.
      state_dtype: of the train state.
    """
    if state_dtype != "fp8_lm":
        return params

    def store(param, spec):
        if spec.num_scale_dims is None:
            return param
        old_inv_scale = jnp.ones(param.shape[: spec.num_scale_dims], jnp.float32)
        return quantize(param, jnp.float16, old_inv_scale)

    return jax.tree.map(store, params, specs)


def load_params(
    params: dict[str, Any], dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, Any]:
    """Inverse of `store_params`: plain arrays, matrices that were Scaled in `dtype`, all others as
    they are.

    The model casts its matrices to its own dtype anyway: with that dtype here there is no float32
    copy, and gradients have it too.
    """
    return jax.tree.map(
        lambda leaf: dequantize(leaf, dtype) if is_scaled(leaf) else leaf,
        params,
        is_leaf=is_scaled,
    )


def is_scaled(leaf: Any) -> bool:
    """For `is_leaf` of jax.tree functions."""
    return isinstance(leaf, Scaled)


def _inverse_scale(amax: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """amax / dtype's largest number, rounded up to a power of two; exact, where a float32 log2 is
    not.  For amax positive and finite.
    """
    max_mantissa, max_exponent = jnp.frexp(jnp.float32(jnp.finfo(dtype).max))
    mantissa, exponent = jnp.frexp(amax)
    inverse_exponent = exponent - max_exponent + (mantissa > max_mantissa).astype(jnp.int32)
    return jnp.ldexp(jnp.float32(1.0), jnp.clip(inverse_exponent, -_MAX_EXPONENT, _MAX_EXPONENT))


def _over_trailing_dims(scale: jax.Array, x: jax.Array) -> jax.Array:
    return scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))
