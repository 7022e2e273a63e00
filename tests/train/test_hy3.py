"""Training what Hy3 has: experts balanced without a loss, and multi-token prediction."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.config import LoraConfig, MoeConfig
from hunyuan_jax.layers.ffn.moe import routing
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.train import loop
from hunyuan_jax.train.pretrain import after_next
from hunyuan_jax.train.state import build_program, init_state
from hunyuan_jax.train.step import make_train_step, place_batch
from support import runs, steps
from support.folders import flat
from support.models import mesh_of

MODEL = dataclasses.replace(
    steps.MODEL,
    num_layers=3,
    norm_before_rope=True,
    num_dense_layers=1,
    num_mtp_layers=1,
    mtp_loss_weight=0.5,
    tie_embeddings=False,
    moe=dataclasses.replace(
        steps.MODEL.moe,
        top_k=2,
        scoring="sigmoid",
        norm_topk_prob=True,
        selection_bias=True,
        bias_rate=0.01,
        aux_loss_weight=0.0,
        z_loss_weight=0.0,
    ),
)


@functools.cache
def program_and_step(model, mesh, **train):
    program = build_program(steps.config_for(model, **train), mesh)
    return program, make_train_step(program)


def one_step(model, mesh=None, **train):
    program, step = program_and_step(model, mesh or mesh_of(), **train)
    state = init_state(program)
    before = {path: np.array(array) for path, array in flat(state.params).items()}
    state, metrics = step(state, place_batch(program, steps.batch()))
    after = {path: np.asarray(array) for path, array in flat(state.params).items()}
    return before, after, jax.tree.map(np.asarray, metrics)


@pytest.fixture(scope="module")
def stepped():
    return one_step(MODEL)


def test_a_bias_moves_against_the_load():
    cfg = MoeConfig(num_experts=4, selection_bias=True, bias_rate=0.25)
    bias_E, chosen_E = jnp.asarray([0.0, 0.5, -0.5, 0.0]), jnp.asarray([10.0, 0.0, 6.0, 8.0])
    moved = routing.moved_bias(bias_E, chosen_E, cfg)
    np.testing.assert_array_equal(moved, [-0.25, 0.75, -0.5, -0.25])
    limited = dataclasses.replace(cfg, bias_limit=0.6)
    moved = routing.moved_bias(bias_E, chosen_E, limited)
    np.testing.assert_allclose(moved, [-0.25, 0.6, -0.5, -0.25])


def test_the_bias_chooses_and_does_not_weigh():
    cfg = MoeConfig(
        *(4, 2), scoring="sigmoid", norm_topk_prob=True, routed_scale=3.0, selection_bias=True
    )
    logits_TE = jnp.asarray([[2.0, 1.0, 0.0, -1.0]])
    choice = routing.choose(logits_TE, cfg, jnp.asarray([0.0, 0.0, 0.0, 2.0]))
    assert choice.expert_Tk.tolist() == [[3, 0]]
    weight_Tk = routing.assign(choice, jnp.ones(1, bool), cfg, None).weight_Tk
    score = 1 / (1 + np.exp([1.0, -2.0]))
    np.testing.assert_allclose(weight_Tk[0], 3 * score / score.sum(), rtol=1e-6)
    np.testing.assert_allclose(choice.probs_TE.sum(-1), 1, rtol=1e-6)
    assert routing.choose(logits_TE, cfg).expert_Tk.tolist() == [[0, 1]]


@pytest.mark.heavy
def test_a_step_moves_the_biases_and_trains_the_rest(stepped):
    before, after, metrics = stepped
    biases = {path for path in before if path.endswith("bias_E")}
    assert biases == {f"{stack}/layer_0/moe/bias_E" for stack in ("groups", "mtp_groups")}
    demand_LE = metrics["demand_LE"]
    assert demand_LE.shape == (3, 4)  # two layers with experts, and the one of the prediction
    step_LE = 0.01 * np.sign(0.25 - demand_LE)
    np.testing.assert_allclose(after["groups/layer_0/moe/bias_E"], step_LE[:2], atol=1e-9)
    np.testing.assert_allclose(after["mtp_groups/layer_0/moe/bias_E"], step_LE[2:], atol=1e-9)
    np.testing.assert_array_equal(metrics["bias_L"], np.zeros(3))  # of the step
    assert all((before[path] != after[path]).any() for path in before), "something is not trained"


@pytest.mark.slow
def test_the_same_on_a_mesh_and_in_micro_batches(stepped):
    for other in (
        one_step(MODEL, mesh_of(data=2, expert=2, tensor=2)),
        one_step(MODEL, grad_accum_steps=2),
    ):
        for path, array in stepped[1].items():
            np.testing.assert_allclose(other[1][path], array, atol=2e-4, err_msg=path)
        for path in ("groups/layer_0/moe/bias_E", "mtp_groups/layer_0/moe/bias_E"):
            np.testing.assert_array_equal(other[1][path], stepped[1][path])


@pytest.mark.slow
def test_what_has_no_rate_or_weight_stays():
    model = dataclasses.replace(
        MODEL, mtp_loss_weight=0.0, moe=dataclasses.replace(MODEL.moe, bias_rate=0.0)
    )
    before, after, metrics = one_step(model)
    kept = {path for path in before if (before[path] == after[path]).all()}
    assert kept == {path for path in before if "mtp" in path or path.endswith("bias_E")}
    assert metrics["demand_LE"].shape == (2, 4)
    assert not any(name.startswith("objective/") for name in metrics)


@pytest.mark.heavy
def test_a_refused_step_moves_no_bias():
    program, step = program_and_step(MODEL, mesh_of())
    weights_BT = np.full_like(steps.batch()["loss_weights"], np.nan)
    batch = place_batch(program, steps.batch() | {"loss_weights": weights_BT})
    state, metrics = step(init_state(program), batch)
    assert int(metrics["num_skipped"]) == 1
    assert not np.asarray(flat(state.params)["groups/layer_0/moe/bias_E"]).any()


def test_adapters_are_trained_alone():
    model = dataclasses.replace(
        MODEL,
        mtp_loss_weight=0.0,
        lora=LoraConfig(rank=2, targets=("q", "gate", "expert_up")),
        moe=dataclasses.replace(MODEL.moe, bias_rate=0.0),
    )
    specs = flat(abstract_model(model, mesh_of())[1])
    trained = {path for path, spec in specs.items() if spec.is_trained}
    assert trained == {path for path in specs if "lora" in path}
    assert {path.split("/")[0] for path in trained} == {"dense_groups", "groups"}
    assert not any("expert" in path or "/moe/" in path for path in trained if "dense" in path)


def test_the_token_after_the_next():
    batch = {
        "targets": jnp.asarray([[1, 2, 3, 4]]),
        "segment_ids": jnp.asarray([[1, 1, 2, 2]]),
        "loss_weights": jnp.asarray([[1.0, 1.0, 1.0, 0.0]]),
    }
    targets_BT, weights_BT = after_next(batch)
    assert targets_BT.tolist()[0][:3] == [2, 3, 4]
    assert weights_BT.tolist() == [[1.0, 0.0, 0.0, 0.0]]


@pytest.mark.heavy
def test_the_loss_of_both_predictions(stepped):
    metrics = stepped[2]
    parts = metrics["objective/next_token"], metrics["objective/mtp"]
    np.testing.assert_allclose(metrics["loss"], parts[0] + 0.5 * parts[1], rtol=1e-6)
    assert 0 < parts[1] < parts[0]  # fewer tokens have one after the next


@pytest.mark.slow
def test_a_run_resumes_with_its_biases(tmp_path):
    """Bit-equal to one that was not stopped, and logged."""
    (tmp_path / "text").mkdir()
    corpus = runs.write_corpus(tmp_path / "text")
    model = dataclasses.replace(
        MODEL, vocab_size=259, max_position=64, bos_token_id=256, pad_token_id=258
    )
    config = dataclasses.replace(runs.config_for(corpus, num_steps=4), model=model)
    with runs.on_one_device():
        assert loop.run(config, tmp_path / "whole") == 0
        shutil.copytree(tmp_path / "whole", tmp_path / "parts")
        shutil.rmtree(tmp_path / "parts/checkpoints/4")
        assert loop.run(config, tmp_path / "parts") == 0
    (whole, parts) = (
        {row["step"]: row for row in runs.rows(tmp_path / name) if "loss" in row}
        for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() == {1, 2, 3, 4}
    for step, row in whole.items():
        for field in ("loss", "grad_norm", "moe/bias", "moe/bias_by_layer", "mtp"):
            assert parts[step][field] == row[field], (step, field)
    assert whole[1]["moe/bias"] == 0
    assert 0.005 < whole[4]["moe/bias"] < 0.0301  # up to three steps of 0.01
