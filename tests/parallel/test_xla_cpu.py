"""What is chosen for the CPU's compiler."""

import jax
import jax.numpy as jnp
import pytest

from hunyuan_jax.config import MeshConfig
from hunyuan_jax.parallel import island, xla_cpu
from hunyuan_jax.parallel.mesh import make_mesh, single_device_mesh


@pytest.mark.parametrize(
    ("device_kind", "num_groups", "group_size", "expected"),
    [("cpu", 4, 1, 4), ("cpu", 4, 2, 4), ("cpu", 5, 2, 1), ("TPU v5", 4, 1, 1), ("", 4, 1, 1)],
)
def test_only_short_stacks_on_cpus_are_unrolled(device_kind, num_groups, group_size, expected):
    assert xla_cpu.unroll(device_kind, num_groups, group_size) == expected


def test_only_cpus_take_no_counts():
    assert not xla_cpu.takes_counts("cpu")
    assert xla_cpu.takes_counts("TPU v5")
    assert xla_cpu.takes_counts("NVIDIA H100")


@pytest.mark.parametrize("is_single", [True, False])
def test_gradients_are_summed_over_several_devices_only(is_single):
    mesh = single_device_mesh() if is_single else make_mesh(MeshConfig(data=-1))
    scaled = island.island(
        lambda w_F, x_B: x_B * w_F.sum(), mesh, ("norm",), (("batch",),), ("batch",)
    )
    grad = jax.jit(jax.grad(lambda w_F, x_B: scaled(w_F, x_B).sum()))
    arrays = jnp.ones((4,)), jnp.ones((8,))
    assert ("all-reduce" in grad.lower(*arrays).compile().as_text()) == (not is_single)
    assert grad(*arrays).tolist() == [8.0] * 4
