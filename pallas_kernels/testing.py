"""Checks that the kernels' tests share: errors, races, compilation for chips that are not there."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

# The norm-relative errors a kernel may have against a float32 reference, by the dtype of its
# inputs.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def fresh_seed() -> int:
    """Another one each time, so that tests see other data in every run."""
    return int(np.random.default_rng().integers(2**31))


def relative_error(actual: Any, expected: Any) -> float:
    """|actual - expected| / |expected| over all elements, in float64; NaN or infinite if `actual`
    has such elements.
    """
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


def assert_close(actual: Any, expected: Any, dtype: Any, what: str = "") -> None:
    """Every array of the tree `actual` has the shape of its twin in `expected`, and an error
    within TOLERANCE of `dtype`.
    """
    tolerance = TOLERANCE[jnp.dtype(dtype).name]
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        error = relative_error(a, e)
        assert error <= tolerance, (
            f"{what}{jax.tree_util.keystr(path)}: relative error {error:.2e} > {tolerance:.0e}"
        )


@contextlib.contextmanager
def interpreted_tpu() -> Iterator[Any]:
    """Parameters that simulate a TPU's memory on the CPU and look for races; raises at the end if
    one was found.

    Memory that was never written reads as NaN, so a kernel that forgets an output or reads what it
    did not load is caught.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    from jax.experimental.pallas import tpu as pltpu

    pltpu.reset_tpu_interpret_mode_state()
    try:
        yield pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
        # jax 0.12 raises at the race, earlier versions only note it.
        races = interpret_pallas_call.races
        assert races is None or not races.races_found, "the interpreter found a data race"
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def lower_for_gpu(
    fn: Callable, *shapes: Any, device_kind: str = "NVIDIA H200", num_cores: int = 132
) -> str:
    """The text of fn(*shapes) lowered for an NVIDIA GPU that is not there; kernels pass through
    their own compilers' front ends.
    """
    from jax.sharding import AbstractDevice

    device = AbstractDevice(device_kind=device_kind, num_cores=num_cores, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(fn).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
