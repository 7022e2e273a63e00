"""Compiles a config's train step for a pod on this machine, and reports on it."""

import dataclasses
import re
import resource
import time
from typing import Any

import jax

from hunyuan_jax.config import Config
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.layers.mixer.context_facts import Form
from hunyuan_jax.model.count import count
from hunyuan_jax.parallel.mesh import make_mesh
from hunyuan_jax.plan import hlo, hlo_text, kernel_speed, links, memory, timeline, topology
from hunyuan_jax.plan.timeline import Timeline
from hunyuan_jax.post.build import build_objective
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.state import build_program
from pallas_kernels import tpu_compiler

# The second bandwidth at which `plan` gives a step: 150 instead of 180 GB/s an axis of v5p.
SLOW_LINKS = 150 / 180

# How far the all-in seconds of three published steps were from what was published, at most
# (docs/results/calibration.md).
ALL_IN_ERROR = 0.15

_GIB = 2**30


class HbmOverflowError(ConfigError):
    """The step does not fit into the memory of a device."""

    def __init__(self, message: str, overflow: "Overflow"):
        super().__init__(message)
        self.overflow = overflow


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled train step.

    compiled: jax's compiled program.
    seconds: time to lower and compile it.
    host_bytes: peak resident memory of this process so far.
    """

    compiled: Any
    seconds: float
    host_bytes: int


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """The compiler's figures in bytes per device.

    aliased: outputs that reuse the memory of an argument; they count in `outputs` too.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    hbm: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What `plan` prints.  Bytes are per device; seconds and FLOPs are per step.

    model_flops: FLOPs of the model over all devices, attention included (`model.count`).
    ideal_seconds: 6 x active parameters x tokens at the peak of the chips.
    estimated_seconds: the compiler's cycles at the chip's clock, plus the kernels' FLOPs at its
      peak, without collectives.
    share_of_ideal: ideal_seconds / estimated_seconds, an upper bound.
    mfu: model_flops at the peak / estimated_seconds, an upper bound.
    compute_seconds: as estimated_seconds, with the kernels and lookups of rows at their static
      cycles.
    exposed_seconds: in which compute waits for collectives; this and the next three are None if
      the step was compiled fast.
    all_in_seconds: compute_seconds + exposed_seconds.
    all_in_share_of_ideal: ideal_seconds / all_in_seconds.
    slow_links_seconds: all_in_seconds with links of SLOW_LINKS of the bandwidth.
    timeline: the schedule behind all_in_seconds.
    context_forms: `memory.context_forms`.
    """

    topology: str
    num_devices: int
    devices_per_chip: int
    mesh: dict[str, int]
    tokens: int
    memory: DeviceMemory
    items: memory.Estimate
    model_flops: int
    ideal_seconds: float
    estimated_seconds: float
    share_of_ideal: float
    mfu: float
    compute_seconds: float
    exposed_seconds: float | None
    all_in_seconds: float | None
    all_in_share_of_ideal: float | None
    slow_links_seconds: float | None
    clock_hz: float
    peak_flops: float
    hlo: hlo.HloReport
    compile_seconds: float
    host_bytes: int
    timeline: Timeline
    context_forms: tuple[Form, ...] = ()

    @property
    def difference(self) -> float:
        """(estimated peak - compiler's peak) / compiler's peak."""
        return self.items.peak / self.memory.peak - 1

    @property
    def all_in_mfu(self) -> float | None:
        """model_flops at the peak / all_in_seconds: of long rows, most FLOPs are attention's."""
        if self.all_in_seconds is None:
            return None
        return self.mfu * self.estimated_seconds / self.all_in_seconds


def compile_step(config: Config, devices: list, is_fast: bool = False) -> CompiledStep:
    """Compiles the step that train.py would run on `devices`; if is_fast, with weights and
    gradients sent by the TensorCores instead of the SparseCores, whose programs take long.

    Raises:
      ConfigError: the mesh or the rules table refuse the config.
      HbmOverflowError: the step needs more memory than a device has.
    """
    start = time.perf_counter()
    program = build_program(config, make_mesh(config.mesh, devices), build_objective)
    lowered = step_lib.make_train_step(program).lower(
        program.state, step_lib.abstract_batch(program)
    )
    try:
        with tpu_compiler.without_cache():
            compiled = lowered.compile(
                tpu_compiler.without_sparse_cores(devices[0]) if is_fast else None
            )
    except jax.errors.JaxRuntimeError as e:
        overflow = parse_overflow(str(e))
        if overflow is None:
            raise
        raise _overflow_error(overflow, config, len(devices)) from e
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return CompiledStep(compiled, time.perf_counter() - start, peak_kib * 1024)


def report(config: Config, topology_name: str, is_fast: bool = False) -> Report:
    """Compiles the step for `config.mesh.num_slices` slices of this name and reports on it; see
    `compile_step` for is_fast.

    Raises:
      ConfigError, HbmOverflowError: see `topology_devices` and `compile_step`.
    """
    chip = topology.chip_of(topology_name)
    devices = topology.topology_devices(topology_name, config.mesh.num_slices)
    items = memory.estimate(config, len(devices))
    step = compile_step(config, devices, is_fast)
    mesh = memory.mesh_sizes(config, len(devices))
    module = hlo_text.parse(step.compiled.as_text())
    at_full, at_slow = (
        timeline.walk(
            module,
            mesh,
            links.links_of(make_mesh(config.mesh, devices), chip.name, share),
            chip.clock_hz,
            kernel_speed.seconds_on(chip),
        )
        for share in (1.0, SLOW_LINKS)
    )
    read = hlo.analyse(module, mesh, {} if is_fast else at_full.collectives)
    stats = step.compiled.memory_analysis()
    device_memory = DeviceMemory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
        hbm=chip.hbm_bytes,
    )
    counts = count(config.model, config.train.seq_len)
    tokens = config.train.batch_size * config.train.seq_len
    peak_flops = chip.peak_flops * len(devices)
    ideal = 6 * counts.active * tokens / peak_flops
    estimated = read.cycles / chip.clock_hz + read.kernel_flops / chip.peak_flops
    return Report(
        topology=topology_name,
        num_devices=len(devices),
        devices_per_chip=chip.devices_per_chip,
        mesh=mesh,
        tokens=tokens,
        memory=device_memory,
        items=items,
        model_flops=counts.flops_per_token * tokens,
        ideal_seconds=ideal,
        estimated_seconds=estimated,
        share_of_ideal=ideal / estimated,
        mfu=counts.flops_per_token * tokens / peak_flops / estimated,
        compute_seconds=at_full.compute,
        exposed_seconds=None if is_fast else at_full.seconds - at_full.compute,
        all_in_seconds=None if is_fast else at_full.seconds,
        all_in_share_of_ideal=None if is_fast else ideal / at_full.seconds,
        slow_links_seconds=None if is_fast else at_slow.seconds,
        clock_hz=chip.clock_hz,
        peak_flops=chip.peak_flops,
        hlo=read,
        compile_seconds=step.seconds,
        host_bytes=step.host_bytes,
        timeline=at_full,
        context_forms=memory.context_forms(config, len(devices)),
    )


@dataclasses.dataclass(frozen=True)
class Overflow:
    """Bytes per device that a program needs and has; the largest allocations, if it names any."""

    used: int
    available: int
    largest: tuple[str, ...]


def parse_overflow(message: str) -> Overflow | None:
    """Parses the compiler's out-of-memory message; returns None for another error.

    libtpu 0.0.50 writes "memory required for HLO temporaries (202G) exceeds available HBM
    (95.7G)", arguments included; others write "Used 107G of 95.7G hbm" and a list of the largest
    allocations.
    """
    size = r"([\d.]+[KMGT]?)"
    match = re.search(rf"Used {size} of {size} hbm", message) or re.search(
        rf"\({size}\) exceeds available HBM \({size}\)", message
    )
    if match is None:
        return None
    largest = []
    for entry in re.split(r"\n\s*\d+\. (?=Size:)", message)[1:]:
        fields = dict(re.findall(r"(Size|Shape): (\S+)", entry))
        origin = re.search(r'op_name="([^"\[]*)', entry)
        largest.append(
            f"{fields['Size']} {fields.get('Shape', '')}" + (f" of {origin[1]}" if origin else "")
        )
    return Overflow(_bytes(match[1]), _bytes(match[2]), tuple(largest))


def _overflow_error(overflow: Overflow, config: Config, num_devices: int) -> HbmOverflowError:
    """Returns an error that says how much is missing, what is largest and what could fit.

    The largest items are those of our estimate if the compiler names none.
    """
    items = sorted(memory.estimate(config, num_devices).items, key=lambda item: -item.bytes)
    largest = overflow.largest[:3] or [
        f"{item.name} {item.bytes / _GIB:.1f} GiB by our estimate" for item in items[:3]
    ]
    remedies = [
        "config.model.remat = 'full'" * (config.model.remat != "full"),
        "config.optimizer.state_dtype = 'bfloat16' or 'fp8_lm'"
        * (config.optimizer.state_dtype == "float32"),
        "config.optimizer.state_dtype = 'fp8_lm'" * (config.optimizer.state_dtype == "bfloat16"),
        "a smaller config.train.batch_size" * (config.train.batch_size > num_devices),
        "a larger slice (`plan --fit` finds the smallest)",
    ]
    return HbmOverflowError(
        f"the step needs {overflow.used / _GIB:.1f} GiB of HBM per device, of which "
        f"{overflow.available / _GIB:.1f} GiB are available: "
        f"{(overflow.used - overflow.available) / _GIB:.1f} GiB too much. Largest: "
        f"{'; '.join(largest)}. What could fit: {'; '.join(filter(None, remedies))}.",
        overflow,
    )


def _bytes(text: str) -> int:
    """Converts '95.73G' to bytes."""
    factors = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return int(float(text.rstrip("KMGT")) * factors.get(text[-1], 1))
