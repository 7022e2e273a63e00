"""SwiGLU MLP: the dense layer's and the shared expert's."""

import jax
from flax import nnx

from hunyuan_jax.model import params


class Mlp(nnx.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int, std: float, key: jax.Array):
        gate, up, down = jax.random.split(key, 3)
        self.w_gate_DF = params.normal(gate, (hidden_size, intermediate_size), ("embed", "ffn"), std)
        self.w_up_DF = params.normal(up, (hidden_size, intermediate_size), ("embed", "ffn"), std)
        self.w_down_FD = params.normal(down, (intermediate_size, hidden_size), ("ffn", "embed"), std)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtype = x_BTD.dtype
        gate_BTF = x_BTD @ self.w_gate_DF[...].astype(dtype)
        up_BTF = x_BTD @ self.w_up_DF[...].astype(dtype)
        return (jax.nn.silu(gate_BTF) * up_BTF) @ self.w_down_FD[...].astype(dtype)
