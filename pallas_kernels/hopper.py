"""What the Mosaic GPU kernels for Hopper GPUs share."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

# jax 0.10 wants an index beside the reference.
_WHOLE = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


def load(ref: Any, layout: Any) -> jax.Array:
    """Loads all of a reference to global memory into registers of this layout."""
    return plgpu.load(ref, *_WHOLE, layout=layout, optimized=False)


def tiled_smem(shape: tuple[int, ...], dtype: Any, swizzle: int) -> Any:
    """Shared memory in the layout that the copy engine writes and the tensor cores read.

    swizzle: bytes of the last dim that are permuted together.
    """
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))
