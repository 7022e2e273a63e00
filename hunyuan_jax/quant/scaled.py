"""Low-precision tensors with power-of-two scales, used by `state_dtype = "fp8_lm"`.

FP8-LM (arXiv 2310.18313) stores a master weight in float16 and Adam's moments in float8 and
float16, with one scale per tensor.  Here each layer and each expert has its own scale: a stacked
parameter [P, ...] has P scales, the routed experts [P, E, ...] have P * E, embedding and head have
one.  Letters: P CLA groups, E experts.

Two parts of the paper are not needed here.  Its greedy placement (Algorithm 1) balances ranks that
hold whole tensors; here every tensor is split evenly over the mesh.  Its shared minimum of the
scales makes the ranks' float8 gradients comparable; here gradients are not float8.  Under jit a
maximum over a sharded tensor is over all shards (XLA adds the all-reduce), so all shards have the
same scale.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hunyuan_jax.config import StateDtype
from hunyuan_jax.quant.array import dequantized, is_quantized

_MAX_EXPONENT = 126  # 2**126 and its inverse are both normal float32 numbers


class Scaled(NamedTuple):
    """The tensor value * inv_scale, with inv_scale broadcast over the trailing dims of value.

    value: float16 or float8_e4m3fn.
    inv_scale: float32 powers of two, of shape [], [P] or [P, E], the leading dims of value.
    """

    value: jax.Array
    inv_scale: jax.Array


def quantize(x: jax.Array, dtype: jax.typing.DTypeLike, old_inv_scale: jax.Array) -> Scaled:
    """Returns the float32 tensor x in `dtype`, with new scales.

    The scale is 2**floor(log2(largest number of dtype / amax)), so amax is in the top binade.  If
    amax is 0 or not finite, the old scale is kept (MS-AMP).  Rounds to nearest, but towards zero
    below the smallest normal number: a moment there that decays by a tenth would round back to
    itself and never reach zero.

    Args:
      x: float32.
      dtype: float16 or float8_e4m3fn.
      old_inv_scale: its shape is the leading dims of x that have a scale each.
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
    """Returns the tensor in `dtype`; exact in float32."""
    x = scaled.value.astype(jnp.float32) * _over_trailing_dims(scaled.inv_scale, scaled.value)
    return x.astype(dtype)


def store_params(
    params: dict[str, Any], specs: dict[str, Any], state_dtype: StateDtype
) -> dict[str, Any]:
    """Returns float32 parameters in the layout of the train state.

    In "fp8_lm" each matrix becomes a Scaled float16.  Otherwise nothing changes.

    Args:
      params: nested dict of arrays.
      specs: nested dict of their `ParamSpec`s; `num_scale_dims` decides what is Scaled.
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
    """Dequantizes what `store_params` made Scaled, and QuantArrays, to `dtype`; other arrays are
    unchanged.

    The model casts its matrices to its own dtype anyway.  Passing that dtype here saves the
    float32 copy, and gradients have that dtype too.
    """

    def dense(leaf):
        if is_scaled(leaf):
            return dequantize(leaf, dtype)
        return dequantized(leaf, dtype) if is_quantized(leaf) else leaf

    return jax.tree.map(dense, params, is_leaf=lambda x: is_scaled(x) or is_quantized(x))


def is_scaled(leaf: Any) -> bool:
    """Whether a leaf is Scaled, for `is_leaf` of jax.tree functions."""
    return isinstance(leaf, Scaled)


def _inverse_scale(amax: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns amax / dtype's largest number, rounded up to a power of two.

    amax must be positive and finite.  The result is exact, which a float32 log2 is not.
    """
    max_mantissa, max_exponent = jnp.frexp(jnp.float32(jnp.finfo(dtype).max))
    mantissa, exponent = jnp.frexp(amax)
    inverse_exponent = exponent - max_exponent + (mantissa > max_mantissa).astype(jnp.int32)
    return jnp.ldexp(jnp.float32(1.0), jnp.clip(inverse_exponent, -_MAX_EXPONENT, _MAX_EXPONENT))


def _over_trailing_dims(scale: jax.Array, x: jax.Array) -> jax.Array:
    return scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))
