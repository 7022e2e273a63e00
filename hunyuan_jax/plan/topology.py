"""TPU slices by name: what a chip of each generation is, and the devices of a slice for the
compiler, without a TPU.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re

from hunyuan_jax.errors import ConfigError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
    """One TPU generation; figures are per jax device, of which a tpu7x chip has two and the others
    one.

    hbm_bytes: what the compiler lets a program use, a little below the chip's memory.
    peak_flops: dense bf16 FLOP/s; clock_hz: of the matrix units, to turn the compiler's cycles
    into seconds.
    slices: shapes that can be rented, by size.
    """

    name: str
    hbm_bytes: int
    peak_flops: float
    clock_hz: float
    devices_per_chip: int
    slices: tuple[str, ...]


_TORUS_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_TORUS_3D = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
    "16x16x16",
)

# hbm: from the compiler's own out-of-memory message ("exceeds available HBM (95.73G)"), libtpu
# 0.0.50.1.
# peak: vendors' figures (v4: Google's documentation; the others: checking_without_accelerators.md
# section 6), per device.
# clock: v4 1.05 GHz and v5e 1.5 GHz are published; v5p 1.75 GHz is the figure of
# checking_without_accelerators.md section 1; v6e
# and tpu7x are ASSUMED: peak over 524288 FLOP a cycle, the smallest power of two above what the
# compiler's estimate of a 8192^3 matmul gives (369 000 and 422 000 FLOP a cycle).  The same rule
# gives the known clocks of v4 (2 x 131072), v5e and v5p.
GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("v4", int(30.75 * _GIB), 275e12, 1.05e9, 1, _TORUS_3D),
        Generation("v5e", int(15.75 * _GIB), 197e12, 1.5e9, 1, _TORUS_2D),
        Generation("v5p", int(95.73 * _GIB), 459e12, 1.75e9, 1, _TORUS_3D),
        Generation("v6e", int(31.24 * _GIB), 918e12, 1.75e9, 1, _TORUS_2D),
        Generation("tpu7x", int(94.74 * _GIB), 2307e12 / 2, 2.2e9, 2, _TORUS_3D),
    )
}

# The compiler asks for these when it is loaded; they keep it from looking for a TPU, its metadata
# server and its lock file.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def known_names() -> list[str]:
    """Names of the slices that can be rented, such as 'v5p:4x8x8'."""
    return [
        f"{generation.name}:{shape}"
        for generation in GENERATIONS.values()
        for shape in generation.slices
    ]


def generation_of(topology: str) -> Generation:
    """The generation of a slice name.

    Raises:
      ConfigError: no such generation, or a shape that it cannot have, with the nearest names.
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", topology)
    generation = GENERATIONS.get(match[1]) if match else None
    # The compiler ends the process on a shape with a zero, so the shape is checked here.
    if generation is None or match[2].count("x") != generation.slices[0].count("x"):
        raise ConfigError(f"--topology={topology} is not known; {_nearest(topology)}")
    return generation


def num_devices(topology: str, num_slices: int = 1) -> int:
    """jax devices of `num_slices` such slices; nothing is loaded."""
    chips = math.prod(int(size) for size in topology.split(":")[1].split("x"))
    return chips * generation_of(topology).devices_per_chip * num_slices


def load_compiler() -> None:
    """Makes ready to compile for TPUs: libtpu reads this environment when it is loaded, and the
    CPU becomes jax's own platform.

    Comes before the first use of jax.

    Raises:
      ConfigError: libtpu is missing.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "the TPU compiler (libtpu) is not installed; plan needs no TPU, but needs it: pip "
            "install -e '.[tpu]'"
        )
    os.environ.update(_ENVIRONMENT)
    import jax

    jax.config.update("jax_platforms", "cpu")


def topology_devices(topology: str, num_slices: int = 1) -> list:
    """The devices of `num_slices` slices, which programs can be compiled for and not run on.

    Raises:
      ConfigError: libtpu is missing, or there is no such topology.
    """
    generation = generation_of(topology)
    load_compiler()
    import jax
    from jax.experimental import topologies

    # A v4 chip's two cores act as one device, as on a real slice.
    options = {"chip_config_name": "megacore"} if generation.name == "v4" else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, num_slices=num_slices, **options
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as e:
        raise ConfigError(
            f"--topology={topology}: the compiler refuses it ({str(e).splitlines()[0]}); "
            f"{_nearest(topology)}"
        ) from e
    return list(description.devices)


def _nearest(topology: str) -> str:
    nearest = difflib.get_close_matches(topology, known_names(), n=3, cutoff=0.0)
    return f"the nearest that can be rented are {', '.join(nearest)} (GENERATION:SHAPE)."
