"""Meshes over real TPU topologies, as libtpu describes them; no TPU is needed."""

import functools
import importlib.util
import itertools

import numpy as np
import pytest
from jax.experimental import topologies

from hunyuan_jax.config import MeshConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.parallel import hosts, rules
from hunyuan_jax.parallel.mesh import AXES, make_mesh
from hunyuan_jax.plan.topology import load_compiler, topology_devices

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install '.[tpu]'",
)


devices_of = functools.cache(topology_devices)


def sides_of(name):
    return tuple(int(side) for side in [*name.split(":")[1].split("x"), "1"][:3])


def hops(one, other, name):
    """Links between two chips: along each side of the torus, around it where that is shorter and
    the side is closed.

    A side is taken as closed from 4 chips (v5p, tpu7x) or 16 (v5e, v6e) on.
    """
    closed = 16 if name.startswith(("v5e", "v6e")) else 4
    steps = [
        (abs(a - b), side)
        for a, b, side in zip(one.coords, other.coords, sides_of(name), strict=True)
    ]
    return sum(min(step, side - step) if side >= closed else step for step, side in steps)


# (topology, number of slices, experts, most hops from an expert to another)
MESHES = [
    ("v5p:2x2x1", 1, 4, 2),
    ("v5p:2x2x2", 1, 4, 3),
    ("v5p:4x4x4", 1, 16, 4),
    ("v5p:4x4x8", 1, 16, 4),
    ("v5p:4x8x8", 1, 16, 6),
    ("v5p:8x8x8", 1, 16, 8),
    ("v5p:8x8x16", 1, 16, 8),
    ("v5p:8x16x16", 1, 16, 8),
    ("v5p:16x16x16", 1, 16, 8),
    ("v5p:4x4x4", 2, 16, 4),
    ("v5p:4x8x8", 2, 16, 6),
    ("v5e:16x16", 1, 16, 8),
    ("v5e:16x16", 2, 16, 8),
    ("v6e:16x16", 1, 16, 8),
    ("tpu7x:2x2x1", 1, 8, 2),
    ("tpu7x:4x4x4", 1, 16, 4),
    ("tpu7x:4x8x8", 1, 16, 5),
    ("tpu7x:16x16x16", 1, 16, 8),
    ("tpu7x:8x8x8", 2, 16, 5),
]


@pytest.mark.parametrize(("name", "num_slices", "expert", "most_hops"), MESHES)
def test_each_device_has_one_place_and_experts_are_near(name, num_slices, expert, most_hops):
    devices = devices_of(name, num_slices)
    mesh = make_mesh(MeshConfig(replica=num_slices, expert=expert, num_slices=num_slices), devices)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == (
        num_slices,
        len(devices) // num_slices // expert,
        1,
        expert,
        1,
    )
    assert set(mesh.devices.flat) == set(devices) and mesh.devices.size == len(set(devices))
    experts = mesh.devices[..., 0].reshape(-1, expert)
    for group in (experts[0], experts[len(experts) // 2], experts[-1]):
        assert max(hops(one, other, name) for one in group for other in group) <= most_hops
    # Consecutive devices of an axis are neighbours, but for where one line of a plane ends and the
    # next begins.
    data = mesh.devices[..., 0].swapaxes(1, 3).reshape(-1, mesh.shape["data"])
    for group in (experts[0], experts[-1], data[0], data[-1]):
        assert sum(hops(*pair, name) for pair in itertools.pairwise(group)) <= 2 * len(group)
    if num_slices > 1:  # only `replica` crosses from slice to slice
        for index, replica in enumerate(mesh.devices):
            assert {device.slice_index for device in replica.flat} == {index}


@pytest.mark.parametrize(
    "sizes",
    [
        {"replica": 2, "expert": 16},
        {"replica": 4, "data": 4, "tensor": -1},
        {"expert": 16, "tensor": 2},
    ],
)
def test_other_axes_on_one_slice(sizes):
    devices = devices_of("v5p:4x8x8")
    mesh = make_mesh(MeshConfig(**sizes), devices)
    assert set(mesh.devices.flat) == set(devices)
    tensor = mesh.devices.reshape(-1, mesh.shape["tensor"])[0]
    assert max(hops(one, other, "v5p:4x8x8") for one in tensor for other in tensor) <= 5


def test_replica_may_be_split_over_and_inside_slices():
    devices = devices_of("v5p:4x4x4", 2)
    mesh = make_mesh(MeshConfig(replica=4, expert=16, num_slices=2), devices)
    assert [{device.slice_index for device in replica.flat} for replica in mesh.devices] == [
        {0},
        {0},
        {1},
        {1},
    ]


def test_slices_that_do_not_fit_are_refused():
    one, two = devices_of("v5p:4x4x4"), devices_of("v5p:4x4x4", 2)
    with pytest.raises(
        ConfigError,
        match=r"num_slices = 2, but the 64 devices form 1 slice\(s\); .* Set "
        r"config.mesh.num_slices to 1 ",
    ):
        make_mesh(MeshConfig(replica=2, num_slices=2), one)
    with pytest.raises(
        ConfigError, match=r"num_slices = 1, but the 128 devices form 2 slice\(s\); .* to 2 "
    ):
        make_mesh(MeshConfig(), two)
    with pytest.raises(
        ConfigError,
        match=r"replica = 1 is not divisible by config.mesh.num_slices = 2; .* multiple of 2",
    ):
        make_mesh(MeshConfig(num_slices=2), two)


def test_devices_with_a_hole_are_refused():
    devices = devices_of("v5p:4x4x4")
    with pytest.raises(
        ConfigError,
        match=r"config\.mesh = replica 1 x data 63 .* cannot be laid out on these 63 devices "
        r"\(TPU v5\)",
    ):
        make_mesh(MeshConfig(), devices[:-1])


def test_cores_that_are_devices_of_their_own_are_refused():
    load_compiler()
    cores = list(
        topologies.get_topology_desc(platform="tpu", topology_name="v4:4x4x4").devices
    )  # not joined, as `plan` joins them
    with pytest.raises(
        ConfigError, match=r"cannot be laid out on these 128 devices \(TPU v4\): .*megacore"
    ):
        make_mesh(MeshConfig(), cores)


@pytest.mark.parametrize(
    ("name", "num_slices"),
    [("v5p:4x8x8", 1), ("v5p:16x16x16", 1), ("v5e:16x16", 1), ("tpu7x:8x8x8", 2)],
)
def test_hosts_share_the_rows_of_a_batch_equally(name, num_slices):
    devices = devices_of(name, num_slices)
    mesh = make_mesh(MeshConfig(replica=num_slices, expert=16, num_slices=num_slices), devices)
    sharding = rules.sharding(mesh, ("batch", "seq"))
    shape = (2 * len(devices), 128)
    processes = sorted({device.process_index for device in devices})
    some = [processes[0], processes[1], processes[len(processes) // 2], processes[-1]]
    rows = [hosts.process_rows(sharding, shape, process) for process in some]
    assert {len(held) for held in rows} == {shape[0] // len(processes)}
    assert len(np.unique(np.concatenate(rows))) == len(some) * len(rows[0])


def test_rows_of_a_host_need_not_be_consecutive():
    # Which is why a loader is told rows, not a shard number: a host is a square of chips, `data`
    # two lines of eight.
    devices = devices_of("v5p:4x8x8")
    sharding = rules.sharding(make_mesh(MeshConfig(expert=16), devices), ("batch", "seq"))
    np.testing.assert_array_equal(hosts.process_rows(sharding, (256, 128), 0), [0, 16, 128, 144])
