"""Between tokens and the residual stream: the embedding's lookup, and the logits.

Letters: B batch, T tokens, M = B * T, D model, d = D / shards in storage, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.parallel import island, rules, xla_workarounds
from hunyuan_jax.params import declare as params
from hunyuan_jax.quant.array import QuantArray, is_quantized, product

TABLES = (("vocab", "embed"), ("odd_vocab", "wide_embed"))
TOKENS, ROWS = ("batch", "seq"), ("batch", "seq", "embed")


class Embedding(nnx.Module):
    """Token embedding.

    The padding row is zero, and the lookup gives it no gradient (docs/model.md, Attention).
    """

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array):
        self.pad_token_id = cfg.pad_token_id
        self.mesh = mesh
        self.embedding_VD = _new_table(cfg, mesh, key, params.Role.EMBEDDING)
        if cfg.pad_token_id >= 0:
            self.embedding_VD[...] = self.embedding_VD[...].at[cfg.pad_token_id].set(0.0)

    def __call__(self, tokens_BT: jax.Array, dtype: str) -> jax.Array:
        """[B, T, D] in dtype."""

        logical = self.embedding_VD.get_metadata("dims")

        def fn(w_VD, tokens_BT):
            return lookup(w_VD, tokens_BT, dtype, logical)

        x_BTD = island.island(fn, self.mesh, logical, (TOKENS,), ROWS)(
            self.embedding_VD[...], tokens_BT
        )
        is_pad_BT = tokens_BT == self.pad_token_id
        return jnp.where(is_pad_BT[..., None], jax.lax.stop_gradient(x_BTD), x_BTD)


class Head(nnx.Module):
    """The output projection of an untied model."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array):
        self.w_VD = _new_table(cfg, mesh, key, params.Role.MATRIX)


def _new_table(cfg: ModelConfig, mesh: Mesh, key: jax.Array, role: params.Role) -> nnx.Param:
    shape = (cfg.vocab_size, cfg.hidden_size)
    dims = rules.first_that_divides(mesh, shape, TABLES, "the table of tokens")
    return params.param(shape, dims, params.normal(key, cfg.init_std), role)


def lookup(
    w_VD: jax.Array | QuantArray, tokens_BT: jax.Array, dtype: str, logical: tuple[str, str]
) -> jax.Array:
    """The rows [B, T, D] of this shard's tokens from the table as stored.  Runs inside an island.

    Each shard looks up its columns for all shards that hold other columns, and an exchange brings
    a token's columns together: the table never is whole on a chip.
    """
    vocab, embed = logical
    if is_quantized(w_VD):
        w_Vd, scale_V = w_VD.values, w_VD.scale[:, 0]
    else:
        w_Vd, scale_V = xla_workarounds.cast_where_used(w_VD, dtype), None
    w_Vd = island.gather_stored(w_Vd, vocab, dim=0)
    tokens_nT = island.gather_stored(
        tokens_BT, embed, dim=0
    )  # n: the sequences of all shards in question
    row_nT = tokens_nT - island.shard_index("vocab") * w_Vd.shape[0]
    row_nT = jnp.where(
        row_nT >= 0, row_nT, w_Vd.shape[0]
    )  # negative numbers would count from the end
    # In float32, so that the gradients of a frequent token are added up in float32.
    if scale_V is None:
        x_nTd = w_Vd.astype(jnp.float32).at[row_nT].get(mode="fill", fill_value=0)
    else:
        x_nTd = w_Vd.at[row_nT].get(mode="fill", fill_value=0).astype(jnp.float32)
        x_nTd *= scale_V.at[row_nT].get(mode="fill", fill_value=0)[..., None]
    x_nTd = x_nTd.astype(dtype)
    return island.reduce_sum(
        island.exchange_stored(x_nTd, embed, split_dim=0, concat_dim=2), "vocab"
    )


def logits(
    table_VD: nnx.Param, hidden_BTD: jax.Array, mesh: Mesh, rounded_to: str = "float32"
) -> jax.Array:
    """float32 [B, T, V]: for generation; the training loss never makes them whole.

    `rounded_to` is the dtype to whose numbers they are rounded.
    """
    logical = table_VD.get_metadata("dims")

    def fn(w_VD, hidden_BTD):
        hidden_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        if is_quantized(w_VD):
            w_VD = island.gather_matrix(w_VD, logical, hidden_BTD.dtype, num_in=1)
            logits_MV = product(hidden_MD.astype(jnp.float32), w_VD)
        else:
            w_VD = island.gather_param(w_VD, logical, hidden_BTD.dtype)
            logits_MV = jnp.einsum(
                "MD,VD->MV", hidden_MD, w_VD, preferred_element_type=jnp.float32
            )
        return rounded(logits_MV, rounded_to).reshape(*hidden_BTD.shape[:2], -1)

    return island.island(fn, mesh, logical, (ROWS,), ("batch", "seq", "vocab"))(
        table_VD[...], hidden_BTD
    )


def rounded(x: jax.Array, dtype: str) -> jax.Array:
    """The float32 array x rounded to the numbers of `dtype`, still float32."""
    if dtype == "float32":
        return x
    # XLA may fold a pair of casts away; reduce_precision may not be.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
