"""SwiGLU MLP: the dense layer's and the shared expert's.

Letters: B batch, T tokens, M = B * T, D model, F ffn.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import LoraConfig, ModelConfig
from hunyuan_jax.layers import lora
from hunyuan_jax.layers.ffn.moe import experts
from hunyuan_jax.layers.kernels import kernel_options
from hunyuan_jax.layers.linear import linear
from hunyuan_jax.parallel import island
from hunyuan_jax.params import declare as params
from hunyuan_jax.quant.array import is_quantized
from pallas_kernels import expert_matmul

_ACTIVATIONS = ("batch", "seq", "embed")
_TARGETS = ("gate", "up", "down")


class Mlp(nnx.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    attribute = "mlp"

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array, width: int = 0):
        """`width` columns; 0 = those of the model's MLP."""
        D, F, std = cfg.hidden_size, width or cfg.intermediate_size, cfg.init_std
        gate, up, down = jax.random.split(key, 3)
        self.cfg = cfg
        self.mesh = mesh

        def matrix(key, shape, *dims):
            return params.param(shape, dims, params.normal(key, std), params.Role.MATRIX)

        self.w_gate_DF = matrix(gate, (D, F), "embed", "ffn")
        self.w_up_DF = matrix(up, (D, F), "embed", "ffn")
        self.w_down_FD = matrix(down, (F, D), "ffn", "embed")
        lora.declare(self, cfg, jax.random.fold_in(key, 3))

    def __call__(
        self, x_BTD: jax.Array, is_valid_BT: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """([B, T, D] in x's dtype, no figures)."""
        del is_valid_BT, key
        weights, logical = params.declared(self)
        kernels = kernel_options(self.cfg, self.mesh)

        def fn(weights, x_BTD):
            return island.reduce_sum(serve(weights, logical, x_BTD, kernels, self.cfg.lora), "ffn")

        out = island.island(fn, self.mesh, logical, (_ACTIVATIONS,), _ACTIVATIONS)(weights, x_BTD)
        return out, {}

    @staticmethod
    def metrics(figures: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Nothing to log."""
        return figures


def serve(
    weights: dict[str, jax.Array],
    dims: dict[str, tuple[str, ...]],
    x_BTD: jax.Array,
    kernels: dict[str, Any],
    lora_cfg: LoraConfig,
) -> jax.Array:
    """The MLP on one shard's tokens and with its part of F: partial sums [B, T, D].  Runs inside
    an island.

    Args:
      weights, dims: the parameters of `Mlp` by name, as stored, and the names of their dims.
      x_BTD: activations.
      kernels: of `kernel_options`.
      lora_cfg: of the adapters, if there are any.
    """

    def whole(name):
        if "ffn" not in dims[name]:
            return island.gather_param(weights[name], dims[name], x_BTD.dtype)
        return island.gather_padded(weights[name], dims[name], x_BTD.dtype, tiled="ffn")

    # Zeros that fill up F give zeros in between, and nothing in the end.  One expert that serves
    # all rows.
    projections = tuple(
        lora.adapted(weights, target, lora_cfg, lambda name: whole(name)[None])
        for target in _TARGETS
    )
    x_1MD = x_BTD.reshape(1, -1, x_BTD.shape[-1])
    matrices = [projection.w for projection in projections]
    if any(map(is_quantized, matrices)) and not experts.suits_kernels(matrices):
        gate_IO, up_IO, down_IO = (w[0] for w in matrices)
        h_BTF = jax.nn.silu(linear(x_BTD, gate_IO)) * linear(x_BTD, up_IO)
        return linear(h_BTF, down_IO)
    if any(projection.a is not None for projection in projections):
        y_1MD = experts.swiglu_adapted(
            experts.row_product, x_1MD, jnp.ones(x_1MD.shape[:2]), projections, kernels
        )
    else:
        y_1MD = expert_matmul.swiglu(
            x_1MD, None, None, *map(experts.for_kernels, matrices), **kernels
        )
    return y_1MD.reshape(x_BTD.shape)
