"""Reads a compiled step: estimated cycles by region, kernels, and every collective.

All figures are the compiler's model of a TPU, not measurements: say so wherever they are shown.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from hunyuan_jax.plan import hlo_text, kernel_speed, replica_groups
from hunyuan_jax.plan.hlo_text import Module, Op

ENTRY = "entry"

_KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_COLLECTIVE = re.compile(rf"({'|'.join(_KINDS)})(-start)?")
_KERNEL_TARGET = "tpu_custom_call"
# Between slices a collective is a send and a recv, served by the megascale runtime.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class Region:
    """Part of a step: 'entry', 'forward loop', 'backward loop' or 'loop'.

    Of several loops of a kind the costliest, which is the one over the layers, has no number.

    op_name: the loop's origin in the program.
    times: executions of its body per step.
    cycles: total of all executions, without kernels, collectives and ops of unknown cost.
    """

    name: str
    op_name: str
    times: int
    cycles: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel, for which the compiler gives no cycles.

    times: executions per step over all call sites.
    flops: total of these executions as the kernel states it, 0 if it does not.
    """

    name: str
    region: str
    times: int
    flops: int


@dataclasses.dataclass(frozen=True)
class CostlyOp:
    """An op; cycles: total of all its executions in a step."""

    name: str
    shape: str
    op_name: str
    region: str
    times: int
    cycles: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal collectives of one region.

    kind: as in HLO; a fused all-reduce and slice is a 'reduce-scatter'.
    axes: mesh axes.  'data/4' is a part of an axis, ('slices',) the network between slices, ('?',)
      stands for groups that could not be read.
    bytes: per device and execution: of the result for an all-gather, else of the operands.
    count: call sites.
    times: executions of each per step.
    busy, exposed: seconds of a step, over all executions, in which they occupy links, and in which
      compute waits for them; see timeline.py.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int
    times: int
    region: str
    busy: float = 0.0
    exposed: float = 0.0

    @property
    def total_bytes(self) -> int:
        """Bytes per device in one step, over all call sites and executions."""
        return self.bytes * self.count * self.times


@dataclasses.dataclass(frozen=True)
class HloReport:
    """Regions in program order; ops and collectives by decreasing cost.

    num_unknown_cycles: ops of a step whose cost the compiler does not know (it does not for what
      runs on the SparseCore).
    num_unknown_trips: loops whose length depends on data; they count as one trip.
    """

    regions: tuple[Region, ...]
    kernels: tuple[Kernel, ...]
    top_ops: tuple[CostlyOp, ...]
    collectives: tuple[Collective, ...]
    num_unknown_cycles: int
    num_unknown_trips: int

    @property
    def cycles(self) -> int:
        """Estimated cycles of one step, without kernels, collectives and ops of unknown cost."""
        return sum(region.cycles for region in self.regions)

    @property
    def kernel_flops(self) -> int:
        """FLOPs of one step's kernels, as they state them."""
        return sum(kernel.flops for kernel in self.kernels)


class Transfer(NamedTuple):
    """One collective.  op: its name in the module; the rest as in `Collective`."""

    op: str
    kind: str
    axes: tuple[str, ...]
    bytes: int


class Exposure(NamedTuple):
    """Seconds of one step in which a collective occupies links, and in which compute waits."""

    busy: float = 0.0
    exposed: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Visit:
    """One op of the schedule: its place, and how often it runs."""

    op: Op
    computation: str
    region: Region  # its cycles are still 0
    times: int


def analyse(
    module: Module,
    mesh: Mapping[str, int],
    exposures: Mapping[str, Exposure] = {},
    num_top: int = 20,
) -> HloReport:
    """Returns the report of a scheduled module.

    Args:
      module: of `hlo_text.parse`.
      mesh: axis sizes in mesh order.
      exposures: by the name of the collective's op, of timeline.py.
      num_top: number of costliest ops to list.
    """
    visits = list(_walk(module, module.entry, Region(ENTRY, "", 1, 0), 1, {}))
    cycles, kernels, kernel_flops = (collections.Counter() for _ in range(3))
    found = collections.defaultdict(list)
    regions, costly = {}, []
    for visit in visits:
        op, region = visit.op, visit.region.name
        regions.setdefault(region, visit.region)
        if transfer := transfer_of(module, op, module[visit.computation], mesh):
            found[transfer._replace(op=""), visit.times, region].append(transfer.op)
            continue
        for kernel in kernels_of(module, op):
            key = (kernel_speed.name_of(kernel), region)
            kernels[key] += visit.times
            kernel_flops[key] += visit.times * kernel_speed.stated_flops(kernel)
        if op.cycles:
            cycles[region] += op.cycles * visit.times
            costly.append(
                CostlyOp(
                    op.name, op.shape, op.op_name, region, visit.times, op.cycles * visit.times
                )
            )
    names = _numbered(regions, cycles)
    collectives = [
        Collective(
            *transfer[1:],
            len(ops),
            times,
            region,
            # A computation may have several call sites; its op then stands several times in `ops`.
            *map(sum, zip(*(exposures.get(op, Exposure()) for op in set(ops)), strict=True)),
        )
        for (transfer, times, region), ops in found.items()
    ]
    return HloReport(
        regions=tuple(
            dataclasses.replace(region, name=names[key], cycles=cycles[key])
            for key, region in regions.items()
        ),
        kernels=tuple(
            Kernel(name, names[region], times, kernel_flops[name, region])
            for (name, region), times in kernels.items()
        ),
        top_ops=tuple(
            dataclasses.replace(op, region=names[op.region])
            for op in sorted(costly, key=lambda op: -op.cycles)[:num_top]
        ),
        collectives=tuple(
            dataclasses.replace(item, region=names[item.region])
            for item in sorted(collectives, key=lambda item: -item.total_bytes)
        ),
        num_unknown_cycles=sum(visit.op.cycles is None for visit in visits),
        num_unknown_trips=sum(
            visit.op.opcode == "while" and hlo_text.trip_count(module, visit.op) is None
            for visit in visits
        ),
    )


def kernels_of(module: Module, op: Op) -> list[Op]:
    """Returns the Pallas kernels in an op: itself, or those of a fusion (which writes the kernel's
    result into a larger array).
    """
    ops = module[op.called("calls")[0]] if op.opcode == "fusion" else [op]
    return [
        inner
        for inner in ops
        if inner.opcode == "custom-call"
        and f'custom_call_target="{_KERNEL_TARGET}"' in inner.attributes
    ]


def lookup_in(module: Module, op: Op) -> Op | None:
    """Returns the lookup of rows that an op makes on the TensorCore, None for any other op."""
    if op.opcode != "fusion" or "kind=kCustom" not in op.attributes or op.cycles is None:
        return None
    ops = module[op.called("calls")[0]]
    return next((inner for inner in ops if inner.opcode == "gather"), None)


def _numbered(regions: Iterable[str], cycles: Mapping[str, int]) -> dict[str, str]:
    """Names the regions 'KIND#NUMBER' by cost: 'KIND' for the costliest, then 'KIND 2', ..."""
    names, counts = {}, collections.Counter()
    for key in sorted(regions, key=lambda key: -cycles[key]):
        kind = key.partition("#")[0]
        counts[kind] += 1
        names[key] = kind if counts[kind] == 1 else f"{kind} {counts[kind]}"
    return names


def _walk(
    module: Module,
    name: str,
    region: Region,
    times: int,
    labels: dict[str, str],
) -> Iterator[_Visit]:
    """Yields every op that runs, in program order, entering loops and calls.

    labels: the region name of each loop, filled in here.
    """
    for op in module[name]:
        yield _Visit(op, name, region, times)
        if op.opcode == "while":
            trips = hlo_text.trip_count(module, op)
            executions = times if trips is None else times * trips
            inner = _loop_region(op, region, executions, labels)
            yield from _walk(module, op.called("body")[0], inner, executions, labels)
        elif op.opcode == "conditional":
            # Which branch runs depends on data: the costliest counts.
            walks = [
                list(_walk(module, branch, region, times, labels)) for branch in branches_of(op)
            ]
            yield from max(
                walks,
                key=lambda visits: sum((visit.op.cycles or 0) * visit.times for visit in visits),
            )
        elif op.opcode in ("call", "call-start", "async-start"):
            for callee in op.called("to_apply", "calls"):
                yield from _walk(module, callee, region, times, labels)


def _loop_region(loop: Op, parent: Region, times: int, labels: dict[str, str]) -> Region:
    """Returns the region of a loop's body: its parent's inside a forward or backward loop, else
    its own.
    """
    origin = loop.op_name
    kind = (
        "backward loop"
        if "transpose(" in origin
        else "forward loop"
        if "jvp(" in origin
        else "loop"
    )
    is_inside = parent.name.startswith(("forward", "backward")) or (
        kind == "loop" and parent.name != ENTRY
    )
    if is_inside:
        return parent
    label = labels.setdefault(loop.name, f"{kind}#{len(labels)}")
    return Region(label, origin, times, 0)


def branches_of(op: Op) -> list[str]:
    """Returns the names of the computations of which a conditional executes one."""
    return op.called("branch_computations", "true_computation", "false_computation")


def has_product(module: Module, fusion: Op) -> bool:
    """Returns whether a fusion computes a matrix product."""
    ops = module[fusion.called("calls")[0]]
    return any(op.opcode in ("convolution", "dot") for op in ops)


def product_dtypes(module: Module) -> collections.Counter[str]:
    """Matrix products in the text of a program by the dtypes of their operands: "s8 x s8"."""
    found = collections.Counter()
    for ops in module.computations.values():
        dtype_of = {op.name: op.shape.partition("[")[0] for op in ops}
        for op in ops:
            if op.opcode in ("convolution", "dot"):
                found[" x ".join(dtype_of[name] for name in op.operands)] += 1
    return found


def transfer_of(module: Module, op: Op, ops: list[Op], mesh: Mapping[str, int]) -> Transfer | None:
    """Returns the collective that an op of the computation `ops` is or, as a fusion, holds; None
    if there is none.
    """
    outer, kind = op, None
    if op.opcode == "fusion":
        ops = module[op.called("calls")[0]]
        op = next((inner for inner in ops if _COLLECTIVE.fullmatch(inner.opcode)), None)
        if op is None:
            return None
        if op.opcode.startswith("all-reduce") and any(o.opcode == "dynamic-slice" for o in ops):
            kind = "reduce-scatter"
    elif op.opcode == "send" and (match := _BETWEEN_SLICES.search(op.attributes)):
        sent = hlo_text.split_tuple(op.shape)[0]
        kind = match[1].lower().replace("_", "-")
        return Transfer(op.name, kind, ("slices",), hlo_text.num_bytes(sent))
    match = _COLLECTIVE.fullmatch(op.opcode)
    if match is None:
        return None
    kind = kind or match[1]
    shapes = {other.name: other.shape for other in ops}
    if kind == "all-gather":
        sent = hlo_text.split_tuple(op.shape)[1] if op.opcode.endswith("-start") else op.shape
    else:
        sent = " ".join(shapes[name] for name in op.operands)
    found = replica_groups.parse(op.attributes, math.prod(mesh.values()))
    axes = ("?",) if found is None else replica_groups.axes_of(found, mesh)
    if kind == "collective-permute":
        # A pair tells the axis, not how much of it.
        axes = tuple(axis.partition("/")[0] for axis in axes)
    return Transfer(outer.name, kind, axes, hlo_text.num_bytes(sent))
