"""Quick compilation, modules with random parameters, and comparison by norm."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hunyuan_jax.config import MeshConfig
from hunyuan_jax.parallel.mesh import make_mesh

# Tests of small models spend most of their time compiling.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
fast_jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)


def mesh_of(
    data: int = 1, expert: int = 1, tensor: int = 1, replica: int = 1, context: int = 1
) -> jax.sharding.Mesh:
    """Returns a mesh of the first of the eight fake devices."""
    sizes = MeshConfig(replica=replica, data=data, context=context, expert=expert, tensor=tensor)
    return make_mesh(sizes, jax.devices()[: replica * data * context * expert * tensor])


def filled(module_fn: Callable[[], nnx.Module], seed: int = 0, std: float = 0.3) -> Any:
    """Returns the module with random numbers in every parameter, including scales and biases.

    numpy draws them, so that nothing is compiled.
    """
    graph_def, state = nnx.split(nnx.eval_shape(module_fn))
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        is_scale = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(is_scale + std * rng.normal(size=leaf.shape), jnp.float32)

    return nnx.merge(graph_def, jax.tree_util.tree_map_with_path(fill, state))


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Asserts that the norm of the difference is at most `tolerance` times that of `expected`."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    difference = np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)
    assert difference <= tolerance, (
        f"relative difference {difference:.2e} is above {tolerance:.0e}"
    )


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """Reference: the weighted mean of -log p(target) from the full logits."""
    nll_BT = -jnp.take_along_axis(
        jax.nn.log_softmax(logits_BTV.astype(jnp.float32)), targets_BT[..., None], axis=-1
    )[..., 0]
    return jnp.sum(nll_BT * weights_BT) / jnp.maximum(weights_BT.sum(), 1.0)
