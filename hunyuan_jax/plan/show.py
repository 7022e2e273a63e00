"""Prints plans as tables, and converts them to JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from hunyuan_jax.layers.mixer.context_facts import MAX_HELD_BYTES
from hunyuan_jax.plan import aot, links, memory, topology
from hunyuan_jax.plan.aot import Report
from hunyuan_jax.plan.search import Trial

_GIB = 2**30
_NUM_OPS = 8
_CAVEAT = "a model of the compiler's schedule, not a measurement"


def report_data(report: Report) -> dict[str, Any]:
    """Returns the report's fields, with estimated_peak and difference, for JSON."""
    # The timeline holds the compiled program: thousands of lines.
    without_timeline = dataclasses.replace(report, timeline=None)
    data = dataclasses.asdict(without_timeline)
    del data["timeline"]
    return data | {
        "peak_bytes": report.memory.peak,
        "estimated_peak": report.items.peak,
        "difference": report.difference,
        "all_in_mfu": report.all_in_mfu,
    }


def trials_data(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Returns one JSON object per trial; that of a compiled one holds its report."""
    return [
        {
            **_settings(trial),
            "estimated_peak": trial.estimate,
            "outcome": trial.outcome,
            "report": trial.report and report_data(trial.report),
        }
        for trial in trials
    ]


def print_report(report: Report) -> None:
    """Prints a report as tables."""
    console = _console()
    chips = report.num_devices // report.devices_per_chip
    axes = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    per_device = (
        ""
        if report.devices_per_chip == 1
        else f", {report.devices_per_chip} devices per chip: figures are per device"
    )
    slices = chips * report.devices_per_chip // topology.num_devices(report.topology)
    several = f"{slices} x " if slices > 1 else ""
    console.print(
        f"{several}{report.topology}: {chips} chips{per_device}; mesh {axes}; {report.tokens:,} "
        "tokens per step",
        highlight=False,
    )
    for table in (
        _memory_table(report),
        _items_table(report.items),
        *([_context_table(report)] if report.context_forms else []),
        _time_table(report),
        _ops_table(report),
        _collectives_table(report),
        _assumptions_table(report),
    ):
        console.print(table)
    if report.all_in_seconds is None:
        console.print(
            "--fast: weights and gradients are sent by the TensorCores. Left out: how long "
            "compute waits for collectives, and the memory of weights that arrive ahead.",
            highlight=False,
        )
    console.print(
        f"Times are from {_CAVEAT}. Compiled in {report.compile_seconds:.0f} s with "
        f"{report.host_bytes / _GIB:.1f} GiB on this host.",
        highlight=False,
    )


def print_trials(trials: Sequence[Trial], title: str, num_rows: int = 30) -> None:
    """Prints one row per trial, at most `num_rows`."""
    table = _table(
        title,
        "slice",
        "mesh",
        "remat",
        "batch",
        "optimizer state",
        ">estimate GiB",
        ">peak GiB",
        ">all-in s",
        ">share of ideal, all-in",
        ">without collectives",
        "outcome",
    )
    for trial in trials[:num_rows]:
        settings = _settings(trial)
        report = trial.report
        table.add_row(
            trial.topology,
            settings["mesh"],
            settings["remat"],
            str(settings["batch_size"]),
            settings["state_dtype"],
            "" if trial.estimate is None else _gib(trial.estimate),
            _gib(report.memory.peak) if report else "",
            f"{report.all_in_seconds:.2f}" if report else "",
            f"{report.all_in_share_of_ideal:.0%}" if report else "",
            f"{report.share_of_ideal:.0%}" if report else "",
            trial.outcome,
        )
    console = _console()
    console.print(table)
    if len(trials) > num_rows:
        console.print(f"and {len(trials) - num_rows} more; --json prints all", highlight=False)
    console.print(f"Times are from {_CAVEAT}.", highlight=False)


def _memory_table(report: Report) -> Table:
    stats, items = report.memory, report.items
    state = items.in_phase(memory.ALWAYS)
    table = _table("Memory per device, GiB", "", ">compiler", ">our estimate", ">difference")
    rows = (
        ("arguments (state and batch)", stats.arguments, state),
        ("peak without arguments", stats.peak - stats.arguments, items.peak - state),
        ("peak", stats.peak, items.peak),
    )
    for name, compiled, estimated in rows:
        table.add_row(name, _gib(compiled), _gib(estimated), f"{estimated / compiled - 1:+.1%}")
    table.add_row("HBM", _gib(stats.hbm), "", f"{stats.peak / stats.hbm:.0%} used")
    table.add_row("temporaries, in total", _gib(stats.temporaries), "", "")
    table.add_row(
        "outputs (of which in the memory of arguments)",
        f"{_gib(stats.outputs)} ({_gib(stats.aliased)})",
        "",
        "",
    )
    return table


def _items_table(items: memory.Estimate) -> Table:
    table = _table("Our estimate, GiB: peak = always + largest phase", "phase", "item", ">GiB")
    for phase in (memory.ALWAYS, memory.LAYERS, memory.LOSS, memory.UPDATE):
        for item in items.items:
            if item.phase == phase:
                table.add_row(phase, item.name, _gib(item.bytes))
        table.add_row(
            phase,
            "total" + (" (largest)" if phase == items.peak_phase else ""),
            _gib(items.in_phase(phase)),
            end_section=True,
        )
    return table


def _time_table(report: Report) -> Table:
    table = _table(
        f"Estimated time per step at {report.clock_hz / 1e9:.2f} GHz",
        "region",
        ">executions",
        ">cycles",
        ">ms",
    )
    for region in report.hlo.regions:
        table.add_row(
            region.name,
            str(region.times),
            f"{region.cycles:,}",
            f"{1e3 * region.cycles / report.clock_hz:,.1f}",
        )
    for kernel in report.hlo.kernels:
        at_peak = f"{1e3 * kernel.flops / report.peak_flops:,.1f}" if kernel.flops else "left out"
        table.add_row(
            f"kernel {kernel.name}, {kernel.region}", str(kernel.times), "at the peak", at_peak
        )
    table.add_row(
        "total",
        "",
        f"{report.hlo.cycles:,}",
        f"{1e3 * report.estimated_seconds:,.1f}",
        end_section=True,
    )
    for name, seconds in (
        ("compute, with kernels at their static cycles", report.compute_seconds),
        ("exposed collectives", report.exposed_seconds),
        (f"all-in, +- {aot.ALL_IN_ERROR:.0%}", report.all_in_seconds),
        (f"all-in with {aot.SLOW_LINKS:.0%} of the links' bandwidth", report.slow_links_seconds),
    ):
        if seconds is not None:
            table.add_row(name, "", "", f"{1e3 * seconds:,.1f}")
    table.add_section()
    table.add_row(
        "ideal: 6 x active parameters x tokens at the peak",
        "",
        "",
        f"{1e3 * report.ideal_seconds:,.1f}",
    )
    table.add_row(
        "share of ideal, without collectives, kernels at the peak",
        "",
        "",
        f"{report.share_of_ideal:.1%}",
    )
    if report.all_in_seconds is not None:
        table.add_row("share of ideal, all-in", "", "", f"{report.all_in_share_of_ideal:.1%}")
        table.add_row(
            f"share of ideal, all-in with {aot.SLOW_LINKS:.0%} of the links' bandwidth",
            "",
            "",
            f"{report.ideal_seconds / report.slow_links_seconds:.1%}",
        )
    table.add_row(
        f"implied MFU ({report.model_flops:.4g} FLOPs, attention included)",
        "",
        "",
        f"{report.mfu:.1%}",
    )
    if report.all_in_seconds is not None:
        table.add_row("implied MFU, all-in", "", "", f"{report.all_in_mfu:.1%}")
    table.add_section()
    if report.hlo.num_unknown_cycles:
        table.add_row(
            "ops of unknown cost",
            str(report.hlo.num_unknown_cycles),
            "",
            "left out",
        )
    if report.hlo.num_unknown_trips:
        table.add_row(
            "loops whose length depends on data",
            str(report.hlo.num_unknown_trips),
            "",
            "counted as one trip",
        )
    return table


def _context_table(report: Report) -> Table:
    """The forms of attention over the chips of a row, and why one is taken."""
    table = _table(
        "Attention over the chips of a row (config.mesh.context), of a group of layers",
        "form",
        ">GiB sent a step and chip",
        ">GiB held",
        "",
    )
    for index, form in enumerate(report.context_forms):
        reason = form.refusal or (
            "more than a chip may hold" if form.held_bytes > MAX_HELD_BYTES else "sends more"
        )
        table.add_row(
            form.name,
            _gib(form.sent_bytes),
            _gib(form.held_bytes),
            reason if index else "taken",
        )
    return table


def _ops_table(report: Report) -> Table:
    table = _table("Costliest ops", ">ms", ">executions", "op", "from")
    for op in report.hlo.top_ops[:_NUM_OPS]:
        table.add_row(
            f"{1e3 * op.cycles / report.clock_hz:.3g}", str(op.times), op.name, op.op_name
        )
    return table


def _collectives_table(report: Report) -> Table:
    table = _table(
        "Collectives per step and device",
        "kind",
        "axes",
        ">MiB each",
        ">call sites",
        ">executions",
        ">GiB in total",
        "region",
        ">ms on the links",
        ">ms exposed",
    )
    for item in report.hlo.collectives:
        table.add_row(
            item.kind,
            " x ".join(item.axes),
            f"{item.bytes / 2**20:,.2f}",
            str(item.count),
            str(item.times),
            _gib(item.total_bytes),
            item.region,
            *(
                "" if report.all_in_seconds is None else f"{1e3 * seconds:,.1f}"
                for seconds in (item.busy, item.exposed)
            ),
        )
    return table


def _assumptions_table(report: Report) -> Table:
    chip = topology.chip_of(report.topology)
    table = _table("What the times assume", "", ">value", "source")
    for name, value, source in (
        ("clock", f"{chip.clock_hz / 1e9:.2f} GHz", "pallas_kernels/chips.py"),
        ("peak, bfloat16", f"{chip.peak_flops / 1e12:.0f} TFLOP/s", "the vendor's data sheet"),
        (
            "all-in",
            f"within {aot.ALL_IN_ERROR:.0%} of three published steps",
            "docs/results/calibration.md",
        ),
        (
            "a link, one way",
            f"{links.LINK_BYTES_PER_S[chip.name] / 1e9:.0f} GB/s",
            "jax-ml.github.io/scaling-book/tpus",
        ),
        ("products outside of kernels", "the compiler's cycles", "libtpu"),
        ("kernels", "static cycles at a52b's shapes", "docs/results/kernels.md"),
        ("lookups of rows", "static cycles of x[index] alone", "plan/kernel_speed.py"),
        ("an axis carries", "one collective at a time", "plan/timeline.py"),
        ("left out", "memory traffic of transfers, stragglers, input", "plan/timeline.py"),
    ):
        table.add_row(name, value, source)
    return table


def _settings(trial: Trial) -> dict[str, Any]:
    config = trial.config
    sizes = dataclasses.asdict(config.mesh)
    del sizes["num_slices"]
    if trial.estimate is not None:
        sizes = memory.mesh_sizes(config, trial.num_devices)
    return {
        "topology": trial.topology,
        "num_devices": trial.num_devices,
        "mesh": " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1),
        "remat": config.model.remat,
        "batch_size": config.train.batch_size,
        "state_dtype": config.optimizer.state_dtype,
    }


def _table(title: str, *columns: str) -> Table:
    """Returns an empty table; columns whose names start with '>' are right-aligned numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            overflow="fold",
        )
    return table


def _gib(num_bytes: int) -> str:
    size = num_bytes / _GIB
    return f"{size:,.2f}" if size >= 0.1 or size == 0 else f"{size:.2g}"


def _console() -> Console:
    # x[index] is no mark of a style.  In a pipe rich takes 80 columns, too few for the tables.
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=150, markup=False)
