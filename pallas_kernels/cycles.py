"""Compiles for TPUs that are not there, and reads what the TPU compiler says a program costs;
nothing runs.

The cycles are static: the compiler schedules every instruction, and adds up.  They do not know
about memory stalls, nor about control flow that depends on data.  Needs libtpu (pip install
'jax[tpu]'), no TPU.
"""

import functools
import glob
import itertools
import os
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

_TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
_profiles: list[str] = []


class Cost(NamedTuple):
    """cycles: estimated for the whole program; by_op: the same by name of the compiled operation;
    hbm_bytes: temporaries and outputs.
    """

    cycles: int
    by_op: dict[str, int]
    hbm_bytes: int


def prepare(*, profiles: bool) -> None:
    """Makes libtpu ready to compile without a TPU; comes before the first use of jax in a process.

    profiles: also write what `cost` reads.  libtpu does so for v5e, v5p and v6e, and ends the
    process on any other chip.
    """
    if profiles and not _profiles:
        _profiles.append(tempfile.mkdtemp(prefix="llo_profiles_"))
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={_profiles[0]}"
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_ACCELERATOR_TYPE="v5p-8",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        TPU_STDERR_LOG_LEVEL="3",
        TPU_MIN_LOG_LEVEL="3",
        TF_CPP_MIN_LOG_LEVEL="3",
    )


def compile_for(
    chip: str, fn: Callable, *shapes: Any, row_major: bool = False, **compiler_options: Any
) -> Any:
    """fn(*shapes) compiled for one device of a TPU generation ("v5p").

    Args:
      shapes: a tree of jax.ShapeDtypeStruct.
      row_major: arguments and results lie row by row in memory, instead of as XLA chooses.
    """
    import jax
    from jax.experimental.layout import Format, Layout
    from jax.sharding import SingleDeviceSharding

    mesh = _mesh(chip)
    sharding = SingleDeviceSharding(mesh.devices[0])

    def placed(x):
        return Format(Layout(tuple(range(x.ndim))), sharding) if row_major else sharding

    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(x)), shapes
    )
    # Kernels ask the mesh around them what they are compiled for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        results = jax.tree.map(placed, jax.eval_shape(fn, *shapes)) if row_major else None
        return (
            jax.jit(fn, out_shardings=results)
            .lower(*args)
            .compile(compiler_options=compiler_options or None)
        )


def _mesh(chip: str) -> Any:
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    options = {"chip_config_name": "megacore"} if chip == "v4" else {}
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=_TOPOLOGIES[chip], **options
    ).devices
    return Mesh(np.array(devices[:1]), ("device",))


def cost(chip: str, fn: Callable, *shapes: Any, **options: Any) -> Cost:
    """Static cycles of fn(*shapes) on one device of v5e, v5p or v6e, after
    `prepare(profiles=True)`; options as of `compile_for`.
    """
    (folder,) = _profiles
    for path in glob.glob(f"{folder}/*"):
        os.remove(path)
    memory = compile_for(chip, fn, *shapes, **options).memory_analysis()
    by_op = {}
    for path in glob.glob(f"{folder}/*profile.textproto"):
        with open(path) as file:
            text = file.read()
        for estimate in re.findall(r"hlo_op_estimate \{(.*?)\n\}", text, re.DOTALL):
            name = re.search(r'hlo_op_name: "(.*)"', estimate)[1]
            number = {key: int(value) for key, value in re.findall(r"(\w+): (\d+)", estimate)}
            by_op[name] = number["estimated_cycles"] * number.get("num_equivalent_hlos", 1)
    return Cost(
        sum(by_op.values()), by_op, memory.temp_size_in_bytes + memory.output_size_in_bytes
    )


def kernels_alone(chip: str, fn: Callable, *shapes: Any) -> int:
    """Static cycles of the Pallas kernels in fn(*shapes), each in a program of its own that gets
    all its operands as arguments.

    With another operation beside a kernel, libtpu counts the vector memory that the kernel may
    take twice while it profiles, and refuses.
    """
    import jax

    with jax.sharding.use_abstract_mesh(_mesh(chip).abstract_mesh):
        kernels = _kernels(jax.make_jaxpr(fn)(*shapes).jaxpr)
    return sum(
        cost(
            chip,
            functools.partial(kernel.primitive.bind, **kernel.params),
            *(v.aval for v in kernel.invars),
            row_major=True,
        ).cycles
        for kernel in kernels
    )


def _kernels(jaxpr: Any) -> list[Any]:
    """The equations of a jaxpr, and of those in it, that are kernels."""
    from jax.extend.core import jaxprs_in_params

    inner = [
        sub
        for equation in jaxpr.eqns
        if not _is_kernel(equation)
        for sub in jaxprs_in_params(equation.params)
    ]
    return [*filter(_is_kernel, jaxpr.eqns), *itertools.chain.from_iterable(map(_kernels, inner))]


def _is_kernel(equation: Any) -> bool:
    return equation.primitive.name == "pallas_call"
