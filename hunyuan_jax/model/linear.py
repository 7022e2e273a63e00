"""Matrix products of activations with weights, and the SwiGLU that dense layers, shared and routed experts have in common."""

import math
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name


def linear(x: jax.Array, w: jax.Array, num_in: int = 1) -> jax.Array:
    """Contracts the last num_in dims of x with the first num_in dims of w, in x's dtype: [*batch, *in] x [*in, *out] -> [*batch, *out].

    Written as one product of two matrices: with [B, T] left apart, XLA:CPU takes twice as long for the weight gradient.
    """
    batch, num_rows = x.shape[: x.ndim - num_in], math.prod(w.shape[:num_in])
    y = x.reshape(-1, num_rows) @ w.astype(x.dtype).reshape(num_rows, -1)
    return checkpoint_name(y.reshape(*batch, *w.shape[num_in:]), "product")


def swiglu(
    x: jax.Array, product: Callable[[jax.Array, jax.Array], jax.Array], w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array
) -> jax.Array:
    """down(silu(gate(x)) * up(x)), where product(x, w) multiplies rows with weights.

    Only x and the two products are kept for the backward pass; the cheap rest is computed again there.
    """

    def fn(x, w_gate, w_up, w_down):
        gate, up = checkpoint_name(product(x, w_gate), "product"), checkpoint_name(product(x, w_up), "product")
        return product(jax.nn.silu(gate) * up, w_down)

    return jax.checkpoint(fn, policy=jax.checkpoint_policies.save_only_these_names("product"))(x, w_gate, w_up, w_down)
