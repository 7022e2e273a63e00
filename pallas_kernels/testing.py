"""Checks shared by the kernels' tests: errors, races, compilation without the device."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

# Largest norm-relative error against the float32 reference, by the dtype of the inputs.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def fresh_seed() -> int:
    """Returns a new seed each time, so that every run of the tests sees other data."""
    return int(np.random.default_rng().integers(2**31))


def relative_error(actual: Any, expected: Any) -> float:
    """Returns |actual - expected| / |expected| (2-norms over all elements) in float64.

    NaN or infinite if `actual` has such elements.
    """
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


def assert_close(actual: Any, expected: Any, dtype: Any, what: str = "") -> None:
    """Asserts that two trees of arrays agree within TOLERANCE of `dtype`.

    Shapes must be equal.  `what` begins the message.
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
    """Yields `interpret` parameters that simulate a TPU's memory on the CPU and detect races.

    Memory that was never written reads as NaN, which catches a kernel that forgets an output or
    reads what it did not load.

    Raises:
      AssertionError: at the end, if a race was found.
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
    """Returns the text of fn(*shapes) lowered for an NVIDIA GPU, without one.

    Kernels pass through the front ends of their own compilers.
    """
    from jax.sharding import AbstractDevice

    device = AbstractDevice(device_kind=device_kind, num_cores=num_cores, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(fn).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
