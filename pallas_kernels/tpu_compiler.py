"""The TPU compiler without a TPU: its environment, the devices of a slice, and the options that
large programs ask of it.

Needs libtpu (pip install 'jax[tpu]').  `cycles.py` reads what a compiled program costs.
"""

import contextlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, SingleDeviceSharding

from pallas_kernels import chips

# libtpu reads these when it is loaded.  They keep it from looking for a TPU, for the TPU's
# metadata server and for its lock file.
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
# The smallest slice of each generation that the compiler accepts by default.
_SMALLEST = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
_profiles: list[str] = []

# Exchanges in the background, so that the shared expert is computed meanwhile.  24 MiB of vector
# memory for one operation instead of 16: matrix products get larger blocks, 0.92 instead of 0.88
# of the peak on v5p by the compiler's estimate (32 MiB: 0.95, but a52b compiles 1.4 times as
# long).
_LARGE_PROGRAM = {
    "xla_tpu_scoped_vmem_limit_kib": str(24 * 1024),
    "xla_tpu_enable_async_all_to_all": "true",
}
# The SparseCores gather weights and reduce-scatter gradients while the TensorCores compute.
# "2d" is for a mesh axis that spans two dims of the torus; with queuing more than one transfer is
# under way at a time.  tpu7x does all but the queuing by default.
# The queue is first in, first out.  Were the SparseCores to look up rows too (the mixture's
# tokens), which happens after attention, then no gather of weights that is needed later could
# start before attention.
_WEIGHTS_BY_SPARSE_CORE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_offload_queuing_in_lhs": "true",
    "xla_tpu_offload_gather_to_sparsecore": "false",
}
# Options of the train step by generation, tried with libtpu 0.0.50.1; docs/log.md and
# docs/results/plan.md have the figures.
TRAIN_STEP_OPTIONS = {
    "v4": {},  # has 16 MiB of vector memory in all
    "v5e": _LARGE_PROGRAM,  # has no SparseCore
    "v5p": _LARGE_PROGRAM | _WEIGHTS_BY_SPARSE_CORE,
    "v6e": _LARGE_PROGRAM | _WEIGHTS_BY_SPARSE_CORE,
    "tpu7x": _LARGE_PROGRAM | _WEIGHTS_BY_SPARSE_CORE,
}


def train_step_options(device: jax.Device | None) -> dict[str, str]:
    """Returns the compiler options of the train step on a device; none off TPUs and for None.

    Options change between versions of libtpu: one that the installed version does not know is
    left out, with a warning.
    """
    chip = chips.of_device(device.device_kind) if device else None
    options = TRAIN_STEP_OPTIONS.get(chip.name, {}) if chip else {}
    return known_options(device, options) if options else {}


def without_sparse_cores(device: jax.Device | None) -> dict[str, str]:
    """Returns options that undo those of `train_step_options` for the SparseCores: a program that
    compiles faster, and waits for its weights and gradients.
    """
    return {
        name: "false" for name in train_step_options(device) if name in _WEIGHTS_BY_SPARSE_CORE
    }


def known_options(device: jax.Device, options: Mapping[str, str]) -> dict[str, str]:
    """Returns those of `options` that the compiler of a device knows; warns about each other."""
    known = dict(options)
    nothing = jax.ShapeDtypeStruct((), np.float32, sharding=SingleDeviceSharding(device))
    lowered = jax.jit(lambda x: x).lower(nothing)
    while known:
        try:
            with without_cache():
                lowered.compile(compiler_options=known)
        except jax.errors.JaxRuntimeError as e:
            unknown = re.search(r"No such compile option: '(\w+)'", str(e))
            if unknown is None or unknown[1] not in known:
                raise
            del known[unknown[1]]
            warnings.warn(
                f"this libtpu has no compiler option {unknown[1]}; the program is compiled "
                "without it, and may wait for transfers that the option hides.",
                stacklevel=2,
            )
        else:
            break
    return known


def prepare(*, profiles: bool = False) -> None:
    """Makes this process ready to compile for TPUs that are not there.

    Call it before jax is first used: libtpu reads its environment when it is loaded, and the CPU
    becomes jax's own platform.

    Args:
      profiles: also write what `cycles.cost` reads.  libtpu does so for v5e, v5p and v6e, and ends
        the process for any other chip.
    """
    if profiles and not _profiles:
        _profiles.append(tempfile.mkdtemp(prefix="llo_profiles_"))
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={_profiles[0]}"
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")


def profiles_folder() -> str:
    """Returns the folder that libtpu writes profiles to after `prepare(profiles=True)`."""
    (folder,) = _profiles
    return folder


def slice_devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
    """Returns the devices of `num_slices` slices, to compile for; they cannot run anything.

    Args:
      topology: "GENERATION:SHAPE", such as "v5p:2x2x1".

    Raises:
      JaxRuntimeError, NotImplementedError: the compiler does not know the topology.
    """
    # A v4 chip's two cores act as one device, as on a real slice.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology, num_slices=num_slices, **options
    ).devices


def one_device_mesh(chip: str) -> Mesh:
    """Returns a mesh of one device of a TPU generation ("v5p")."""
    return Mesh(np.array(slice_devices(_SMALLEST[chip])[:1]), ("device",))


def compile_for(
    chip: str, fn: Callable, *shapes: Any, row_major: bool = False, **compiler_options: Any
) -> Any:
    """Compiles fn(*shapes) for one device of a TPU generation ("v5p"), after `prepare`.

    Args:
      shapes: trees of jax.ShapeDtypeStruct.
      row_major: whether arguments and results lie in memory row by row, instead of as XLA chooses.

    Returns:
      jax's compiled program.
    """
    mesh = one_device_mesh(chip)
    sharding = SingleDeviceSharding(mesh.devices[0])

    def placed(x):
        return Format(Layout(tuple(range(x.ndim))), sharding) if row_major else sharding

    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(x)), shapes
    )
    # Kernels ask the mesh around them what they are compiled for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        results = jax.tree.map(placed, jax.eval_shape(fn, *shapes)) if row_major else None
        lowered = jax.jit(fn, out_shardings=results).lower(*args)
    with without_cache():
        return lowered.compile(compiler_options=compiler_options or None)


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Turns jax's persistent cache off: a program for devices that are not there cannot be loaded
    from it, which jax 0.12 tries with a warning.
    """
    was_on = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # jax asks whether it is on once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was_on)
        reset_cache()
