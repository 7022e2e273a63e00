"""Spark layers against numpy, with a cache, over a mesh; what is read of the weights."""

import dataclasses
from math import erf, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hunyuan_jax.config import Config, MoeConfig, SparkConfig, TrainConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.layers import rope
from hunyuan_jax.layers.ffn.spark import SparkMlp, SparseSparkMlp
from hunyuan_jax.layers.mixer.spark_attention import is_among_top, spark_attention
from hunyuan_jax.layers.protocols import Sequence
from hunyuan_jax.model.count import count
from hunyuan_jax.runlog.metrics import layer_figures
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.state import build_program, init_state
from support.layer_kinds import SPARK as MODEL
from support.models import assert_close, fast_jit, filled, mesh_of

Q_10_PERCENT = 1.2815516  # of the standard normal distribution


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("kind", [SparkMlp, SparseSparkMlp])
def test_feed_forward_against_numpy(kind):
    module = filled(lambda: kind(MODEL, mesh_of(), jax.random.key(0)))
    y_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 32)), jnp.float32)
    definition, state = nnx.split(module)
    out_BTD, figures = fast_jit(
        lambda state, y_BTD: nnx.merge(definition, state)(
            y_BTD, jnp.array([[True, True, False]]), None
        )
    )(state, y_BTD)

    y_TD = np.asarray(y_BTD[0], np.float64)
    score_TF = y_TD[:, :16] @ np.asarray(module.w_predict_pF[...], np.float64)
    limit_T1 = score_TF.mean(1, keepdims=True) + Q_10_PERCENT * score_TF.std(1, keepdims=True)
    active_TF = np.maximum(score_TF - limit_T1, 0)
    up_TF = y_TD[:, 16:] @ np.asarray(module.w_up_Fu[...], np.float64).T
    expected_TD = (gelu(active_TF) * up_TF) @ np.asarray(module.w_down_FD[...], np.float64)
    assert_close(out_BTD[0], expected_TD, 1e-5)
    # The third token is padding.
    share = (active_TF[:2] > 0).mean(1).sum()
    np.testing.assert_allclose(figures["active"], share, rtol=1e-6)
    assert figures["tokens"] == 2.0


@pytest.mark.slow
def test_sparse_layer_reads_active_neurons_only():
    """Weights of neurons that are not active may be NaN; a dense product would spread them."""
    module = filled(lambda: SparseSparkMlp(MODEL, mesh_of(), jax.random.key(0)))
    y_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 32)), jnp.float32)
    is_valid_BT = jnp.ones((1, 1), bool)
    expected_BTD = module(y_BTD, is_valid_BT, None)[0]
    score_F = np.asarray(y_BTD[0, 0, :16] @ module.w_predict_pF[...])
    is_idle_F = score_F < score_F.mean() + (Q_10_PERCENT - 1e-3) * score_F.std()
    # Filling of the last tile is the row of neuron 0, with weight zero.
    is_idle_F[0] = False
    for name in ("w_up_Fu", "w_down_FD"):
        w = np.array(getattr(module, name)[...])
        w[is_idle_F] = np.nan
        getattr(module, name)[...] = jnp.asarray(w)
    np.testing.assert_array_equal(module(y_BTD, is_valid_BT, None)[0], expected_BTD)


@pytest.mark.parametrize("num_active", [0, 1, 128, 300])
def test_sparse_layer_serves_any_number_of_active_neurons(num_active):
    rng = np.random.default_rng(num_active)
    active_F = np.zeros(384, np.float32)
    active_F[rng.permutation(384)[:num_active]] = rng.uniform(0.1, 1, num_active)
    w = {
        "w_up_Fu": jnp.asarray(rng.normal(size=(384, 8)), jnp.float32),
        "w_down_FD": jnp.asarray(rng.normal(size=(384, 16)), jnp.float32),
    }
    y_BTD = jnp.asarray(rng.normal(size=(1, 1, 16)), jnp.float32)
    dense, sparse = (
        kind.outputs(w, y_BTD, jnp.asarray(active_F)[None, None])
        for kind in (SparkMlp, SparseSparkMlp)
    )
    np.testing.assert_allclose(sparse, dense, atol=1e-4)


def test_attention_against_numpy():
    rng = np.random.default_rng(2)
    q_TNH, k_SKH, v_SKH = (rng.normal(size=(20, heads, 8)) for heads in (4, 2, 2))
    segment_S = np.array([0] * 2 + [1] * 12 + [2] * 6)
    sequence = Sequence((), jnp.asarray(segment_S)[None])
    arrays = (jnp.asarray(x, jnp.float32)[None] for x in (q_TNH, k_SKH, v_SKH))
    out_TNH = spark_attention(*arrays, sequence, top_k=3)[0]

    expected_TNH = np.zeros_like(q_TNH)
    for t in range(2, 20):
        seen = [s for s in range(t + 1) if segment_S[s] == segment_S[t]]
        for n in range(4):
            k_SH, v_SH = k_SKH[seen, n // 2], v_SKH[seen, n // 2]
            score_S = k_SH[:, :4] @ q_TNH[t, n, :4] / 2
            gate_S = np.log1p(np.exp(k_SH[:, 4:] @ q_TNH[t, n, 4:] / 2))
            if len(seen) > 3:
                limit = score_S.mean() + quantile_of(3 / len(seen)) * score_S.std()
                score_S = np.where(score_S >= limit, score_S, -np.inf)
            weight_S = np.exp(score_S - score_S.max())
            expected_TNH[t, n] = (weight_S / weight_S.sum() * gate_S) @ v_SH
    assert_close(out_TNH, expected_TNH, 1e-5)


def quantile_of(share: float) -> float:
    """Q(1 - share) by bisection of the error function."""
    low, high = -10.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * (1 - erf(middle / sqrt(2))) > share else (low, middle)
    return low


def test_statistics_are_those_of_visible_keys():
    score_S = jnp.asarray(np.random.default_rng(3).normal(size=64), jnp.float32)
    is_visible_S = jnp.arange(64) < 40
    kept_S = is_among_top(score_S, is_visible_S, 8)
    changed_S = jnp.where(is_visible_S, score_S, 1e6)
    np.testing.assert_array_equal(kept_S[:40], is_among_top(changed_S, is_visible_S, 8)[:40])
    assert 2 <= int(kept_S[:40].sum()) <= 16
    # No threshold where there are no more keys than top_k.
    assert is_among_top(score_S, jnp.arange(64) < 8, 8)[:8].all()


def test_feed_forward_has_two_matrices():
    assert count(MODEL).mlp == 4 * 2 * 32 * 96


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"spark": SparkConfig(predictor_width=8)},
            r"predictor_width = 8 acts with .*neuron_share",
        ),
        ({"spark": SparkConfig(0.1, predictor_width=32)}, r"predictor_width = 32 must leave"),
        ({"head_dim": 10}, r"head_dim = 10 must be a multiple of 4"),
        ({"attention_dropout": 0.1}, r"attention_dropout = 0\.1 is not implemented"),
        ({"moe": MoeConfig(num_experts=4)}, r"neuron_share = 0\.1 is for dense models"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(MODEL, **change)


def test_share_must_be_below_one():
    with pytest.raises(ConfigError, match=r"neuron_share = 1\.5 must be in \[0, 1\)"):
        SparkConfig(neuron_share=1.5)


def test_rope_rotates_each_half():
    """Halves are rotated by the same angles: relative positions alone decide both scores."""
    x_BTNH = jnp.asarray(np.random.default_rng(4).normal(size=(1, 5, 2, 16)), jnp.float32)
    cos_sin_BTh = rope.cos_sin(jnp.arange(5)[None], MODEL)
    rotated_BTNH = rope.rotate(x_BTNH, cos_sin_BTh)
    for half in (slice(0, 8), slice(8, 16)):
        np.testing.assert_allclose(
            rotated_BTNH[..., half], rope.rotate(x_BTNH[..., half], cos_sin_BTh), atol=1e-6
        )


def test_share_of_active_neurons_is_logged():
    """The figures of a real step, under the names of metrics.jsonl."""
    config = Config(MODEL, train=TrainConfig(batch_size=2, seq_len=16))
    program = build_program(config, mesh_of())
    batch = step_lib.place_batch(program, program.objective.random_batch())
    _, metrics = step_lib.make_train_step(program)(init_state(program), batch)
    row = layer_figures(jax.tree.map(np.asarray, metrics))
    assert len(row["layers/active_share_by_layer"]) == MODEL.num_layers
    assert 0.03 < row["layers/active_share"] < 0.25  # 0.1, of 96 neurons
