"""The released models at their real sizes: train step, decoding step, cache and shardings are
traced, nothing is allocated.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from hunyuan_jax import presets
from hunyuan_jax.config import (
    Config,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from hunyuan_jax.layers.ffn.moe import routing
from hunyuan_jax.model.cache import empty_cache
from hunyuan_jax.model.count import count
from hunyuan_jax.parallel import mesh as mesh_lib
from hunyuan_jax.params.abstract import structs
from hunyuan_jax.params.roles import LOW_PRECISION_ROLES
from hunyuan_jax.train.state import abstract_model, build_program
from hunyuan_jax.train.step import abstract_batch, make_train_step

RELEASED = ("a52b", "a52b_instruct", "a13b")


def preset(name, dispatch):
    cfg = getattr(presets, name)()
    return dataclasses.replace(
        cfg,
        moe=dataclasses.replace(
            cfg.moe, dispatch=dispatch, aux_loss_weight=0.01, z_loss_weight=0.001
        ),
    )


def abstract_mesh(**sizes):
    shape = mesh_lib.resolve_sizes(MeshConfig(**sizes), math.prod(sizes.values()))
    return AbstractMesh(shape, mesh_lib.AXES, axis_types=(AxisType.Auto,) * len(mesh_lib.AXES))


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def shapes(tree):
    return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


def traced_train_step(cfg, mesh, batch_size):
    """(state before, state after, metrics) of the production step at the model's full context."""
    train = TrainConfig(batch_size=batch_size, seq_len=cfg.max_position)
    program = build_program(Config(model=cfg, schedule=ScheduleConfig(), train=train), mesh)
    state = program.state
    return state, *jax.eval_shape(make_train_step(program), state, abstract_batch(program))


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("name", "dispatch"),
    [
        ("a52b", "recycle"),
        ("a13b", "dropless"),
        *(
            pytest.param(name, dispatch, marks=pytest.mark.slow)
            for name in RELEASED
            for dispatch in ("dropless", "recycle")
            if (name, dispatch) not in (("a52b", "recycle"), ("a13b", "dropless"))
        ),
    ],
)
def test_train_step_at_full_size_and_context(name, dispatch):
    cfg = preset(name, dispatch)
    before, after, metrics = traced_train_step(cfg, mesh_lib.single_device_mesh(), batch_size=1)
    assert shapes(after) == shapes(before)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(after.params)) == count(cfg).total
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {np.dtype(np.float32)}
    assert metrics["load_LE"].shape == (cfg.num_layers, cfg.moe.num_experts)
    assert all(metrics[key].shape == () for key in ("loss", "grad_norm", "aux_loss", "z_loss"))
    assert all(
        metrics[key].shape == (cfg.num_layers,) for key in ("recycled_L", "dropped_L", "entropy_L")
    )
    counts = {"num_updates", "num_skipped", "skipped_in_row"}
    for name, metric in metrics.items():
        assert metric.dtype == (jnp.int32 if name in counts else jnp.float32), name


@pytest.mark.parametrize("name", RELEASED)
def test_decoding_step_with_a_full_cache(name):
    cfg = dataclasses.replace(preset(name, "dropless"), remat="none")
    graph_def, specs = abstract_model(cfg, mesh_lib.single_device_mesh())

    def step(params, cache, token_B):
        model = nnx.merge(graph_def, params)
        output = model.decode(token_B, cache)
        assert output.hidden_BTD.dtype == jnp.bfloat16
        return model.logits(output.hidden_BTD), output.cache

    cache = jax.eval_shape(lambda: empty_cache(cfg, 2, cfg.max_position))
    logits_BTV, new_cache = jax.eval_shape(
        step, structs(specs), cache, jax.ShapeDtypeStruct((2,), jnp.int32)
    )
    assert (logits_BTV.shape, logits_BTV.dtype) == ((2, 1, cfg.vocab_size), jnp.float32)
    assert shapes(new_cache) == shapes(cache)


@pytest.mark.parametrize(
    ("name", "bytes_per_token"), [("a52b", 81_920), ("a52b_instruct", 81_920), ("a13b", 131_072)]
)
def test_cache_of_a_full_sequence(name, bytes_per_token):
    cfg = preset(name, "dropless")
    cache = jax.eval_shape(lambda: empty_cache(cfg, 1, cfg.max_position))
    pair = jax.tree.leaves(cache.entries)
    assert pair[0].shape[0] == cfg.num_groups == 32
    assert (
        sum(math.prod(a.shape) * a.dtype.itemsize for a in pair)
        == bytes_per_token * cfg.max_position
    )
    assert count(cfg).kv_bytes_per_token == bytes_per_token


@pytest.mark.parametrize(
    ("name", "slots"),
    [("a52b", 262_144 // 16), ("a52b_instruct", 131_072 // 16), ("a13b", 8 * 32_768 // 64)],
)
def test_capacity_of_a_full_sequence(name, slots):
    cfg = preset(name, "recycle")
    assert routing.capacity(cfg.moe, routing.group_size(cfg.moe, 1, cfg.max_position)) == slots


# The recipe's meshes, configs/a52b.py: 64 to 4096 chips.
RECIPE_MESHES = [
    (1, 4),
    (1, 8),
    (1, 16),
    (1, 32),
    (2, 32),
    (4, 32),
    (8, 32),
]  # (replica, data), with expert 16


@functools.cache
def recipe_state(replica, data, state_dtype):
    """The full a52b state on the recipe's mesh: shapes, dtypes and shardings."""
    mesh = abstract_mesh(replica=replica, data=data, expert=16, tensor=1)
    train = TrainConfig(
        batch_size=max(1024, mesh.size), seq_len=4096, grad_accum_steps=max(1, 1024 // mesh.size)
    )
    config = Config(
        model=presets.a52b(),
        optimizer=OptimizerConfig(state_dtype=state_dtype),
        schedule=ScheduleConfig(),
        train=train,
    )
    program = build_program(config, mesh)
    for array in abstract_batch(program).values():
        assert array.sharding.shard_shape(array.shape) == (train.batch_size // mesh.size, 4096)
    return program.state


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "fp8_lm"])
def test_no_leaf_of_the_state_above_one_mebibyte_is_replicated(state_dtype):
    num_large = 0
    for path, leaf in jax.tree.leaves_with_path(recipe_state(1, 32, state_dtype)):
        if leaf.size * leaf.dtype.itemsize > 2**20:
            # Over all 512 chips, not just some: a matrix's shards add up to the matrix.
            assert math.prod(leaf.sharding.shard_shape(leaf.shape)) * 512 == leaf.size, (
                jax.tree_util.keystr(path)
            )
            num_large += 1
    specs = abstract_model(presets.a52b(), mesh_lib.single_device_mesh())[1]
    matrices = [spec for spec in jax.tree.leaves(specs) if spec.role in LOW_PRECISION_ROLES]
    assert num_large >= 3 * len(matrices) > 3 * 15


@pytest.mark.parametrize(("replica", "data"), RECIPE_MESHES)
def test_the_recipe_lays_its_state_out_evenly_on_64_to_4096_chips(replica, data):
    state = recipe_state(replica, data, "float32")
    per_chip = sum(
        4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state)
    )
    even = 12 * count(presets.a52b()).total / (16 * data)
    assert even <= per_chip < 1.01 * even


PODS = {
    "a52b on 512": ("a52b", abstract_mesh(replica=1, data=16, expert=16, tensor=2)),
    "a52b on 2 x 256": ("a52b", abstract_mesh(replica=2, data=16, expert=16, tensor=1)),
    "a52b_instruct on 512": (
        "a52b_instruct",
        abstract_mesh(replica=1, data=8, expert=16, tensor=4),
    ),
    "a13b on 256": ("a13b", abstract_mesh(replica=1, data=4, expert=64, tensor=1)),
}


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "pod",
    [
        "a52b on 512",
        "a13b on 256",
        *(pytest.param(pod, marks=pytest.mark.slow) for pod in PODS if "2 x" in pod),
        *(pytest.param(pod, marks=pytest.mark.slow) for pod in PODS if "instruct" in pod),
    ],
)
def test_train_step_of_a_pod(pod):
    name, mesh = PODS[pod]
    before, after, metrics = traced_train_step(preset(name, "recycle"), mesh, batch_size=mesh.size)
    assert shapes(after) == shapes(before)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("pod", PODS)
def test_parameters_and_moments_are_spread_evenly_over_a_pod(pod):
    name, mesh = PODS[pod]
    program = build_program(
        Config(model=preset(name, "recycle"), train=TrainConfig(seq_len=4096)), mesh
    )
    state = program.state

    def bytes_per_chip(tree):
        return sum(
            4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree)
        )

    even = 4 * count(preset(name, "recycle")).total / (mesh.size // mesh.shape["replica"])
    assert even <= bytes_per_chip(state.params) < 1.02 * even
    assert 2 * even <= bytes_per_chip(state.opt_state) < 2 * 1.02 * even
