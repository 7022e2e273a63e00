"""What the TPU compiler says about a compiled step: estimated cycles per region, kernels without
an estimate, every collective.

Pure text in, dataclasses out.  All of it is the compiler's own model of a TPU, not a measurement
(../shared/reference/checking_without_accelerators.md section 1): say so wherever it is shown.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

from hunyuan_jax.plan import hlo_text
from hunyuan_jax.plan import replica_groups as groups
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
# On one line and in quotes, or, within a fusion, over several lines and without.
_KERNEL_FLOPS = re.compile(r'"cost_estimate":\s*\{[^{}]*"flops":"?(\d+)')
# Between slices a collective is a pair of send and recv that the megascale runtime serves.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class Region:
    """Part of a step: 'entry', 'forward loop', 'backward loop' or 'loop'; of several with one name
    the costliest, which is the one over the layers, has no number.

    op_name: the loop's origin in the program; times: executions of its body per step; cycles: of
    all executions together, without kernels, collectives and ops whose estimate is unknown.
    """

    name: str
    op_name: str
    times: int
    cycles: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel, for which the compiler gives no cycles.

    times: executions per step, all call sites together; flops: of all of them, as the kernel
    states them, 0 if it does not.
    """

    name: str
    region: str
    times: int
    flops: int


@dataclasses.dataclass(frozen=True)
class CostlyOp:
    """cycles: of all executions of this op together."""

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
    axes: mesh axes; 'data/4' is a part of one, ('slices',) the network between slices, ('?',)
    groups that could not be read.
    bytes: per device and execution, the result's for an all-gather and the operands' for the
    others.
    count: call sites; times: executions per step of each.
    can_overlap: it is split into start and done with compute scheduled between, or fused with a
    matrix product.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int
    times: int
    region: str
    can_overlap: bool

    @property
    def total_bytes(self) -> int:
        """Of all call sites and executions in one step, per device."""
        return self.bytes * self.count * self.times


@dataclasses.dataclass(frozen=True)
class HloReport:
    """regions in program order, ops and collectives by decreasing cost.

    num_unknown_cycles: ops that run in a step and whose estimate the compiler left unknown (it
    does for what it gives to the SparseCore); num_unknown_trips: loops whose length depends on
    data, counted as one trip.
    """

    regions: tuple[Region, ...]
    kernels: tuple[Kernel, ...]
    top_ops: tuple[CostlyOp, ...]
    collectives: tuple[Collective, ...]
    num_unknown_cycles: int
    num_unknown_trips: int

    @property
    def cycles(self) -> int:
        """Estimated cycles of one step; kernels, collectives and unknown ops left out."""
        return sum(region.cycles for region in self.regions)

    @property
    def kernel_flops(self) -> int:
        """What the kernels of one step state."""
        return sum(kernel.flops for kernel in self.kernels)


@dataclasses.dataclass(frozen=True)
class _Visit:
    """One op of the schedule: where it stands, how often it runs, and whether an asynchronous call
    around it spans compute.
    """

    op: Op
    computation: str
    region: Region  # its cycles are still 0
    times: int
    can_overlap: bool = False


def analyse(text: str, mesh: Mapping[str, int], num_top: int = 20) -> HloReport:
    """Reads a scheduled module.

    Args:
      text: `compiled.as_text()`.
      mesh: axis sizes in mesh order.
      num_top: how many of the costliest ops to list.
    """
    module = hlo_text.parse(text)
    visits = list(_walk(module, module.entry, Region(ENTRY, "", 1, 0), 1, {}))
    cycles, kernels, kernel_flops, found = (collections.Counter() for _ in range(4))
    regions, costly = {}, []
    for visit in visits:
        op, region = visit.op, visit.region.name
        regions.setdefault(region, visit.region)
        if collective := _collective(module, visit, mesh):
            found[collective] += 1
            continue
        for kernel in _kernels(module, op):
            key = (_kernel_name(kernel.name), region)
            kernels[key] += visit.times
            stated = _KERNEL_FLOPS.search(kernel.attributes)
            kernel_flops[key] += visit.times * int(stated[1]) if stated else 0
        if op.cycles:
            cycles[region] += op.cycles * visit.times
            costly.append(
                CostlyOp(
                    op.name, op.shape, op.op_name, region, visit.times, op.cycles * visit.times
                )
            )
    names = _numbered(regions, cycles)
    collectives = [
        dataclasses.replace(collective, count=count) for collective, count in found.items()
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


def _kernels(module: Module, op: Op) -> list[Op]:
    """The Pallas kernels that run as this op: itself, or one that is fused with the writing of its
    result into a larger array.
    """
    ops = module[op.called("calls")[0]] if op.opcode == "fusion" else [op]
    return [
        inner
        for inner in ops
        if inner.opcode == "custom-call"
        and f'custom_call_target="{_KERNEL_TARGET}"' in inner.attributes
    ]


def _kernel_name(op_name: str) -> str:
    """Without the number of the op, and the operand that the compiler adds when the result goes
    straight into another kernel.
    """
    return re.sub(r"(\.\d+)+(\.\w+_)?$", "", op_name)


def _numbered(regions: Iterable[str], cycles: Mapping[str, int]) -> dict[str, str]:
    """Final names of the regions 'KIND#NUMBER': the costliest of a kind is 'KIND', the next 'KIND
    2', ...
    """
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
    can_overlap: bool = False,
) -> Iterator[_Visit]:
    """Every op that runs, loops and calls entered, in program order.  `labels` collects the region
    name of each loop.
    """
    ops = module[name]
    for i, op in enumerate(ops):
        yield _Visit(op, name, region, times, can_overlap)
        if op.opcode == "while":
            trips = hlo_text.trip_count(module, op)
            executions = times if trips is None else times * trips
            inner = _loop_region(op, region, executions, labels)
            yield from _walk(module, op.called("body")[0], inner, executions, labels, can_overlap)
        elif op.opcode == "conditional":
            branches = op.called("branch_computations", "true_computation", "false_computation")
            # Which branch runs is not known here: the costliest counts.
            walks = [
                list(_walk(module, branch, region, times, labels, can_overlap))
                for branch in branches
            ]
            yield from max(
                walks,
                key=lambda visits: sum((visit.op.cycles or 0) * visit.times for visit in visits),
            )
        elif op.opcode in ("call", "call-start", "async-start"):
            spans = can_overlap or (op.opcode != "call" and _spans_compute(module, ops, i))
            for callee in op.called("to_apply", "calls"):
                yield from _walk(module, callee, region, times, labels, spans)


def _loop_region(loop: Op, parent: Region, times: int, labels: dict[str, str]) -> Region:
    """The region of a loop's body: its own if it is a forward or backward loop that stands in
    neither, else its parent's.
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


def _collective(module: Module, visit: _Visit, mesh: Mapping[str, int]) -> Collective | None:
    """What the op sends, or None if it sends nothing; its count is 0."""
    op, ops = visit.op, module[visit.computation]
    can_overlap = visit.can_overlap
    if op.opcode == "fusion":
        ops = module[op.called("calls")[0]]
        inner = next((inner for inner in ops if _COLLECTIVE.fullmatch(inner.opcode)), None)
        if inner is None:
            return None
        is_scattered = inner.opcode.startswith("all-reduce") and any(
            other.opcode == "dynamic-slice" for other in ops
        )
        kind = "reduce-scatter" if is_scattered else _COLLECTIVE.fullmatch(inner.opcode)[1]
        can_overlap |= any(other.opcode in ("convolution", "dot") for other in ops)
        op = inner
    elif match := _COLLECTIVE.fullmatch(op.opcode):
        kind = match[1]
        can_overlap |= bool(match[2]) and _spans_compute(module, ops, ops.index(op))
    elif op.opcode == "send" and (match := _BETWEEN_SLICES.search(op.attributes)):
        kind, sent = match[1].lower().replace("_", "-"), hlo_text.split_tuple(op.shape)[0]
        can_overlap |= _spans_compute(module, ops, ops.index(op))
        return Collective(
            kind,
            ("slices",),
            hlo_text.num_bytes(sent),
            0,
            visit.times,
            visit.region.name,
            can_overlap,
        )
    else:
        return None
    shapes = {other.name: other.shape for other in ops}
    if kind == "all-gather":
        sent = hlo_text.split_tuple(op.shape)[1] if op.opcode.endswith("-start") else op.shape
    else:
        sent = " ".join(shapes[name] for name in op.operands)
    found = groups.parse(op.attributes, math.prod(mesh.values()))
    axes = ("?",) if found is None else groups.axes_of(found, mesh)
    if kind == "collective-permute":
        axes = tuple(
            axis.partition("/")[0] for axis in axes
        )  # of a pair: along which axis, not how much of it
    return Collective(
        kind, axes, hlo_text.num_bytes(sent), 0, visit.times, visit.region.name, can_overlap
    )


def _spans_compute(module: Module, ops: list[Op], start: int) -> bool:
    """Whether compute is scheduled between the start op at this index and its done op."""
    names = {ops[start].name}
    has_compute = False
    for op in ops[start + 1 :]:
        if names & set(op.operands):
            if op.opcode.endswith("-done"):
                return has_compute
            if op.opcode.endswith("-update"):
                names.add(op.name)
        sends = op.opcode == "fusion" and any(
            _COLLECTIVE.fullmatch(inner.opcode) for inner in module[op.called("calls")[0]]
        )
        has_compute |= (
            (bool(op.cycles) and not sends) or op.opcode == "while" or bool(_kernels(module, op))
        )
    return False
