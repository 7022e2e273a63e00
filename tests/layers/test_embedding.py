"""The lookup of tokens in a table that is spread over the mesh, and its gradient.

Letters: B batch, T tokens, D model, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers import embedding
from hunyuan_jax.parallel import island, rules
from support.models import fast_jit, filled, mesh_of

WIDTH = 16


def lookup_and_gradient(mesh, w_VD, tokens_BT, dx_BTD, dtype):
    """(the rows, the gradient of the table) with the table laid out as the model's."""
    layout = rules.first_that_divides(mesh, w_VD.shape, embedding.TABLES, "the table of tokens")
    body = functools.partial(embedding.lookup, dtype=dtype, logical=layout)
    fn = island.island(body, mesh, layout, (embedding.TOKENS,), embedding.ROWS)

    def value_and_gradient(w_VD, dx_BTD):
        x_BTD, pullback = jax.vjp(lambda w_VD: fn(w_VD, tokens_BT), w_VD)
        return x_BTD, pullback(dx_BTD)[0]

    sharding = rules.stored_sharding(mesh, layout, w_VD.shape)
    x_BTD, dw_VD = fast_jit(value_and_gradient, out_shardings=(None, sharding))(
        jax.device_put(w_VD, sharding), dx_BTD
    )
    return np.asarray(x_BTD), np.asarray(dw_VD)


# (data, expert, tensor, replica) and vocabulary; 42 rows do not divide over 4 expert shards, where
# columns are split instead.
MESHES = [
    ((1, 1, 1), 48),
    ((2, 2, 2), 48),
    ((1, 8, 1), 48),
    ((8, 1, 1), 48),
    ((1, 1, 8), 48),
    ((2, 2, 1, 2), 48),
    ((2, 4, 1), 42),
    ((1, 4, 2), 42),
]


@pytest.mark.parametrize(("sizes", "vocab"), MESHES)
def test_the_rows_of_the_tokens_and_their_gradients_added_up(sizes, vocab):
    rng = np.random.default_rng(0)
    w_VD = rng.normal(size=(vocab, WIDTH)).astype(np.float32)
    tokens_BT = rng.integers(0, vocab, (8, 5)).astype(np.int32)
    tokens_BT[0], tokens_BT[:, 1] = (
        [0, vocab - 1, 7, 7, 7],
        7,
    )  # the ends of the table, and a token on every shard
    dx_BTD = rng.normal(size=(8, 5, WIDTH)).astype(np.float32)
    x_BTD, dw_VD = lookup_and_gradient(mesh_of(*sizes), w_VD, tokens_BT, dx_BTD, "float32")
    np.testing.assert_array_equal(x_BTD, w_VD[tokens_BT])
    expected_VD = np.zeros_like(w_VD)
    np.add.at(expected_VD, tokens_BT, dx_BTD)
    np.testing.assert_allclose(dw_VD, expected_VD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_gradients_of_a_frequent_token_are_added_up_in_float32(sizes):
    # In bfloat16 a sum of ones stops at 256.
    w_VD = jnp.ones((48, WIDTH), jnp.bfloat16)
    x_BTD, dw_VD = lookup_and_gradient(
        mesh_of(*sizes),
        w_VD,
        np.full((8, 512), 7, np.int32),
        jnp.ones((8, 512, WIDTH), jnp.bfloat16),
        "bfloat16",
    )
    assert x_BTD.dtype == dw_VD.dtype == jnp.bfloat16
    expected_VD = np.zeros((48, WIDTH), np.float32)
    expected_VD[7] = 4096
    np.testing.assert_array_equal(dw_VD.astype(np.float32), expected_VD)


def test_the_padding_row_is_looked_up_but_gets_no_gradient():
    cfg = ModelConfig(
        48, WIDTH, 24, 1, num_heads=4, num_kv_heads=4, head_dim=4, max_position=8, pad_token_id=7
    )
    mesh = mesh_of(2, 2, 2)
    graph_def, state = nnx.split(
        filled(functools.partial(embedding.Embedding, cfg, mesh, jax.random.key(0)))
    )
    tokens_BT = np.random.default_rng(0).integers(4, 10, (8, 5)).astype(np.int32)

    def rows(state):
        return nnx.merge(graph_def, state)(tokens_BT, "float32")

    @fast_jit
    def value_and_gradient(state):
        x_BTD, pullback = jax.vjp(rows, state)
        return x_BTD, pullback(jnp.ones_like(x_BTD))[0]

    x_BTD, gradient = value_and_gradient(state)
    np.testing.assert_array_equal(x_BTD, np.asarray(state.embedding_VD[...])[tokens_BT])
    counts_V = np.bincount(tokens_BT.ravel(), minlength=48)
    assert counts_V[7] > 0
    counts_V[7] = 0
    np.testing.assert_array_equal(
        gradient.embedding_VD[...], np.repeat(counts_V[:, None], WIDTH, axis=1)
    )


def test_a_new_padding_row_is_zero():
    cfg = ModelConfig(
        8, 4, 4, 1, num_heads=1, num_kv_heads=1, head_dim=4, max_position=8, pad_token_id=3
    )
    w_VD = np.asarray(embedding.Embedding(cfg, mesh_of(), jax.random.key(0)).embedding_VD[...])
    assert (np.abs(w_VD).max(1) > 0).tolist() == [row != 3 for row in range(8)]
