"""What is chosen for the CPU's compiler."""

import re

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


def test_donated_moments_are_updated_without_a_copy():
    """A step may be refused: every result is a choice between the new and the old."""

    def update(param, m, v, grad):
        new_m, new_v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad**2
        new = param - new_m / (jnp.sqrt(new_v) + 1e-8), new_m, new_v
        is_new = jnp.isfinite((grad**2).sum())
        return jax.tree.map(lambda x, old: jnp.where(is_new, x, old), new, (param, m, v))

    def num_copies(options):
        step = jax.jit(update, donate_argnums=(0, 1, 2), compiler_options=options)
        hlo = step.lower(*[jax.ShapeDtypeStruct((4, 1024), jnp.float32)] * 4).compile().as_text()
        return len(re.findall(r"f32\[4,1024\]\S* copy\(", hlo))

    assert num_copies({}) > 0  # else this version needs no option
    assert num_copies(xla_cpu.train_step_options("cpu")) == 0
    assert xla_cpu.train_step_options("TPU v5") == {}


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
