"""Spark feed-forward layer: a token activates few neurons, chosen by a statistical top-k.

    y = W_down (gelu(soft_top_k(W_predict x[:p])) * (W_up x[p:]))

The first p entries of a token predict which neurons matter, the other u = D - p say what they
compute (Spark Transformer, arXiv 2506.06644, section 3.2).  Three matrices of [p, F], [F, u] and
[F, D] hold 2 D F parameters, as many as a SwiGLU layer of 2 F / 3 neurons.
Letters: B batch, T tokens, D model, p predictor entries, u the other entries, F neurons on this
shard, b neurons of a tile, L layers.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.linear import linear
from hunyuan_jax.layers.statistical_top_k import threshold
from hunyuan_jax.parallel import island
from hunyuan_jax.params import declare as params

_ROWS = ("batch", "seq", "embed")
_TILE = 128  # active neurons that `outputs_of_active` multiplies at a time
_FEW_TOKENS = 4  # up to which reading active neurons token by token is faster


class SparkMlp(nnx.Module):
    """Holds W_predict, W_up and W_down; see the module's docstring."""

    attribute = "spark"

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array):
        D, F, p = cfg.hidden_size, cfg.intermediate_size, cfg.predictor_width
        predict_key, up_key, down_key = jax.random.split(key, 3)
        self.cfg = cfg
        self.mesh = mesh

        def matrix(key, shape, *dims):
            return params.param(shape, dims, params.normal(key, cfg.init_std), params.Role.MATRIX)

        self.w_predict_pF = matrix(predict_key, (p, F), "embed", "ffn")
        self.w_up_Fu = matrix(up_key, (F, D - p), "ffn", "embed")
        self.w_down_FD = matrix(down_key, (F, D), "ffn", "embed")

    def __call__(
        self, y_BTD: jax.Array, is_valid_BT: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """([B, T, D] in y's dtype, figures).

        The figures are float32 sums over tokens that are no padding: `active`, the share of the
        neurons that a token activates; `tokens`, 1 for each.
        """
        del key
        weights, dims = params.declared(self)

        def fn(weights, y_BTD, is_valid_BT):
            w = {
                name: island.gather_param(weights[name], dims[name], y_BTD.dtype)
                for name in weights
            }
            active_BTF = active_neurons(w["w_predict_pF"], y_BTD, self.cfg)
            out_BTD = island.reduce_sum(self.outputs(w, y_BTD, active_BTF), "ffn")
            count_BT = island.reduce_sum((active_BTF > 0).sum(-1), "ffn")
            return out_BTD, jnp.where(is_valid_BT, count_BT, 0).sum(-1).astype(jnp.float32)

        in_dims, out_dims = (_ROWS, ("batch", "seq")), (_ROWS, ("routing_groups",))
        run = island.island(fn, self.mesh, dims, in_dims, out_dims)
        out_BTD, count_B = run(weights, y_BTD, is_valid_BT)
        num_tokens = is_valid_BT.sum().astype(jnp.float32)
        return out_BTD, {
            "active": count_B.sum() / self.cfg.intermediate_size,
            "tokens": num_tokens,
        }

    @staticmethod
    def outputs(w: dict[str, jax.Array], y_BTD: jax.Array, active_BTF: jax.Array) -> jax.Array:
        """W_down (gelu(active) * (W_up y[p:])) [B, T, D] with all neurons of this shard."""
        num_others = w["w_up_Fu"].shape[1]
        up_BTF = linear(y_BTD[..., -num_others:], w["w_up_Fu"].T)
        return linear(jax.nn.gelu(active_BTF).astype(up_BTF.dtype) * up_BTF, w["w_down_FD"])

    @staticmethod
    def metrics(figures: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """{"layers/active_share_L": share of the neurons that a token activates}."""
        active_L, tokens_L = (figures[name].reshape(-1) for name in ("active", "tokens"))
        return {"layers/active_share_L": active_L / jnp.maximum(tokens_L, 1.0)}


class SparseSparkMlp(SparkMlp):
    """As `SparkMlp`, for few tokens on one shard: reads the weights of active neurons only."""

    @staticmethod
    def outputs(w: dict[str, jax.Array], y_BTD: jax.Array, active_BTF: jax.Array) -> jax.Array:
        """As `SparkMlp.outputs`."""
        if y_BTD.shape[0] * y_BTD.shape[1] > _FEW_TOKENS:
            return SparkMlp.outputs(w, y_BTD, active_BTF)
        y_MD = y_BTD.reshape(-1, y_BTD.shape[-1])
        active_MF = active_BTF.reshape(len(y_MD), -1)
        rows = [
            outputs_of_active(w["w_up_Fu"], w["w_down_FD"], y_D, active_F)
            for y_D, active_F in zip(y_MD, active_MF, strict=True)
        ]
        return jnp.stack(rows).reshape(y_BTD.shape)


def active_neurons(w_predict_pF: jax.Array, y_BTD: jax.Array, cfg: ModelConfig) -> jax.Array:
    """soft_top_k of the predicted scores, float32 [B, T, F]: 0 where a neuron is not active.

    Runs inside an island: mean and standard deviation are those of all shards' neurons.
    """
    score_BTF = linear(y_BTD[..., : len(w_predict_pF)], w_predict_pF).astype(jnp.float32)
    sums = (score_BTF.sum(-1, keepdims=True), (score_BTF * score_BTF).sum(-1, keepdims=True))
    sums = (island.reduce_sum(total, "ffn") for total in sums)
    limit = threshold(*sums, cfg.intermediate_size, cfg.spark.neuron_share)
    return jnp.maximum(score_BTF - limit, 0.0)


def outputs_of_active(
    w_up_Fu: jax.Array, w_down_FD: jax.Array, y_D: jax.Array, active_F: jax.Array
) -> jax.Array:
    """`SparkMlp.outputs` [D] of one token; work is proportional to its active neurons.

    Their rows are gathered a tile at a time, in a loop that ends with the last active neuron.
    """
    F, num_others = w_up_Fu.shape
    y_u = y_D[-num_others:]
    is_active_F = active_F > 0
    rank_F = jnp.where(is_active_F, jnp.cumsum(is_active_F) - 1, F + _TILE)
    neuron_F = jnp.arange(F, dtype=jnp.int32)
    # The numbers of the active neurons, then filling.
    active_R = jnp.zeros(F + _TILE, jnp.int32).at[rank_F].set(neuron_F, mode="drop")
    num_active = is_active_F.sum()

    def add_tile(i, sum_D):
        neuron_b = jax.lax.dynamic_slice_in_dim(active_R, i * _TILE, _TILE)
        is_used_b = i * _TILE + jnp.arange(_TILE) < num_active
        gate_b = jnp.where(is_used_b, jax.nn.gelu(active_F[neuron_b]), 0.0).astype(y_D.dtype)
        h_b = gate_b * (w_up_Fu[neuron_b].astype(y_D.dtype) @ y_u)
        return sum_D + h_b @ w_down_FD[neuron_b].astype(y_D.dtype)

    return jax.lax.fori_loop(0, -(-num_active // _TILE), add_tile, jnp.zeros_like(y_D))
