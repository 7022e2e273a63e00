"""SwiGLU MLP: the dense layer's and the shared expert's.

Letters: B batch, T tokens, M = B * T, D model, F ffn.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.model import params
from hunyuan_jax.model.linear import swiglu
from hunyuan_jax.parallel import island

_ACTIVATIONS = ("batch", "seq", "embed")


class Mlp(nnx.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int, mesh: Mesh, std: float, key: jax.Array):
        gate, up, down = jax.random.split(key, 3)
        self.mesh = mesh
        self.w_gate_DF = params.normal(gate, (hidden_size, intermediate_size), ("embed", "ffn"), std)
        self.w_up_DF = params.normal(up, (hidden_size, intermediate_size), ("embed", "ffn"), std)
        self.w_down_FD = params.normal(down, (intermediate_size, hidden_size), ("ffn", "embed"), std)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] in x's dtype."""
        weights, logical = params.declared(self)

        def fn(weights, x_BTD):
            return island.reduce_sum(serve(weights, x_BTD), "ffn")

        return island.island(fn, self.mesh, logical, (_ACTIVATIONS,), _ACTIVATIONS)(weights, x_BTD)


def serve(weights: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
    """The MLP on one shard's tokens and with its part of F: partial sums [B, T, D].  Runs inside an island.

    Args:
      weights: the parameters of `Mlp` by name, as stored.
      x_BTD: activations.
    """

    def whole(name, logical):
        return island.whole_in_tiles(weights[name], logical, x_BTD.dtype, tiled="ffn")

    # Zeros that fill up F give zeros in between, and nothing in the end.
    w_gate_DF, w_up_DF, w_down_FD = (
        whole("w_gate_DF", ("embed", "ffn")),
        whole("w_up_DF", ("embed", "ffn")),
        whole("w_down_FD", ("ffn", "embed")),
    )
    y_MD = swiglu(jnp.matmul, x_BTD.reshape(-1, x_BTD.shape[-1]), w_gate_DF, w_up_DF, w_down_FD)
    return y_MD.reshape(x_BTD.shape)
