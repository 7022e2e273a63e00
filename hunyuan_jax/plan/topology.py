"""TPU slices by name: their shapes, and their devices for the compiler."""

import difflib
import importlib.util
import math
import re

import jax

from hunyuan_jax.errors import ConfigError
from pallas_kernels import tpu_compiler
from pallas_kernels.chips import CHIPS, Chip

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
# Shapes that can be rented, by generation and rising size.
SLICES = {
    "v4": _TORUS_3D,
    "v5e": _TORUS_2D,
    "v5p": _TORUS_3D,
    "v6e": _TORUS_2D,
    "tpu7x": _TORUS_3D,
}


def known_names() -> list[str]:
    """Returns the names of the slices that can be rented, such as 'v5p:4x8x8'."""
    return [f"{name}:{shape}" for name, shapes in SLICES.items() for shape in shapes]


def chip_of(topology: str) -> Chip:
    """Returns the chip of a slice name.

    Raises:
      ConfigError: an unknown generation, or a shape that it cannot have; names the nearest.
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", topology)
    shapes = SLICES.get(match[1]) if match else None
    # The compiler ends the process on a shape with a zero, so the shape is checked here.
    if shapes is None or match[2].count("x") != shapes[0].count("x"):
        raise ConfigError(f"--topology={topology} is not known; {_nearest(topology)}")
    return CHIPS[match[1]]


def num_devices(topology: str, num_slices: int = 1) -> int:
    """Returns the number of jax devices in `num_slices` such slices; loads nothing."""
    num_chips = math.prod(int(size) for size in topology.split(":")[1].split("x"))
    return num_chips * chip_of(topology).devices_per_chip * num_slices


def has_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def load_compiler() -> None:
    """Makes this process ready to compile for TPUs; call it before jax is first used.

    Raises:
      ConfigError: libtpu is missing.
    """
    if not has_compiler():
        raise ConfigError(
            "plan needs the TPU compiler (libtpu), though no TPU, and it is not installed: pip "
            "install -e '.[tpu]'"
        )
    tpu_compiler.prepare()


def topology_devices(topology: str, num_slices: int = 1) -> list:
    """Returns the devices of `num_slices` slices, to compile for; they cannot run anything.

    Raises:
      ConfigError: libtpu is missing, or there is no such topology.
    """
    chip_of(topology)
    load_compiler()
    try:
        return list(tpu_compiler.slice_devices(topology, num_slices))
    except (jax.errors.JaxRuntimeError, NotImplementedError) as e:
        raise ConfigError(
            f"--topology={topology}: the compiler refuses it ({str(e).splitlines()[0]}); "
            f"{_nearest(topology)}"
        ) from e


def _nearest(topology: str) -> str:
    nearest = difflib.get_close_matches(topology, known_names(), n=3, cutoff=0.0)
    return f"the nearest that can be rented are {', '.join(nearest)} (GENERATION:SHAPE)."
