"""Functions that tests run in a process of its own, which imports them from here by name."""

import os

import jax
import jax.numpy as jnp

from pallas_kernels import cycles, tpu_compiler


def end_as_libtpu_does() -> None:
    """Ends the process with the lines that libtpu writes when it crashes."""
    os.write(
        2,
        b"a warning\nF1125 23:54:53.428729   30020 llo_module.cc:75] Check failed: the "
        b"reason\n*** stack trace ***\nF1125 again] no\n",
    )
    os._exit(1)


def cycles_of_a_product() -> int:
    """Static cycles of a bfloat16 product of 1024 x 2048 x 1024 on a v5p."""
    tpu_compiler.prepare(profiles=True)
    shapes = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1024, 2048), (2048, 1024)))
    return cycles.cost("v5p", lambda a, b: a @ b, *shapes).cycles
