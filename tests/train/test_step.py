"""The training step: gradients in parts, their dtypes, and short runs with every optimizer state
on a mesh.

Letters: B batch, T tokens.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.bench import speed
from hunyuan_jax.checkpoint import manifest, store
from hunyuan_jax.config import MoeConfig, OptimizerConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.optim import guard
from hunyuan_jax.parallel import xla_cpu
from hunyuan_jax.quant.scaled import Scaled, is_scaled, load_params
from hunyuan_jax.storage import Place
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.state import (
    build_program,
    convert,
    from_items,
    init_state,
    to_items,
)
from hunyuan_jax.weights.run import Run
from pallas_kernels import tpu_compiler
from support.models import COMPILER_OPTIONS, assert_close, fast_jit, mesh_of
from support.steps import LENGTH, MODEL, batch, config_for, initial_params


@functools.cache
def gradients(sizes, grad_accum_steps=1, model=MODEL):
    """(program, gradients, loss, router figures)"""
    program = build_program(config_for(model, grad_accum_steps=grad_accum_steps), mesh_of(*sizes))
    params = jax.device_put(initial_params(), program.shardings.params)
    placed = step_lib.place_batch(program, batch())
    compute = fast_jit(functools.partial(step_lib.gradients, program))
    return program, *compute(params, placed, jax.random.key(3))


# Gradient accumulation


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        pytest.param(2, (1, 1, 1), marks=pytest.mark.slow),
        pytest.param(4, (2, 1, 1), marks=pytest.mark.slow),
        (2, (1, 2, 2, 2)),
    ],
)
def test_a_batch_in_parts_has_the_loss_and_gradients_of_the_whole(parts, sizes):
    _, grads, loss, stats = gradients(sizes, parts)
    _, whole_grads, whole_loss, whole_stats = gradients((1, 1, 1))
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-5)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), grads, whole_grads)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), stats, whole_stats)
    per_part = batch()["loss_weights"].reshape(-1, parts, LENGTH).sum((0, 2))
    assert len(set(per_part.tolist())) == parts  # a mean of the parts' means would be another loss


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"grad_accum_steps": 0}, r"config\.train\.grad_accum_steps = 0 must be at least 1"),
        ({"grad_accum_steps": 3}, r"config\.train\.batch_size = 8 .*grad_accum_steps = 3"),
        ({"grad_accum_steps": 16}, r"config\.train\.batch_size = 8 .*grad_accum_steps = 16"),
    ],
)
def test_a_batch_that_does_not_split_into_equal_parts_is_refused(train, message):
    with pytest.raises(ConfigError, match=message):
        config_for(**train)


def test_a_group_of_sequences_must_fit_a_part():
    grouped = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, group_size=4 * LENGTH))
    config_for(grouped, grad_accum_steps=2)
    with pytest.raises(ConfigError, match=r"group_size = 48 .*24 tokens"):
        config_for(grouped, grad_accum_steps=4)


def test_a_part_that_does_not_divide_over_the_mesh_is_refused():
    program = build_program(config_for(grad_accum_steps=4), mesh_of(2, 2, 1))
    with pytest.raises(
        ConfigError,
        match=r"a micro-batch \(config\.train\.grad_accum_steps = 4\).* \(2, 12\): dim 0 .* use 2 "
        r"ways there, or a size of 4",
    ):
        step_lib.batch_shardings(program, program.objective.batch_spec)


# Dtypes

BFLOAT16 = dataclasses.replace(
    MODEL, dtype="bfloat16", remat="full", moe=dataclasses.replace(MODEL.moe, dispatch="recycle")
)


def is_matrix(path):
    """By the rule of the documentation: all but norms, biases and the router."""
    return "norm" not in path and "router" not in path


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


@pytest.mark.heavy
def test_gradients_of_matrices_have_the_models_dtype_and_all_others_float32():
    program, grads, loss, _ = gradients((2, 2, 2), 1, BFLOAT16)
    assert len(by_path(grads)) > 12
    for path, grad in by_path(grads).items():
        assert grad.dtype == (jnp.bfloat16 if is_matrix(path) else jnp.float32), path
        assert np.isfinite(np.asarray(grad, np.float32)).all() and grad.any(), path
    for grad, sharding in zip(
        jax.tree.leaves(grads), jax.tree.leaves(program.shardings.params), strict=True
    ):
        assert grad.sharding.is_equivalent_to(sharding, grad.ndim)
    np.testing.assert_allclose(
        loss, gradients((1, 1, 1))[2], rtol=0.1
    )  # recycling moves a few tokens, and bfloat16 rounds


def test_parts_of_a_bfloat16_model_are_added_up_in_float32():
    program = build_program(config_for(BFLOAT16, grad_accum_steps=2), mesh_of(2, 2, 1))
    batch_shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch())
    grads, loss, stats = jax.eval_shape(
        functools.partial(step_lib.gradients, program),
        program.state.params,
        batch_shapes,
        jax.random.key(0),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((grads, loss, stats))} == {np.dtype(np.float32)}


# Short runs with each optimizer state

SIZES = (2, 2, 1)


@functools.cache
def compiled_step(state_dtype):
    """(program, its train step)"""
    program = build_program(config_for(state_dtype=state_dtype), mesh_of(*SIZES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu_compiler, "train_step_options", lambda kind: COMPILER_OPTIONS)
        return program, step_lib.make_train_step(program)


@functools.cache
def short_run(state_dtype):
    """(program, state after three steps, the losses) on one batch."""
    program, step = compiled_step(state_dtype)
    state, losses = init_state(program), []
    placed = step_lib.place_batch(program, batch())
    for _ in range(3):
        state, metrics = step(state, placed)
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 3
    return program, state, losses


def test_the_step_is_compiled_with_the_options_of_its_device(monkeypatch):
    monkeypatch.setattr(xla_cpu, "train_step_options", lambda kind: {f"not_known_on_{kind}": 1})
    program = build_program(config_for(dataclasses.replace(MODEL, moe=MoeConfig())), mesh_of())
    step = step_lib.make_train_step(program)
    lowered = step.lower(program.state, step_lib.abstract_batch(program))
    with pytest.raises(jax.errors.JaxRuntimeError, match="not_known_on_cpu"):
        lowered.compile()


def random_state(program):
    """A state of random numbers; compiles nothing."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jax.device_put(rng.normal(size=a.shape).astype(a.dtype), a.sharding),
        program.state,
    )


def assert_same(actual, expected):
    """Bit for bit, with the same dtypes."""
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def assert_promised_layout(mode, program, state):
    """Parameters and moments have the dtypes of the mode; moments are sharded as parameters."""
    assert by_path(jax.tree.map(lambda a: (a.shape, a.dtype), state)) == by_path(
        jax.tree.map(lambda a: (a.shape, a.dtype), program.state)
    )
    tap_of, found = by_path(program.taps), []
    matrix_dtypes = {
        "float32": "float32",
        "bfloat16": "float32 bfloat16",
        "fp8_lm": "float16 float8_e4m3fn",
    }[mode].split()
    other_dtypes = {"bfloat16": "float32 bfloat16"}.get(mode, "float32").split()
    for path, leaf in by_path(state).items():
        owner = next(
            (name for name in tap_of if f"/{path.removesuffix('/value')}".endswith(f"/{name}")),
            None,
        )
        if owner is None:  # counts and scales
            is_scale = path.endswith("/inv_scale")
            assert (
                leaf.dtype == (jnp.float32 if is_scale or path == "guard/mean_norm" else jnp.int32)
                and leaf.sharding.is_fully_replicated
            ), path
            continue
        found.append(owner)
        assert leaf.dtype.name in (matrix_dtypes if is_matrix(owner) else other_dtypes), path
        assert leaf.shape == tap_of[owner].shape and leaf.sharding.is_equivalent_to(
            tap_of[owner].sharding, leaf.ndim
        ), path
        if is_matrix(owner):
            assert (
                math.prod(leaf.sharding.shard_shape(leaf.shape)) * math.prod(SIZES) == leaf.size
            ), path
    assert sorted(found) == sorted([*tap_of] * 3)  # the parameter and two moments of each
    num_scaled = sum(
        isinstance(x, Scaled)
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Scaled))
    )
    assert num_scaled == (3 * sum(map(is_matrix, tap_of)) if mode == "fp8_lm" else 0)


@pytest.mark.heavy
@pytest.mark.parametrize("mode", [pytest.param("bfloat16", marks=pytest.mark.slow), "fp8_lm"])
def test_a_short_run_keeps_its_layout_and_stays_with_a_float32_state(mode):
    for run in ("float32", mode):
        assert_promised_layout(run, *short_run(run)[:2])
    expected, losses = short_run("float32")[2], short_run(mode)[2]
    assert expected[2] < expected[0] - 0.05
    np.testing.assert_allclose(losses, expected, rtol=3e-5)  # measured 3e-7 and 3e-6


@pytest.mark.parametrize("mode", ["bfloat16", "fp8_lm"])
def test_a_checkpoint_brings_every_bit_back_on_this_mesh_and_on_another(mode, tmp_path):
    config = config_for(state_dtype=mode)
    state = random_state(build_program(config, mesh_of(*SIZES)))
    store.claim_workdir(tmp_path, config)
    saving = store.Store(tmp_path, config.checkpoint, print)
    saving.save(3, to_items(state), manifest.facts(config, {}, {"row": 7}, None))
    saving.close()
    for sizes in (SIZES, (1, 4, 2)):
        program = build_program(config, mesh_of(*sizes))
        loading = store.Store(tmp_path, config.checkpoint, print)
        step, items, facts = loading.restore_newest(
            lambda facts, program=program: to_items(program.state)
        )
        restored = from_items(items)
        loading.close()
        assert step == 3 and facts["position"] == {"row": 7}
        assert_same(restored, state)
        for leaf, sharding in zip(
            jax.tree.leaves(restored), jax.tree.leaves(program.shardings), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    run = Run(Place(tmp_path))
    assert run.cfg == config.model
    shardings = build_program(config, mesh_of(*SIZES)).shardings.params
    plain = jax.tree.map(lambda leaf: getattr(leaf, "value", leaf), shardings, is_leaf=is_scaled)
    params = run.read(plain)
    assert_same(params, load_params(state.params))
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.heavy
@pytest.mark.parametrize("mode", ["float32", "fp8_lm"])
def test_a_skipped_step_changes_no_bit_of_parameters_and_moments(mode):
    (program, step), before = compiled_step(mode), short_run(mode)[1]
    spoiled = batch() | {"loss_weights": np.where(batch()["loss_weights"], np.float32("nan"), 0)}
    calm = before.guard._replace(mean_norm=before.guard.mean_norm / 1000)

    def after(numbers, guard=before.guard):
        copy = jax.tree.map(
            lambda a: jax.device_put(np.asarray(a), a.sharding), before._replace(guard=guard)
        )  # the step donates it
        return step(copy, step_lib.place_batch(program, numbers))

    for is_accepted, (state, metrics) in (
        (True, after(batch())),
        (False, after(spoiled)),
        (False, after(batch(), calm)),
    ):
        assert int(metrics["num_updates"]) == 3 and int(state.step) == 4
        assert (
            int(metrics["skipped_in_row"])
            == int(metrics["num_skipped"])
            == int(state.guard.num_skipped)
            == 1 - is_accepted
        )
        if not is_accepted:
            assert_same((state.params, state.opt_state), (before.params, before.opt_state))
            assert int(state.guard.num_accepted) == 3
    with pytest.raises(AssertionError):
        assert_same(after(batch())[0].params, before.params)


def test_the_guard_follows_the_mean_of_the_accepted_norms():
    rng, cfg, state, kept, mean = (
        np.random.default_rng(0),
        OptimizerConfig(spike_factor=3.0, spike_after=5),
        guard.new_guard(),
        [],
        0.0,
    )
    for number in range(300):
        norm = rng.uniform(0.5, 1.5) * (10 if number % 7 == 6 else 1)
        accepted = guard.accepts(cfg, state, jnp.float32(2.0), jnp.float32(norm))
        assert bool(accepted) == (len(kept) < 5 or norm <= 3.0 * mean)
        state = guard.after_step(state, jnp.float32(norm), accepted)
        if accepted:
            kept.append(norm)
            mean = np.mean(kept) if len(kept) <= 100 else mean + (norm - mean) / 100
        np.testing.assert_allclose(state.mean_norm, mean, rtol=1e-4)
    assert (
        (int(state.num_accepted), int(state.num_skipped), int(state.num_in_row))
        == (258, 42, 0)
        == (len(kept), 300 - len(kept), 0)
    )


@pytest.mark.parametrize("loss", [1.0, np.nan, np.inf])
@pytest.mark.parametrize("norm", [1e6, np.nan, np.inf])
def test_what_is_not_finite_is_never_accepted(loss, norm):
    for cfg in (OptimizerConfig(), OptimizerConfig(spike_factor=1e9, spike_after=1)):
        accepted = guard.accepts(cfg, guard.new_guard(), jnp.float32(loss), jnp.float32(norm))
        assert bool(accepted) == np.isfinite([loss, norm]).all()


# A state in another dtype


@pytest.mark.cases(2)
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("mode", "other"),
    [
        ("bfloat16", "float32"),
        ("fp8_lm", "float32"),
        ("float32", "bfloat16"),
        ("float32", "fp8_lm"),
    ],
)
def test_a_state_is_converted_to_another_dtype(mode, other):
    state = short_run("float32")[1]
    if mode != "float32":
        state = convert(compiled_step(mode)[0], state)
    program = build_program(config_for(state_dtype=other), mesh_of(*SIZES))
    converted = convert(program, state)
    assert_promised_layout(other, program, converted)
    assert (converted.step, converted.guard) == (state.step, state.guard)
    for tree, tolerance in ((state.params, 1e-3), (moments(state), 0.07)):  # float16, float8
        other_tree = converted.params if tree is state.params else moments(converted)
        for got, want in zip(
            jax.tree.leaves(load_params(other_tree)),
            jax.tree.leaves(load_params(tree)),
            strict=True,
        ):
            assert_close(got, want, tolerance)
    if other == "float32":
        back = convert(compiled_step(mode)[0], converted)
        assert_same(load_params(back.params), load_params(state.params))
        if mode == "bfloat16":  # float8 chooses its scales anew, which moves its smallest numbers
            assert_same(back, state)


def moments(state):
    """(first moments, roots of the second ones)"""
    if hasattr(state.opt_state, "root_nu"):
        return state.opt_state.mu, state.opt_state.root_nu
    (adam,) = (part for part in state.opt_state if hasattr(part, "nu"))
    return jax.tree.map(
        lambda a: a.astype(jnp.float32), (adam.mu, jax.tree.map(jnp.sqrt, adam.nu))
    )


def test_bench_prefills_from_a_state_of_scaled_matrices():
    config = config_for(state_dtype="fp8_lm")
    program = build_program(config, mesh_of(*SIZES))
    assert speed.prefill_tokens_per_second(config, program, random_state(program).params, 1) > 0
