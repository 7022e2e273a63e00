"""The released models at their real sizes: loss, gradients, cache and shardings are traced, nothing is allocated."""

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
from hunyuan_jax.config import MeshConfig
from hunyuan_jax.model import loss, routing
from hunyuan_jax.model.cache import empty_cache
from hunyuan_jax.model.count import count
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel import mesh as mesh_lib
from hunyuan_jax.parallel import rules

RELEASED = ("a52b", "a52b_instruct", "a13b")


def preset(name, dispatch):
    cfg = getattr(presets, name)()
    return dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, dispatch=dispatch))


@functools.cache
def traced_step(name, dispatch, mesh=None, batch_size=1):
    """(shapes of the parameters, shapes of ((loss, stats), gradients)) of one step at the preset's full context."""
    cfg = preset(name, dispatch)
    mesh = mesh_lib.single_device_mesh() if mesh is None else mesh
    graph_def, state = nnx.split(nnx.eval_shape(functools.partial(Transformer, cfg, mesh), jax.random.key(0)))

    def loss_fn(state, tokens_BT, targets_BT, key):
        model = nnx.merge(graph_def, state)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        output = model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT), key=key, is_training=True)
        logits_BTV = model.logits(output.hidden_BTD)
        assert (logits_BTV.shape, logits_BTV.dtype) == ((*tokens_BT.shape, cfg.vocab_size), jnp.float32)
        assert output.hidden_BTD.dtype == cfg.dtype
        total = loss.cross_entropy(logits_BTV, targets_BT, jnp.ones(targets_BT.shape)) + loss.router_loss(output.stats, cfg.moe)
        return total, output.stats

    tokens_BT = jax.ShapeDtypeStruct((batch_size, cfg.max_position), jnp.int32)
    return state, jax.eval_shape(jax.value_and_grad(loss_fn, has_aux=True), state, tokens_BT, tokens_BT, jax.random.key(0))


@pytest.mark.parametrize("dispatch", ["dropless", "recycle"])
@pytest.mark.parametrize("name", RELEASED)
def test_training_step_at_full_size_and_context(name, dispatch):
    cfg = preset(name, dispatch)
    state, ((total, stats), grads) = traced_step(name, dispatch)
    assert (total.shape, total.dtype) == ((), jnp.float32)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(grads)) == count(cfg).total
    assert jax.tree.map(lambda a: (a.shape, a.dtype), grads) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype(np.float32)}
    assert stats["load_E"].shape == (cfg.num_groups, cfg.cla_share_factor, cfg.moe.num_experts)
    assert stats["aux_loss"].shape == (cfg.num_groups, cfg.cla_share_factor)


@pytest.mark.parametrize(("name", "slots"), [("a52b", 262_144 // 16), ("a52b_instruct", 131_072 // 16), ("a13b", 8 * 32_768 // 64)])
def test_capacity_of_a_full_sequence(name, slots):
    cfg = preset(name, "recycle")
    assert routing.capacity(cfg.moe, routing.group_size(cfg.moe, 1, cfg.max_position)) == slots


@pytest.mark.parametrize(("name", "bytes_per_token"), [("a52b", 81_920), ("a52b_instruct", 81_920), ("a13b", 131_072)])
def test_cache_of_a_full_sequence(name, bytes_per_token):
    cfg = preset(name, "dropless")
    cache = jax.eval_shape(lambda: empty_cache(cfg, 1, cfg.max_position))
    assert cache.k_PBSKH.shape[0] == cfg.num_groups == 32
    pair = (cache.k_PBSKH, cache.v_PBSKH)
    assert sum(math.prod(a.shape) * a.dtype.itemsize for a in pair) == bytes_per_token * cfg.max_position
    assert count(cfg).kv_bytes_per_token == bytes_per_token


@pytest.mark.parametrize("name", RELEASED)
def test_decoding_step_with_a_full_cache(name):
    cfg = dataclasses.replace(preset(name, "dropless"), remat="none")
    graph_def, state = nnx.split(nnx.eval_shape(functools.partial(Transformer, cfg, mesh_lib.single_device_mesh()), jax.random.key(0)))

    def step(state, cache, token_B1):
        model = nnx.merge(graph_def, state)
        output = model(token_B1, token_B1, jnp.ones_like(token_B1), cache=cache)
        return model.logits(output.hidden_BTD), output.cache

    cache = jax.eval_shape(lambda: empty_cache(cfg, 2, cfg.max_position))
    logits_BTV, new_cache = jax.eval_shape(step, state, cache, jax.ShapeDtypeStruct((2, 1), jnp.int32))
    assert logits_BTV.shape == (2, 1, cfg.vocab_size)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new_cache) == jax.tree.map(lambda a: (a.shape, a.dtype), cache)


def abstract_mesh(**sizes):
    shape = mesh_lib.resolve_sizes(MeshConfig(**sizes), math.prod(sizes.values()))
    return AbstractMesh(shape, mesh_lib.AXES, axis_types=(AxisType.Auto,) * len(mesh_lib.AXES))


# (mesh, most GiB that the float32 masters may take on a chip): 512 chips hold 1448 GiB of a52b in even parts.
PODS = [
    ("a52b", abstract_mesh(replica=1, data=16, expert=16, tensor=2), 2.9),
    ("a52b", abstract_mesh(replica=2, data=32, expert=8, tensor=1), 5.8),
    ("a52b_instruct", abstract_mesh(replica=1, data=8, expert=16, tensor=4), 2.9),
    ("a13b", abstract_mesh(replica=1, data=4, expert=64, tensor=1), 1.3),
]


@pytest.mark.parametrize(("name", "mesh", "most_gib"), PODS)
def test_parameters_divide_over_a_pod(name, mesh, most_gib):
    state, _ = traced_step(name, "recycle")
    num_bytes = 0
    for path, leaf in nnx.to_flat_state(state):
        logical, shape = leaf.get_metadata("logical"), leaf.get_value().shape
        logical = ("layers", *logical) if path[0] == "groups" else logical
        assert len(logical) == len(shape), path
        num_bytes += 4 * math.prod(rules.sharding(mesh, logical, shape, "/".join(map(str, path))).shard_shape(shape))
    assert num_bytes / 2**30 < most_gib


def test_training_step_of_a_pod():
    _, mesh, _ = PODS[0]
    state, ((total, _), grads) = traced_step("a52b", "recycle", mesh, batch_size=256)
    assert total.shape == ()
    assert jax.tree.map(lambda a: a.shape, grads) == jax.tree.map(lambda a: a.shape, state)
