"""Products of activations with weights."""

import jax
from jax.ad_checkpoint import checkpoint_name

from hunyuan_jax.quant.array import QuantArray, is_quantized, product


def linear(x_BTI: jax.Array, w_IO: jax.Array | QuantArray) -> jax.Array:
    """[B, T, O] in x's dtype.

    Written as one product of two matrices: with [B, T] left apart, XLA:CPU takes twice as long for
    the weight gradient.
    """
    x_MI = x_BTI.reshape(-1, x_BTI.shape[-1])
    y_MO = product(x_MI, w_IO) if is_quantized(w_IO) else x_MI @ w_IO.astype(x_BTI.dtype)
    return checkpoint_name(y_MO.reshape(*x_BTI.shape[:-1], -1), "product")
