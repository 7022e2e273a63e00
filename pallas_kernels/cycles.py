"""Reads what the TPU compiler says a program costs; nothing runs.

The cycles are static: the compiler schedules every instruction and adds up.  They know neither
memory stalls nor control flow that depends on data.
"""

import functools
import glob
import itertools
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxprs_in_params

from pallas_kernels import tpu_compiler


class Cost(NamedTuple):
    """Static cost of a compiled program.

    cycles: of the whole program.
    by_op: cycles by name of the compiled operation.
    """

    cycles: int
    by_op: dict[str, int]


def cost(chip: str, fn: Callable, *shapes: Any, **options: Any) -> Cost:
    """Returns the static cost of fn(*shapes) on one device of v5e, v5p or v6e.

    Call `tpu_compiler.prepare(profiles=True)` first.  `options` are those of
    `tpu_compiler.compile_for`.
    """
    folder = tpu_compiler.profiles_folder()
    for path in glob.glob(f"{folder}/*"):
        os.remove(path)
    tpu_compiler.compile_for(chip, fn, *shapes, **options)
    by_op = {}
    for path in glob.glob(f"{folder}/*profile.textproto"):
        with open(path) as file:
            text = file.read()
        for estimate in re.findall(r"hlo_op_estimate \{(.*?)\n\}", text, re.DOTALL):
            name = re.search(r'hlo_op_name: "(.*)"', estimate)[1]
            number = {key: int(value) for key, value in re.findall(r"(\w+): (\d+)", estimate)}
            by_op[name] = number["estimated_cycles"] * number.get("num_equivalent_hlos", 1)
    return Cost(sum(by_op.values()), by_op)


def kernels_alone(chip: str, fn: Callable, *shapes: Any) -> int:
    """Returns the static cycles of the Pallas kernels in fn(*shapes), each compiled alone.

    With another operation beside a kernel, libtpu counts the kernel's vector memory twice while it
    profiles, and refuses.
    """
    with jax.sharding.use_abstract_mesh(tpu_compiler.one_device_mesh(chip).abstract_mesh):
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
    """Returns the kernel equations of a jaxpr and of the jaxprs within it."""
    inner = [
        sub
        for equation in jaxpr.eqns
        if not _is_kernel(equation)
        for sub in jaxprs_in_params(equation.params)
    ]
    return [*filter(_is_kernel, jaxpr.eqns), *itertools.chain.from_iterable(map(_kernels, inner))]


def _is_kernel(equation: Any) -> bool:
    return equation.primitive.name == "pallas_call"
