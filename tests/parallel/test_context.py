"""A row over several chips: the same assignment, loss and gradients as on one, in every form of
attention; errors with the sizes that work.

Letters: B batch, T tokens of a row.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hunyuan_jax import presets
from hunyuan_jax.config import LatentConfig, ModelConfig, MoeConfig, SparkConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.layers import loss
from hunyuan_jax.layers.mixer import context_facts
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel import context
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.params.abstract import shardings
from hunyuan_jax.train.state import abstract_model
from support.models import assert_close, fast_jit, filled, mesh_of

BATCH, LENGTH = 4, 32
MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_position=LENGTH,
    cla_share_factor=2,
    moe=MoeConfig(
        num_experts=4,
        num_shared_experts=1,
        dispatch="recycle",
        group_size=2,
        aux_loss_weight=0.05,
        z_loss_weight=0.01,
    ),
)


@functools.cache
def batch():
    """(tokens, positions, segments, targets) [B, T]: one document; several that cross chips, and
    padding; documents shorter than a chunk; padding only.
    """
    rng = np.random.default_rng(0)
    tokens_BT, targets_BT = rng.integers(0, 40, (2, BATCH, LENGTH)).astype(np.int32)
    segments_BT = np.ones((BATCH, LENGTH), np.int32)
    segments_BT[1] = np.repeat([1, 2, 3, 0], [13, 6, 8, 5])
    segments_BT[2] = 1 + np.arange(LENGTH) // 3
    segments_BT[3] = 0
    starts_BT = np.diff(segments_BT, axis=1, prepend=-1) != 0
    place_T = np.arange(LENGTH, dtype=np.int32)
    positions_BT = place_T - np.maximum.accumulate(np.where(starts_BT, place_T, 0), axis=1)
    return tokens_BT, positions_BT, segments_BT, targets_BT


@functools.cache
def initial_params():
    model = filled(functools.partial(Transformer, MODEL, single_device_mesh(), jax.random.key(0)))
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))


def train_step(cfg, mesh):
    """(loss, figures, gradients, losses [B, T]) of one step."""
    graph_def, specs = abstract_model(cfg, mesh)
    params = jax.device_put(initial_params(), shardings(specs))

    def loss_fn(params, tokens_BT, positions_BT, segments_BT, targets_BT, key):
        model = nnx.merge(graph_def, params)
        output = model(tokens_BT, positions_BT, segments_BT, key=key, is_training=True)
        loss_BT = model.token_figures(output.hidden_BTD, targets_BT).loss
        entropy = loss.mean_loss(loss_BT, (segments_BT > 0).astype(jnp.float32))
        total = entropy + loss.router_loss(output.stats, cfg.moe)
        return total, (output.stats, loss_BT)

    step = fast_jit(jax.value_and_grad(loss_fn, has_aux=True))
    (total, (stats, loss_BT)), grads = jax.tree.map(
        np.asarray, step(params, *batch(), jax.random.key(3))
    )
    return total, stats, grads, loss_BT


def variant(form="auto", way="recycle", **changes):
    moe = dataclasses.replace(MODEL.moe, dispatch=way)
    return dataclasses.replace(MODEL, context_attention=form, moe=moe, **changes)


@functools.cache
def on_one_chip(cfg):
    return train_step(dataclasses.replace(cfg, context_attention="auto"), single_device_mesh())


def check(cfg, mesh):
    total, stats, grads, loss_BT = train_step(cfg, mesh)
    expected, expected_stats, expected_grads, expected_BT = on_one_chip(cfg)
    assert total == pytest.approx(expected, rel=1e-5)
    # Counts of the assignment: every expert has the same tokens.
    for name in ("wished_E", "served_E", "recycled"):
        np.testing.assert_array_equal(stats[name], expected_stats[name])
    is_token_BT = batch()[2] > 0
    assert_close(loss_BT * is_token_BT, expected_BT * is_token_BT, 1e-5)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), grads, expected_grads)


# (form, context, data, expert, tensor)
@pytest.mark.parametrize(
    ("form", "sizes"),
    [
        ("gather", (2, 1, 2, 2)),
        pytest.param("ring", (4, 2, 1, 1), marks=pytest.mark.slow),
        pytest.param("all_to_all", (2, 2, 1, 2), marks=pytest.mark.slow),
    ],
)
@pytest.mark.heavy
def test_several_chips_give_the_loss_and_gradients_of_one(form, sizes):
    num_chips, data, expert, tensor = sizes
    check(variant(form), mesh_of(data, expert, tensor, context=num_chips))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["recycle", "drop", "dropless"])
@pytest.mark.parametrize(
    ("form", "sizes"),
    [
        ("gather", (8, 1, 1, 1)),
        ("gather", (4, 1, 2, 1)),
        ("gather", (2, 2, 2, 1)),
        ("ring", (8, 1, 1, 1)),
        ("ring", (2, 1, 4, 1)),
        ("ring", (2, 2, 1, 2)),
        ("all_to_all", (4, 2, 1, 1)),
        ("all_to_all", (4, 1, 2, 1)),
        ("all_to_all", (2, 1, 2, 2)),
    ],
)
def test_every_mesh(way, form, sizes):
    num_chips, data, expert, tensor = sizes
    check(variant(form, way), mesh_of(data, expert, tensor, context=num_chips))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("form", ["gather", "ring", "all_to_all"])
def test_share_factors_and_remat(form, share, remat, monkeypatch):
    cfg = variant(form, cla_share_factor=share, remat=remat)
    model = filled(functools.partial(Transformer, cfg, single_device_mesh(), jax.random.key(0)))
    weights = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    monkeypatch.setitem(globals(), "initial_params", lambda: weights)
    on_one_chip.cache_clear()
    check(cfg, mesh_of(2, context=4))
    on_one_chip.cache_clear()


def test_order_of_the_chips():
    x_BT = jnp.arange(16).reshape(1, 16)
    x_chip = context.chip_order(x_BT, 4).reshape(4, 2, 2).tolist()
    assert x_chip[0] == [[0, 1], [14, 15]] and x_chip[3] == [[6, 7], [8, 9]]
    assert (context.row_order(context.chip_order(x_BT, 4), 4) == x_BT).all()


@pytest.mark.parametrize(
    ("cfg", "length", "message"),
    [
        (
            MODEL,
            36,
            r"a row of 36 tokens does not divide into the 8 chunks of config\.mesh\.context = 4, "
            r"two a chip; use a length of 32 or 40 tokens, or a config\.mesh\.context from "
            r"\[1, 2, 3\]",
        ),
        (
            dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, group_size=8)),
            32,
            r"routing groups of 8 tokens .* would lie on several chips: config\.mesh\.context = 4 "
            r"cuts a row of 32 tokens into chunks of 4\. Use a group_size that divides 4",
        ),
        (
            dataclasses.replace(MODEL, attention_dropout=0.1, context_attention="ring"),
            32,
            r"context_attention = 'ring': it has no dropout of attention weights .*; use 'auto' "
            r"or 'gather' or 'all_to_all'",
        ),
        (
            dataclasses.replace(MODEL, num_kv_heads=2, context_attention="all_to_all"),
            32,
            r"context_attention = 'all_to_all': 2 kv heads on a chip .* do not divide over "
            r"config\.mesh\.context = 4; use 'auto' or 'gather' or 'ring'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(cfg, length, message):
    mesh = mesh_of(context=4)
    graph_def, specs = abstract_model(cfg, mesh)
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def run(params, tokens_BT, positions_BT, segments_BT, key):
        model = nnx.merge(graph_def, params)
        return model(tokens_BT, positions_BT, segments_BT, key=key, is_training=True).hidden_BTD

    params = jax.tree.map(lambda spec: spec.struct(), specs)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(run, params, ids, ids, ids, jax.random.key(0))


@pytest.mark.parametrize(
    "change",
    [
        {"spark": SparkConfig(attention_top_k=4)},
        {
            "latent": LatentConfig(width=16, group_size=8),
            "use_qk_norm": False,
            "num_kv_heads": 8,
        },
    ],
)
def test_mixers_that_need_the_whole_row_are_refused(change):
    cfg = dataclasses.replace(MODEL, cla_share_factor=1, **change)
    with pytest.raises(ConfigError, match=r"config\.mesh\.context = 2 .* cannot use; set it to 1"):
        abstract_model(cfg, mesh_of(context=2))


def test_auto_takes_the_least_traffic_that_fits():
    a52b = presets.a52b()
    # 8 of 80 heads: to gather keys is cheap.  The pod of configs/a52b_256k.py.
    assert context_facts.choose(a52b, 1, 2**18, 32, 1).name == "gather"
    # Too many rows a chip to hold their keys.
    assert context_facts.choose(a52b, 8, 2**18, 32, 1).name == "ring"
    # As many kv heads as query heads: exchanging heads moves a chip's own tokens only.
    heads = dataclasses.replace(a52b, num_kv_heads=80, cla_share_factor=1)
    assert context_facts.choose(heads, 1, 2**16, 8, 1).name == "all_to_all"
    dropout = dataclasses.replace(a52b, attention_dropout=0.1)
    assert context_facts.choose(dropout, 8, 2**18, 32, 1).name == "gather"


def test_bytes_that_travel():
    # Two layers share keys, and nothing is recomputed: the gradients travel in float32 in a ring.
    cfg = dataclasses.replace(MODEL, dtype="bfloat16")
    gather, ring, _ = context_facts.forms(cfg, 1, LENGTH, 4, 1)
    keys = 2 * LENGTH // 4 * 4 * 8  # elements of a chip's keys and values
    assert gather.sent_bytes == keys * 2 * 3 * 2
    assert ring.sent_bytes == 2 * keys * 4 * (2 + 2 + 4)
