"""Learned masks: what they multiply, and which units they find useless."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.config import DistillConfig
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.params.tree import join
from hunyuan_jax.post import masks
from hunyuan_jax.post.inherit import inherit, scores
from support.larger import DENSE, MIXTURE, logits_of, mesh, params_of
from support.models import fast_jit


def specs_of(*models):
    return [abstract_model(cfg, mesh())[1] for cfg in models]


def smaller(cfg):
    """Less of everything that a mask can cut."""
    return dataclasses.replace(
        cfg,
        hidden_size=12,
        num_layers=4,
        num_heads=2,
        num_kv_heads=2,
        intermediate_size=5,
        moe=dataclasses.replace(cfg.moe, num_experts=max(1, cfg.moe.num_experts - 1), top_k=1),
    )


@pytest.mark.parametrize("cfg", [MIXTURE, dataclasses.replace(DENSE, attention_bias=True)])
def test_masks_of_one_change_nothing(cfg):
    params, (theirs, ours) = params_of(cfg), specs_of(cfg, smaller(cfg))
    rows = masks.rows_of(theirs, ours, DistillConfig())
    kinds = {"heads", "columns"} | ({"experts", "expert_columns"} if cfg.is_moe else set())
    assert rows["groups"].keys() == {"groups", "kv_heads", "layer_0", "layer_1"}
    assert rows["groups"]["layer_1"].keys() == kinds
    assert rows["stream"].share == 0.75 and rows["groups"]["kv_heads"].shape == (3, 4)
    ones = jax.tree.map(lambda row: np.ones(row.shape, np.float32), rows)
    found = fast_jit(lambda *trees: masks.masked(trees[0], theirs, trees[1]))(params, ones)
    jax.tree.map(np.testing.assert_array_equal, found, params)

    named = DistillConfig(groups=(0, 2))
    assert "groups" not in masks.rows_of(theirs, ours, named)["groups"]
    assert masks.fixed(theirs, named)["groups"]["groups"].tolist() == [1, 0, 1]
    assert masks.fixed(theirs, DistillConfig()) == {}
    assert masks.rows_of(theirs, theirs, DistillConfig()) == {}


def test_a_model_whose_masks_are_zero_is_the_student_without_these_units():
    cfg = dataclasses.replace(DENSE, attention_bias=True)
    student = dataclasses.replace(smaller(cfg), hidden_size=cfg.hidden_size)
    params, specs, rng = params_of(cfg), specs_of(cfg, student), np.random.default_rng(0)
    config = DistillConfig()
    rows = masks.rows_of(*specs, config)

    def draw(row):
        ranks = rng.random(row.shape).argsort(-1).argsort(-1)
        return (ranks < round(row.share * row.shape[-1])).astype(np.float32)

    drawn = jax.tree.map(draw, rows)
    run = logits_of(student).__wrapped__

    @fast_jit
    def of_student(params, drawn):
        units = join(scores(params, specs[0]), drawn)
        return run(inherit(params, units, *specs, config))

    of_masked = logits_of(cfg).__wrapped__
    found = fast_jit(lambda *trees: of_masked(masks.masked(trees[0], specs[0], trees[1])))(
        params, drawn
    )
    expected = of_student(params, drawn)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_experts_and_the_stream_are_multiplied_where_they_write():
    params, (specs,) = params_of(MIXTURE), specs_of(MIXTURE)
    experts = np.array([[1, 0.5, 0, 1]] * 3, np.float32)
    columns = np.linspace(0, 1, 3 * 4 * 12, dtype=np.float32).reshape(3, 4, 12)
    stream = np.linspace(0.5, 1.5, 16, dtype=np.float32)
    own = {"experts": experts, "expert_columns": columns}
    found = masks.masked(params, specs, {"stream": stream, "groups": {"layer_1": own}})
    theirs = params["groups"]["layer_1"]["moe"]["experts"]
    np.testing.assert_allclose(
        found["groups"]["layer_1"]["moe"]["experts"]["w_down_EFD"],
        theirs["w_down_EFD"] * (experts[..., None] * columns)[..., None] * stream,
        rtol=1e-6,
    )
    for layer in ("layer_0", "layer_1"):
        before, after = (tree["groups"][layer]["attn"] for tree in (params, found))
        np.testing.assert_allclose(after["wo_NHD"], before["wo_NHD"] * stream, rtol=1e-6)
        np.testing.assert_array_equal(after["wq_DNH"], before["wq_DNH"])
    np.testing.assert_allclose(
        found["embed"]["embedding_VD"], params["embed"]["embedding_VD"] * stream, rtol=1e-6
    )


@pytest.mark.slow
def test_useless_units_go_first_and_the_share_is_the_students():
    cfg = dataclasses.replace(DENSE, num_layers=2, cla_share_factor=1)
    student = dataclasses.replace(cfg, num_layers=1, num_heads=4, num_kv_heads=2)
    student = dataclasses.replace(student, intermediate_size=8)
    (theirs, ours), params = specs_of(cfg, student), params_of(cfg)
    rows = masks.rows_of(theirs, ours, DistillConfig())

    useful = jax.tree.map(lambda row: np.ones(row.shape, np.float32), rows)
    useful["groups"]["groups"][0] = 0
    useful["groups"]["kv_heads"][1, [0, 3]] = 0
    useful["groups"]["layer_0"]["columns"][1, [1, 4, 5, 9]] = 0
    params = fast_jit(lambda params: masks.masked(params, theirs, useful))(params)
    run = logits_of(cfg).__wrapped__
    target = jax.nn.log_softmax(logits_of(cfg)(params))

    def divergence(found, params):
        ours_BTV = jax.nn.log_softmax(run(masks.masked(params, theirs, found)))
        return (jnp.exp(target) * (target - ours_BTV)).sum(-1).mean()

    state, step = masks.first_state(rows), fast_jit(masks.step_of(divergence, rows, 100))
    for number in range(100):
        state = step(state, params, np.int32(number), jax.random.key(0))
    learned = state.logits
    for logit, row in zip(jax.tree.leaves(learned), jax.tree.leaves(rows), strict=True):
        np.testing.assert_allclose(masks.kept_share(logit), row.share, atol=0.1)
    config = DistillConfig(inherit="mask")

    @fast_jit
    def student_of(params, learned):
        return inherit(params, join(scores(params, theirs), learned), theirs, ours, config)

    cut = student_of(params, learned)["groups"]["layer_0"]
    expected = params["groups"]["layer_0"]
    np.testing.assert_array_equal(
        cut["mlp"]["w_down_FD"][0],
        expected["mlp"]["w_down_FD"][1][np.array([0, 2, 3, 6, 7, 8, 10, 11])],
    )
    np.testing.assert_array_equal(
        cut["attn"]["wk_DKH"][0], expected["attn"]["wk_DKH"][1][:, [1, 2]]
    )


def test_masks_are_mostly_zero_or_one():
    drawn = masks.sample(
        {"a": jnp.array([-6.0, 0.0, 2.2, 6.0])[:, None].repeat(999, 1)}, jax.random.key(0)
    )
    shares = [[(row == value).mean() for value in (0, 1)] for row in np.asarray(drawn["a"])]
    np.testing.assert_allclose(shares[0], (0.99, 0), atol=0.02)
    np.testing.assert_allclose(shares[1], (0.17, 0.17), atol=0.04)
    np.testing.assert_allclose(shares[2], (0.02, 0.65), atol=0.04)
    assert shares[3][1] > 0.97
    kept = masks.kept_share(jnp.array([[-6.0] * 2, [0.0] * 2, [2.2] * 2]))
    np.testing.assert_allclose(1 - kept, (0.99, 0.17, 0.02), atol=0.01)
