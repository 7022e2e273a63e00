"""Walks a compiled step's schedule with a clock for compute and one for the links of each axis.

A model, not a measurement.  Compute advances by the compiler's cycles, by those of kernel_speed.py
for lookups of rows, and by the seconds that the caller gives for kernels.  A collective takes the
links of its axes for as long as `Links` says, one collective an axis at a time, in the order of
the schedule.  A synchronous one stops compute.  An asynchronous one runs from its start to its
done, and stops compute at its done only for what is left of it.  Every execution of a loop's body
begins with idle links.

Left out: the transfers' own traffic to memory, starting them, stragglers, input.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping

from hunyuan_jax.plan import hlo, hlo_text, kernel_speed
from hunyuan_jax.plan.hlo import Exposure, Transfer
from hunyuan_jax.plan.hlo_text import Module, Op
from hunyuan_jax.plan.links import Links

COMPUTE = "compute"


@dataclasses.dataclass(frozen=True)
class Event:
    """What a lane does from start to end, in seconds; lane: COMPUTE or a mesh axis."""

    lane: str
    name: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Loop:
    """One execution of a loop's body.

    op: the loop; times: executions; seconds: of one of them; events: of one of them.
    """

    op: Op
    times: int
    seconds: float
    events: tuple[Event, ...]


@dataclasses.dataclass(frozen=True)
class Timeline:
    """One step, or one execution of a computation.

    seconds: with all waits.
    compute: seconds without them.
    collectives: by the name of the collective's op.
    loops: all that were met, inner ones first.
    events: without those inside loops.
    """

    seconds: float
    compute: float
    collectives: Mapping[str, Exposure]
    loops: tuple[Loop, ...]
    events: tuple[Event, ...]


class _Clocks:
    """The clocks during one execution of a computation."""

    def __init__(self):
        self.now = self.compute = 0.0
        self.free = collections.defaultdict(float)  # by axis: when its links are idle again
        self.busy, self.exposed = collections.Counter(), collections.Counter()
        self.loops, self.events = [], []

    def work(self, name: str, seconds: float) -> None:
        if seconds:
            self.events.append(Event(COMPUTE, name, self.now, self.now + seconds))
        self.now += seconds
        self.compute += seconds

    def send(self, transfer: Transfer, seconds: float) -> float:
        """Puts a transfer on its links, at once or when they are idle; returns when it ends."""
        axes = [axis.partition("/")[0] for axis in transfer.axes]
        start = max([self.now, *(self.free[axis] for axis in axes)])
        for axis in axes:
            self.free[axis] = start + seconds
            self.events.append(Event(axis, transfer.kind, start, start + seconds))
        self.busy[transfer.op] += seconds
        return start + seconds

    def wait(self, transfer: Transfer, end: float) -> None:
        exposed = max(0.0, end - self.now)
        self.exposed[transfer.op] += exposed
        self.now += exposed

    def run(self, inner: Timeline, name: str, times: int = 1) -> None:
        """Executes a computation `times` times, one after the other."""
        self.events.append(Event(COMPUTE, name, self.now, self.now + inner.seconds * times))
        self.now += inner.seconds * times
        self.compute += inner.compute * times
        for op, (busy, exposed) in inner.collectives.items():
            self.busy[op] += busy * times
            self.exposed[op] += exposed * times
        self.loops += inner.loops


def walk(
    module: Module,
    mesh: Mapping[str, int],
    links: Links,
    clock_hz: float,
    kernel_seconds: Callable[[Op], float],
) -> Timeline:
    """Returns the timeline of one step.

    Args:
      module: a scheduled module.
      mesh: axis sizes in mesh order.
      links: of the mesh.
      clock_hz: turns the compiler's cycles into seconds.
      kernel_seconds: how long a Pallas kernel takes.
    """

    def seconds_of(op: Op) -> float:
        kernels, lookup = hlo.kernels_of(module, op), hlo.lookup_in(module, op)
        cycles = op.cycles or (kernel_speed.lookup_cycles(lookup) if lookup else 0)
        return cycles / clock_hz + sum(map(kernel_seconds, kernels))

    def execute(computation: str) -> Timeline:
        clocks, ops = _Clocks(), module[computation]
        # By the op that a later one takes: (transfer, seconds), and when it ends if it has begun.
        prepared: dict[str, tuple[Transfer, float]] = {}
        under_way: dict[str, tuple[Transfer, float]] = {}
        for op in ops:
            if op.opcode == "while":
                body, times = execute(op.called("body")[0]), hlo_text.trip_count(module, op) or 1
                clocks.run(body, op.name, times)
                clocks.loops.append(Loop(op, times, body.seconds, body.events))
            elif op.opcode == "conditional":
                branches = map(execute, hlo.branches_of(op))
                clocks.run(max(branches, key=lambda branch: branch.seconds), op.name)
            elif op.opcode == "call":
                clocks.run(execute(op.called("to_apply")[0]), op.name)
            elif transfer := _transfer(module, op, ops, mesh):
                seconds = links.seconds(transfer.kind, transfer.axes, transfer.bytes)
                if op.opcode == "call-start" and not op.operands:
                    # Loads the SparseCore's program; the transfer begins at its call-update.
                    prepared[op.name] = transfer, seconds
                elif op.opcode.endswith("-start") or op.opcode == "send":
                    under_way[op.name] = transfer, clocks.send(transfer, seconds)
                else:
                    end = clocks.send(transfer, seconds)
                    if op.opcode == "fusion" and hlo.has_product(module, op):
                        clocks.work(op.name, seconds_of(op))
                    clocks.wait(transfer, end)
            elif source := next((name for name in op.operands if name in prepared), None):
                transfer, seconds = prepared[source]
                under_way[op.name] = transfer, clocks.send(transfer, seconds)
            elif source := next((name for name in op.operands if name in under_way), None):
                if op.opcode.endswith("-done"):
                    clocks.wait(*under_way[source])
                else:  # an update, or what names a part of the result
                    under_way[op.name] = under_way[source]
            else:
                clocks.work(op.name, seconds_of(op))
        return Timeline(
            clocks.now,
            clocks.compute,
            {op: Exposure(clocks.busy[op], clocks.exposed[op]) for op in clocks.busy},
            tuple(clocks.loops),
            tuple(clocks.events),
        )

    return execute(module.entry)


def _transfer(module: Module, op: Op, ops: list[Op], mesh: Mapping[str, int]) -> Transfer | None:
    """The collective that an op is, or that the computation holds which it starts."""
    if op.opcode in ("call-start", "async-start"):
        for name in op.called("calls", "to_apply"):
            for inner in module[name]:
                if found := _transfer(module, inner, module[name], mesh):
                    return found
        return None
    return hlo.transfer_of(module, op, ops, mesh)
