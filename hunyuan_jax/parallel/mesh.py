"""The device mesh: four named axes over whatever devices there are."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from hunyuan_jax.config import ConfigError, MeshConfig

AXES = ("replica", "data", "expert", "tensor")


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `cfg` over `devices` (all of them if None); -1 takes what is left.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve_sizes(cfg, len(devices))
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def single_device_mesh() -> Mesh:
    """All axes of size one, on the first device: what a notebook uses."""
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def resolve_sizes(cfg: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Axis sizes in the order of AXES, with -1 replaced.

    Raises:
      ConfigError: they do not multiply to `num_devices`.
    """
    sizes = [getattr(cfg, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    resolved = tuple(num_devices // fixed if size == -1 else size for size in sizes)
    if math.prod(resolved) != num_devices:
        text = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(
            f"config.mesh = {text} does not use the {num_devices} devices exactly; "
            "the sizes must multiply to that number. Set one axis to -1 to let it take what is left."
        )
    return resolved
