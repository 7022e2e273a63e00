"""Meshes, the table from logical names to mesh axes, and the island with its collectives."""

import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from hunyuan_jax import presets
from hunyuan_jax.config import Config, MeshConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.parallel import island, rules
from hunyuan_jax.parallel.mesh import AXES, make_mesh, resolve_sizes, single_device_mesh
from hunyuan_jax.train.state import abstract_model
from support.models import fast_jit, mesh_of

# Mesh sizes


@pytest.mark.parametrize(
    ("sizes", "num_devices", "expected"),
    [
        ({}, 8, (1, 8, 1, 1, 1)),
        ({"expert": 4}, 8, (1, 2, 1, 4, 1)),
        ({"data": 2, "expert": -1, "tensor": 2}, 8, (1, 2, 1, 2, 2)),
        ({"replica": 2, "data": 1, "tensor": -1}, 8, (2, 1, 1, 1, 4)),
        ({"data": 1}, 1, (1, 1, 1, 1, 1)),
        ({"context": 4}, 8, (1, 2, 4, 1, 1)),
        ({"data": 32, "expert": 16}, 512, (1, 32, 1, 16, 1)),
    ],
)
def test_sizes_are_resolved(sizes, num_devices, expected):
    assert resolve_sizes(MeshConfig(**sizes), num_devices) == expected


@pytest.mark.parametrize(
    ("sizes", "num_devices"),
    [
        ({"data": 3}, 8),
        ({"data": 16}, 8),
        ({"data": 4}, 8),
        ({"expert": 3}, 8),
        ({"expert": 16}, 8),
        ({"data": 2, "expert": 2}, 8),
    ],
)
def test_sizes_that_do_not_use_the_devices_exactly_are_refused(sizes, num_devices):
    cfg = MeshConfig(**sizes)
    written = re.escape(
        f"replica {cfg.replica} x data {cfg.data} x context {cfg.context} x expert {cfg.expert} "
        f"x tensor {cfg.tensor}"
    )
    with pytest.raises(
        ConfigError,
        match=rf"config\.mesh = {written} does not use the {num_devices} devices.*Set one axis to "
        r"-1",
    ):
        resolve_sizes(cfg, num_devices)


def test_mesh_has_the_five_axes_over_the_given_devices():
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    assert mesh.axis_names == AXES == ("replica", "data", "context", "expert", "tensor")
    assert dict(mesh.shape) == {
        "replica": 1,
        "data": 2,
        "context": 1,
        "expert": 2,
        "tensor": 2,
    }
    assert (
        mesh.devices.ravel().tolist() == jax.devices()
    )  # the tensor axis, with the most traffic, lies on neighbours
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert (
        make_mesh(MeshConfig(), jax.devices()[3:5]).devices.ravel().tolist() == jax.devices()[3:5]
    )
    assert single_device_mesh().devices.ravel().tolist() == jax.devices()[:1]


def fake_slices(*slices):
    """Devices that say no more than which slice they belong to; real topologies are in
    test_meshes_tpu.py.
    """
    return [
        types.SimpleNamespace(platform="gpu", device_kind="fake", slice_index=index)
        for index in slices
    ]


def test_replica_needs_no_slices():
    mesh = make_mesh(MeshConfig(replica=2, expert=2))
    assert dict(mesh.shape) == {
        "replica": 2,
        "data": 2,
        "context": 1,
        "expert": 2,
        "tensor": 1,
    }
    assert mesh.devices.ravel().tolist() == jax.devices()


def test_slices_that_do_not_fit_are_refused():
    with pytest.raises(
        ConfigError,
        match=r"num_slices = 2, but the 8 devices form 1 slice\(s\); the two must be equal\. Set "
        r".* to 1 ",
    ):
        make_mesh(MeshConfig(replica=2, num_slices=2))
    with pytest.raises(ConfigError, match=r"num_slices = 2, but the 6 devices form 3 slice\(s\)"):
        make_mesh(MeshConfig(replica=2, num_slices=2), fake_slices(0, 0, 1, 1, 2, 2))
    with pytest.raises(
        ConfigError,
        match=r"config\.mesh\.replica = 3 is not divisible by config\.mesh\.num_slices = 2; .* a "
        r"multiple of 2",
    ):
        make_mesh(MeshConfig(replica=3, num_slices=2), fake_slices(0, 0, 0, 1, 1, 1))
    with pytest.raises(
        ConfigError,
        match=r"config\.mesh = replica 2 x data 2 .* cannot be laid out on these 4 devices "
        r"\(fake\)",
    ):
        make_mesh(MeshConfig(replica=2, num_slices=2), fake_slices(0, 0, 0, 1))


@pytest.mark.parametrize("num_slices", [0, -1])
def test_num_slices_is_a_count_and_no_axis(num_slices):
    Config(model=presets.tiny(), mesh=MeshConfig(replica=2, num_slices=2))
    with pytest.raises(
        ConfigError, match=rf"config\.mesh\.num_slices = {num_slices} must be at least 1"
    ):
        MeshConfig(num_slices=num_slices)


# The table


def test_the_table_names_only_mesh_axes_and_none_twice():
    for name, (compute, storage) in rules.RULES.items():
        axes = compute + storage
        assert set(axes) <= set(AXES) and len(set(axes)) == len(axes), name


def test_specs_of_the_design():
    # Architecture, section 4; parameters in storage are spread over all axes, over several dims.
    assert rules.partition_spec(("batch", "seq", "embed")) == PartitionSpec(
        ("replica", "data", "expert"), ("context",), None
    )
    stored = {
        ("experts", "embed", "expert_ffn"): PartitionSpec(
            ("expert",), ("data", "context"), ("tensor",)
        ),
        ("embed", "heads", "head_dim"): PartitionSpec(
            ("data", "context"), ("tensor",), ("expert",)
        ),
        ("embed", "kv_heads", "head_dim"): PartitionSpec(
            ("data", "context"), ("tensor",), ("expert",)
        ),
        ("vocab", "embed"): PartitionSpec(("tensor", "expert"), ("data", "context")),
        (): PartitionSpec(),
    }
    assert {logical: rules.stored_spec(logical) for logical in stored} == stored
    in_use = {
        ("experts", "embed", "expert_ffn"): PartitionSpec(("expert",), None, ("tensor",)),
        ("embed", "heads", "head_dim"): PartitionSpec(None, ("tensor",), None),
    }
    assert {logical: rules.partition_spec(logical) for logical in in_use} == in_use


@pytest.mark.parametrize(
    ("logical", "axis"),
    [
        (("experts", "embed", "ffn"), "expert"),
        (("heads", "expert_ffn"), "tensor"),
        (("batch", "embed"), "data"),
        (("vocab", "vocab"), "tensor"),
    ],
)
def test_two_dims_on_one_axis_are_refused(logical, axis):
    with pytest.raises(
        ConfigError,
        match=rf"{re.escape(str(logical))} put the mesh axis '{axis}' on more than one dim",
    ):
        rules.stored_spec(logical)
    with pytest.raises(ConfigError, match="more than one dim"):
        rules.stored_sharding(mesh_of(2, 2, 2), logical, (8,) * len(logical))


@pytest.mark.parametrize("logical", [("batch", "sequence"), ("EMBED",)])
def test_an_unknown_logical_name_is_an_error(logical):
    with pytest.raises(KeyError, match=logical[-1]):
        rules.partition_spec(logical)


def test_a_dim_that_does_not_divide_is_refused_with_what_to_change():
    message = (
        r"groups/layer_0/attn/wk_DKH \(16, 6, 4\): dim 1 \(kv_heads, size 6\) does not divide "
        r"over mesh axes tensor = 4; "
        r"use 3 ways there, or a size of 8\."
    )
    with pytest.raises(ConfigError, match=message):
        rules.stored_sharding(
            mesh_of(1, 2, 4),
            ("embed", "kv_heads", "head_dim"),
            (16, 6, 4),
            "groups/layer_0/attn/wk_DKH",
        )
    with pytest.raises(
        ConfigError,
        match=r"tensor \(7, 16\): dim 0 \(batch, size 7\) .* replica x data x expert = 8; use 7 "
        r"ways .* of 8",
    ):
        rules.sharding(mesh_of(2, 4, 1), ("batch", "seq"), (7, 16))
    assert rules.sharding(mesh_of(2, 4, 1), ("batch", "seq")).spec == rules.partition_spec(
        ("batch", "seq")
    )  # no shape, no check


@settings(derandomize=True)
@given(size=st.integers(1, 300), tensor=st.sampled_from([1, 2, 4]), expert=st.sampled_from([1, 2]))
def test_the_remedies_in_the_message_work(size, tensor, expert):
    ways = tensor * expert
    mesh = mesh_of(1, expert, tensor)
    if size % ways == 0:
        assert rules.stored_sharding(mesh, ("ffn",), (size,)).shard_shape((size,)) == (
            size // ways,
        )
        return
    with pytest.raises(ConfigError) as caught:
        rules.stored_sharding(mesh, ("ffn",), (size,))
    fits, other_size = map(
        int, re.search(r"use (\d+) ways there, or a size of (\d+)", str(caught.value)).groups()
    )
    assert size % fits == 0 and 1 <= fits < ways
    assert size < other_size < size + ways and other_size % ways == 0


def test_constrain_pins_the_layout():
    mesh = mesh_of(2, 2, 2)
    x = jax.jit(lambda x: rules.constrain(x * 2, mesh, ("batch", "seq", "embed")))(
        jnp.ones((8, 4, 2))
    )
    assert x.sharding.is_equivalent_to(rules.sharding(mesh, ("batch", "seq", "embed")), 3)
    assert x.sharding.shard_shape(x.shape) == (2, 4, 2)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 2)])
def test_every_matrix_is_split_over_all_chips(sizes):
    # What is left whole on a chip costs its memory: only norms, biases, and the few columns of the
    # router over the tensor axis may be.
    mesh = mesh_of(*sizes)
    _, specs = abstract_model(presets.tiny(), mesh)
    for path, spec in jax.tree.leaves_with_path(specs):
        ways = math.prod(spec.shape) // math.prod(spec.sharding.shard_shape(spec.shape))
        expected = {"norm": 1, "router": math.prod(sizes[:2])}.get(spec.role, math.prod(sizes))
        assert ways == expected, path


# The island


def run(fn, mesh, in_logical, out_logical, *args):
    """fn in an island without parameters."""
    out = fast_jit(island.island(lambda _, *args: fn(*args), mesh, {}, in_logical, out_logical))(
        {}, *args
    )
    return jax.tree.map(np.asarray, out)


SIZES = [(1, 1, 1), (2, 2, 2), (1, 8, 1), (8, 1, 1), (1, 1, 8)]


@pytest.mark.parametrize("sizes", SIZES)
def test_shards_know_their_place(sizes):
    data, expert, tensor = sizes
    mesh = mesh_of(*sizes)

    def body(x_B):
        count = jnp.full_like(x_B, island.num_shards("batch") * 100 + island.num_shards("ffn"))
        return jnp.full_like(x_B, island.shard_index("batch")), count

    index_B, count_B = run(
        body, mesh, (("batch",),), (("batch",), ("batch",)), jnp.zeros(16, jnp.int32)
    )
    np.testing.assert_array_equal(index_B, np.arange(16) // (16 // (data * expert)))
    np.testing.assert_array_equal(count_B, np.full(16, data * expert * 100 + tensor))


@pytest.mark.parametrize("sizes", SIZES)
def test_exchange_transposes_parts_and_shards(sizes):
    mesh = mesh_of(*sizes)
    num_shards = sizes[1]
    x_BED = np.random.default_rng(0).normal(size=(num_shards, 8, 3)).astype(np.float32)
    exchange = lambda x_1ED: island.exchange(x_1ED[0], "experts")[None]  # noqa: E731
    y_BED = run(exchange, mesh, (("experts", "seq", "embed"),), ("experts", "seq", "embed"), x_BED)
    # Part i of shard j becomes part j of shard i; twice is once back.
    parts = x_BED.reshape(num_shards, num_shards, -1, 3)
    np.testing.assert_array_equal(y_BED.reshape(parts.shape), parts.swapaxes(0, 1))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("logical", ["batch", "experts", "ffn"])
def test_gather_and_reductions(sizes, logical):
    mesh = mesh_of(*sizes)
    num_shards = math.prod(mesh.shape[axis] for axis in rules.RULES[logical].compute)
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    split, whole = (logical, "row"), ("row", "row")
    np.testing.assert_array_equal(
        run(functools.partial(island.gather, logical=logical, dim=0), mesh, (split,), whole, x), x
    )

    def numbered(a):
        return a * (1 + island.shard_index(logical)).astype(a.dtype)

    total = num_shards * (num_shards + 1) / 2
    scattered = run(
        lambda a: island.reduce_scatter(numbered(a), logical, dim=0), mesh, (whole,), split, x
    )
    np.testing.assert_allclose(scattered, total * x, rtol=1e-5)
    np.testing.assert_allclose(
        run(lambda a: island.reduce_sum(numbered(a), logical), mesh, (whole,), whole, x),
        total * x,
        rtol=1e-5,
    )
    largest = run(
        lambda a: island.reduce_max(numbered(jnp.abs(a)), logical), mesh, (whole,), whole, x
    )
    np.testing.assert_allclose(largest, num_shards * np.abs(x), rtol=1e-5)


# Parameters from storage


STORED = [
    (("embed", "heads", "head_dim"), (16, 8, 8)),
    (("heads", "head_dim", "embed"), (8, 8, 16)),
    (("experts", "expert_ffn", "embed"), (8, 8, 16)),
    (("vocab", "embed"), (32, 16)),
]


def in_use(gather, mesh, logical, w, out_logical):
    """(the parameter in use, the gradient of the sum of its squares), seen from outside."""
    fn = island.island(gather, mesh, logical, (), out_logical)
    value_and_gradient = jax.vjp(
        fn, jax.device_put(w, rules.stored_sharding(mesh, logical, w.shape))
    )
    value, pullback = value_and_gradient
    return np.asarray(value), np.asarray(pullback(2 * value)[0])


@pytest.mark.cases(7)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("logical", "shape"), STORED)
def test_a_parameter_in_use_is_the_stored_one_and_its_gradient_comes_back(sizes, logical, shape):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    value, gradient = in_use(
        lambda w: island.gather_param(w, logical, jnp.float32),
        mesh_of(*sizes),
        logical,
        w,
        logical,
    )
    np.testing.assert_array_equal(value, w)
    np.testing.assert_allclose(gradient, 2 * w, rtol=1e-5)


@pytest.mark.cases(4)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("logical", "num_in"),
    [(("embed", "heads", "head_dim"), 1), (("heads", "head_dim", "embed"), 2)],
)
def test_a_matrix_in_use_is_flattened_in_order(sizes, logical, num_in):
    shape = {"embed": 16, "heads": 8, "head_dim": 8}
    w = np.random.default_rng(0).normal(size=[shape[name] for name in logical]).astype(np.float32)
    flat = ("embed", "heads") if num_in == 1 else ("heads", "embed")
    gather = functools.partial(
        island.gather_matrix, logical=logical, dtype=jnp.float32, num_in=num_in
    )
    value, gradient = in_use(gather, mesh_of(*sizes), logical, w, flat)
    np.testing.assert_array_equal(value, w.reshape(value.shape))
    np.testing.assert_allclose(gradient, 2 * w, rtol=1e-5)


@pytest.mark.parametrize("num_columns", [8, 500, 512])
def test_a_dim_in_tiles_is_filled_up_with_zeros_where_that_takes_little(num_columns):
    # 250 columns a shard become 256; 4 are left alone, and 256 are whole tiles.
    w = np.random.default_rng(0).normal(size=(4, num_columns)).astype(np.float32)
    gather = functools.partial(
        island.gather_padded, logical=("embed", "ffn"), dtype=jnp.float32, tiled="ffn"
    )
    value, gradient = in_use(gather, mesh_of(2, 2, 1), ("embed", "ffn"), w, ("row", "row"))
    filled = 512 if num_columns == 500 else num_columns
    parts = np.zeros((4, 2, filled // 2), np.float32)
    parts[..., : num_columns // 2] = w.reshape(4, 2, -1)
    np.testing.assert_array_equal(value, parts.reshape(4, filled))
    np.testing.assert_allclose(gradient, 2 * w, rtol=1e-5)


@pytest.mark.cases(2)
@pytest.mark.parametrize(("num_columns", "filled"), [(8, 8), (250, 256), (256, 256), (384, 384)])
def test_columns_beside_gathered_rows_have_an_even_number_of_tiles(num_columns, filled):
    """If that adds under 1/32: 250 columns become 256; 384, three tiles of 128, stay."""
    w = np.random.default_rng(0).normal(size=(4, num_columns)).astype(np.float32)
    logical = ("embed", "expert_ffn")
    gather = functools.partial(
        island.gather_padded, logical=logical, dtype=jnp.float32, tiled="expert_ffn"
    )
    value, gradient = in_use(gather, mesh_of(2, 2, 1), logical, w, ("row", "row"))
    np.testing.assert_array_equal(value, np.pad(w, ((0, 0), (0, filled - num_columns))))
    np.testing.assert_allclose(gradient, 2 * w, rtol=1e-5)
    # Where no rows are gathered nothing is filled up.
    value, _ = in_use(gather, mesh_of(1, 2, 1), logical, w, ("row", "row"))
    np.testing.assert_array_equal(value, w)
