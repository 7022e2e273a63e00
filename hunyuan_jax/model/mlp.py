"""SwiGLU MLP: the dense layer's and the shared expert's.

Letters: B batch, T tokens, M = B * T, D model, F ffn.
"""

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.model import params
from hunyuan_jax.model.kernels import kernel_options
from hunyuan_jax.parallel import island
from pallas_kernels import expert_matmul

_ACTIVATIONS = ("batch", "seq", "embed")


class Mlp(nnx.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array, width: int = 1):
        """With `width` times the model's ffn columns."""
        D, F, std = cfg.hidden_size, cfg.intermediate_size * width, cfg.init_std
        gate, up, down = jax.random.split(key, 3)
        self.cfg = cfg
        self.mesh = mesh
        self.w_gate_DF = params.normal(gate, (D, F), ("embed", "ffn"), std)
        self.w_up_DF = params.normal(up, (D, F), ("embed", "ffn"), std)
        self.w_down_FD = params.normal(down, (F, D), ("ffn", "embed"), std)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] in x's dtype."""
        weights, logical = params.declared(self)
        kernels = kernel_options(self.cfg, self.mesh)

        def fn(weights, x_BTD):
            return island.reduce_sum(serve(weights, x_BTD, kernels), "ffn")

        return island.island(fn, self.mesh, logical, (_ACTIVATIONS,), _ACTIVATIONS)(weights, x_BTD)


def serve(weights: dict[str, jax.Array], x_BTD: jax.Array, kernels: dict[str, Any]) -> jax.Array:
    """The MLP on one shard's tokens and with its part of F: partial sums [B, T, D].  Runs inside an island.

    Args:
      weights: the parameters of `Mlp` by name, as stored.
      x_BTD: activations.
      kernels: of `kernel_options`.
    """

    def whole(name, logical):
        return island.whole_in_tiles(weights[name], logical, x_BTD.dtype, tiled="ffn")

    # Zeros that fill up F give zeros in between, and nothing in the end.
    w_gate_DF, w_up_DF, w_down_FD = (
        whole("w_gate_DF", ("embed", "ffn")),
        whole("w_up_DF", ("embed", "ffn")),
        whole("w_down_FD", ("ffn", "embed")),
    )
    # One expert that serves all rows.
    x_1MD = x_BTD.reshape(1, -1, x_BTD.shape[-1])
    return expert_matmul.swiglu(x_1MD, None, None, w_gate_DF[None], w_up_DF[None], w_down_FD[None], **kernels).reshape(x_BTD.shape)
