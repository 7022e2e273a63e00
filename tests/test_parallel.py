"""Meshes, the table from logical names to mesh axes, and the island with its collectives."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fast_jit, mesh_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from hunyuan_jax import presets
from hunyuan_jax.config import ConfigError, MeshConfig
from hunyuan_jax.parallel import island, rules
from hunyuan_jax.parallel.mesh import AXES, make_mesh, resolve_sizes, single_device_mesh
from hunyuan_jax.train.state import abstract_model

# Mesh sizes


@pytest.mark.parametrize(
    ("sizes", "num_devices", "expected"),
    [
        ({}, 8, (1, 8, 1, 1)),
        ({"expert": 4}, 8, (1, 2, 4, 1)),
        ({"data": 2, "expert": -1, "tensor": 2}, 8, (1, 2, 2, 2)),
        ({"replica": 2, "data": 1, "tensor": -1}, 8, (2, 1, 1, 4)),
        ({"data": 1}, 1, (1, 1, 1, 1)),
        ({"data": 32, "expert": 16}, 512, (1, 32, 16, 1)),
    ],
)
def test_sizes_are_resolved(sizes, num_devices, expected):
    assert resolve_sizes(MeshConfig(**sizes), num_devices) == expected


@pytest.mark.parametrize(
    ("sizes", "num_devices"),
    [({"data": 3}, 8), ({"data": 16}, 8), ({"data": 4}, 8), ({"expert": 3}, 8), ({"expert": 16}, 8), ({"data": 2, "expert": 2}, 8)],
)
def test_sizes_that_do_not_use_the_devices_exactly_are_refused(sizes, num_devices):
    cfg = MeshConfig(**sizes)
    written = re.escape(f"replica {cfg.replica} x data {cfg.data} x expert {cfg.expert} x tensor {cfg.tensor}")
    with pytest.raises(ConfigError, match=rf"config\.mesh = {written} does not use the {num_devices} devices.*Set one axis to -1"):
        resolve_sizes(cfg, num_devices)


def test_mesh_has_the_four_axes_over_the_given_devices():
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    assert mesh.axis_names == AXES == ("replica", "data", "expert", "tensor")
    assert dict(mesh.shape) == {"replica": 1, "data": 2, "expert": 2, "tensor": 2}
    assert mesh.devices.ravel().tolist() == jax.devices()  # the tensor axis, with the most traffic, lies on neighbours
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh(MeshConfig(), jax.devices()[3:5]).devices.ravel().tolist() == jax.devices()[3:5]
    assert single_device_mesh().devices.ravel().tolist() == jax.devices()[:1]


# The table


def test_the_table_names_only_mesh_axes_and_none_twice():
    for name, axes in rules.RULES.items():
        assert set(axes) <= set(AXES) and len(set(axes)) == len(axes), name


def test_specs_of_the_design():
    # Architecture, section 4.
    specs = {
        ("batch", "seq", "act_embed"): PartitionSpec(("replica", "data", "expert"), None, None),
        ("experts", "expert_embed", "ffn"): PartitionSpec(("expert",), ("data",), ("tensor",)),
        ("embed", "heads", "head_dim"): PartitionSpec(("data", "expert"), ("tensor",), None),
        ("vocab", "embed"): PartitionSpec(("tensor",), ("data", "expert")),
        (): PartitionSpec(),
    }
    assert {logical: rules.partition_spec(logical) for logical in specs} == specs


@pytest.mark.parametrize(
    ("logical", "axis"),
    [
        (("experts", "embed", "ffn"), "expert"),
        (("heads", "ffn"), "tensor"),
        (("batch", "seq", "embed"), "data"),
        (("vocab", "vocab"), "tensor"),
    ],
)
def test_two_dims_on_one_axis_are_refused(logical, axis):
    with pytest.raises(ConfigError, match=rf"{re.escape(str(logical))} put the mesh axis '{axis}' on more than one dim"):
        rules.partition_spec(logical)
    with pytest.raises(ConfigError, match="more than one dim"):
        rules.sharding(mesh_of(2, 2, 2), logical, (8,) * len(logical))


@pytest.mark.parametrize("logical", [("batch", "sequence"), ("EMBED",)])
def test_an_unknown_logical_name_is_an_error(logical):
    with pytest.raises(KeyError, match=logical[-1]):
        rules.partition_spec(logical)


def test_a_dim_that_does_not_divide_is_refused_with_what_to_change():
    message = (
        r"groups/layer_0/attn/wk_DKH \(16, 6, 4\): dim 1 \(kv_heads, size 6\) does not divide over mesh axes tensor = 4; "
        r"use 3 ways there, or a size of 8\."
    )
    with pytest.raises(ConfigError, match=message):
        rules.sharding(mesh_of(1, 2, 4), ("embed", "kv_heads", "head_dim"), (16, 6, 4), "groups/layer_0/attn/wk_DKH")
    with pytest.raises(ConfigError, match=r"tensor \(7, 16\): dim 0 \(batch, size 7\) .* replica x data x expert = 8; use 7 ways .* of 8"):
        rules.sharding(mesh_of(2, 4, 1), ("batch", "seq"), (7, 16))
    assert rules.sharding(mesh_of(2, 4, 1), ("batch", "seq")).spec == rules.partition_spec(("batch", "seq"))  # no shape, no check


@settings(deadline=None, derandomize=True)
@given(size=st.integers(1, 300), data=st.sampled_from([1, 2, 4]), expert=st.sampled_from([1, 2]))
def test_the_remedies_in_the_message_work(size, data, expert):
    ways = data * expert
    mesh = mesh_of(data, expert, 1)
    if size % ways == 0:
        assert rules.sharding(mesh, ("embed",), (size,)).shard_shape((size,)) == (size // ways,)
        return
    with pytest.raises(ConfigError) as caught:
        rules.sharding(mesh, ("embed",), (size,))
    fits, other_size = map(int, re.search(r"use (\d+) ways there, or a size of (\d+)", str(caught.value)).groups())
    assert size % fits == 0 and 1 <= fits < ways
    assert size < other_size < size + ways and other_size % ways == 0


def test_constrain_pins_the_layout():
    mesh = mesh_of(2, 2, 2)
    x = jax.jit(lambda x: rules.constrain(x * 2, mesh, ("batch", "seq", "act_embed")))(jnp.ones((8, 4, 2)))
    assert x.sharding.is_equivalent_to(rules.sharding(mesh, ("batch", "seq", "act_embed")), 3)
    assert x.sharding.shard_shape(x.shape) == (2, 4, 2)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 2)])
def test_every_matrix_is_split_over_all_chips(sizes):
    # What is left whole on a chip costs its memory: only norms, biases, and the few columns of the router over the tensor axis may be.
    mesh = mesh_of(*sizes)
    _, shapes, shardings = abstract_model(presets.tiny(), mesh)
    for (path, leaf), sharding in zip(jax.tree.leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        ways = math.prod(leaf.shape) // math.prod(sharding.shard_shape(leaf.shape))
        if "norm" in name:
            assert ways == 1, name
        elif "router" in name:
            assert ways == math.prod(sizes[:2]), name
        else:
            assert ways == math.prod(sizes), name


# The island


def run(fn, mesh, in_logical, out_logical, *args):
    return np.asarray(fast_jit(island.island(fn, mesh, in_logical, out_logical))(*args))


SIZES = [(1, 1, 1), (2, 2, 2), (1, 8, 1), (8, 1, 1), (1, 1, 8)]


@pytest.mark.parametrize("sizes", SIZES)
def test_shards_know_their_place(sizes):
    data, expert, tensor = sizes
    mesh = mesh_of(*sizes)

    def body(x_B):
        count = jnp.full_like(x_B, island.num_shards("batch") * 100 + island.num_shards("ffn"))
        return jnp.full_like(x_B, island.shard_index("batch")), count

    index_B, count_B = fast_jit(island.island(body, mesh, (("batch",),), (("batch",), ("batch",))))(jnp.zeros(16, jnp.int32))
    np.testing.assert_array_equal(index_B, np.arange(16) // (16 // (data * expert)))
    np.testing.assert_array_equal(count_B, np.full(16, data * expert * 100 + tensor))


@pytest.mark.parametrize("sizes", SIZES)
def test_exchange_moves_rows_to_the_experts_shard_and_back(sizes):
    # Seen from outside, the array stays as it is: tokens were spread over data and expert, afterwards experts are.
    mesh = mesh_of(*sizes)
    x_EBD = np.random.default_rng(0).normal(size=(8, 16, 3)).astype(np.float32)
    by_token, by_expert = ("seq", "batch", "act_embed"), ("experts", "expert_embed", "act_embed")
    to_experts = functools.partial(island.exchange, logical="experts", split_dim=0, concat_dim=1)
    to_tokens = functools.partial(island.exchange, logical="experts", split_dim=1, concat_dim=0)
    np.testing.assert_array_equal(run(to_experts, mesh, (by_token,), by_expert, x_EBD), x_EBD)
    np.testing.assert_array_equal(run(to_tokens, mesh, (by_expert,), by_token, x_EBD), x_EBD)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("logical", ["batch", "embed", "experts", "ffn"])
def test_gather_and_reductions(sizes, logical):
    mesh = mesh_of(*sizes)
    num_shards = math.prod(mesh.shape[axis] for axis in rules.RULES[logical])
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    split, whole = (logical, "seq"), ("seq", "seq")
    np.testing.assert_array_equal(run(functools.partial(island.gather, logical=logical, dim=0), mesh, (split,), whole, x), x)

    def numbered(a):
        return a * (1 + island.shard_index(logical)).astype(a.dtype)

    total = num_shards * (num_shards + 1) / 2
    scattered = run(lambda a: island.reduce_scatter(numbered(a), logical, dim=0), mesh, (whole,), split, x)
    np.testing.assert_allclose(scattered, total * x, rtol=1e-5)
    np.testing.assert_allclose(run(lambda a: island.reduce_sum(numbered(a), logical), mesh, (whole,), whole, x), total * x, rtol=1e-5)
