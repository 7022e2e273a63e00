"""Multi-token prediction: one more layer, which predicts the token after the next (docs/model.md).

Letters: B batch, T tokens, D model, X = 2 D.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.linear import linear
from hunyuan_jax.layers.norm import RmsNorm
from hunyuan_jax.parallel import island
from hunyuan_jax.params import declare as params

_ROWS = ("batch", "seq", "embed")


class Mtp(nnx.Module):
    """What stands before and after the layer: the norms of both inputs, the projection of their
    concatenation, and the final norm.  Embedding and head are the model's.
    """

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array):
        D = cfg.hidden_size
        self.mesh = mesh
        self.embed_norm = RmsNorm(D, cfg.rms_norm_eps)
        self.hidden_norm = RmsNorm(D, cfg.rms_norm_eps)
        self.w_XD = params.param(
            (2 * D, D),
            ("mtp_in", "mtp_out"),
            params.normal(key, cfg.init_std),
            params.Role.MATRIX,
        )
        self.final_norm = RmsNorm(D, cfg.rms_norm_eps)

    def join(
        self, next_BTD: jax.Array, hidden_BTD: jax.Array, positions_BT: jax.Array
    ) -> jax.Array:
        """The layer's input [B, T, D].

        Args:
          next_BTD: embedding of the token after each; at position 0 zeros take its place, as in
            vLLM.
          hidden_BTD: the model's output after its final norm.
          positions_BT: int32.
        """
        next_BTD = jnp.where(positions_BT[..., None] == 0, jnp.zeros_like(next_BTD), next_BTD)
        both_BTX = jnp.concatenate(
            [self.embed_norm(next_BTD), self.hidden_norm(hidden_BTD)], axis=-1
        )
        weights, logical = params.declared(self)

        def fn(weights, both_BTX):
            w = weights["w_XD"], logical["w_XD"], both_BTX.dtype
            return linear(both_BTX, island.gather_matrix(*w, num_in=1))

        return island.island(fn, self.mesh, logical, (_ROWS,), _ROWS)(weights, both_BTX)
