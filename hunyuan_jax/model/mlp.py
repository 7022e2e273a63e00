"""SwiGLU MLP: the dense layer's and the shared expert's."""

import jax
from flax import nnx

from hunyuan_jax.model import params
from hunyuan_jax.model.linear import linear, swiglu


class Mlp(nnx.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int, std: float, key: jax.Array):
        gate, up, down = jax.random.split(key, 3)
        self.w_gate_DF = params.normal(gate, (hidden_size, intermediate_size), ("embed", "ffn"), std)
        self.w_up_DF = params.normal(up, (hidden_size, intermediate_size), ("embed", "ffn"), std)
        self.w_down_FD = params.normal(down, (intermediate_size, hidden_size), ("ffn", "embed"), std)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] in x's dtype."""
        return swiglu(x_BTD, linear, self.w_gate_DF[...], self.w_up_DF[...], self.w_down_FD[...])
