"""Which implementation of the kernels a model runs with."""

from typing import Any

from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.parallel.mesh import device_kind


def kernel_options(cfg: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """What `pallas_kernels` are called with: the devices of the mesh, and `model.kernels` as an
    implementation or a list of them.
    """
    return {
        "device_kind": device_kind(mesh),
        "implementation": None if cfg.kernels == "auto" else cfg.kernels.split(","),
    }
