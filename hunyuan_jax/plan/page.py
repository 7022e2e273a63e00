"""Writes a page with a plan's figures and the timeline of its costliest loops, as one HTML file.

The page has no script and loads nothing; a tooltip names each bar.
"""

import html
from collections.abc import Iterable
from pathlib import Path

from hunyuan_jax.plan.aot import ALL_IN_ERROR, Report
from hunyuan_jax.plan.timeline import COMPUTE, Event, Loop

_WIDTH, _LANE, _LEFT = 1400, 34, 90  # pixels
_SHORTEST = 1e-3  # share of the loop below which an event is not drawn
_NUM_LOOPS = 2
# Part of an event's name -> colour.
_COLOURS = {
    "expert_": "#0d9488",
    "flash_attention": "#7c3aed",
    "all-gather": "#2563eb",
    "reduce-scatter": "#ea580c",
    "all-to-all": "#db2777",
    "all-reduce": "#dc2626",
}
_OTHER = "#94a3b8"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px;
  padding: 0 1rem; color: #1b2430; background: #fff; }
table { border-collapse: collapse; } td { padding: .15rem 1.5rem .15rem 0; }
td + td { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 2rem 0; overflow-x: auto; } svg text { font: 12px system-ui, sans-serif; }
.key span { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
"""


def write(report: Report, path: str) -> Path:
    """Writes the page and returns its path; an existing file is replaced."""
    loops = sorted(report.timeline.loops, key=lambda loop: -loop.seconds * loop.times)
    title = f"Step of {report.tokens:,} tokens on {report.topology}"
    rows = (
        ("ideal: 6 x active parameters x tokens at the peak", report.ideal_seconds),
        ("compute", report.compute_seconds),
        ("exposed collectives", report.exposed_seconds),
        (f"all-in, ± {ALL_IN_ERROR:.0%}", report.all_in_seconds),
    )
    body = [
        f"<h1>{html.escape(title)}</h1>",
        "<p>A model of the compiler's schedule, not a measurement. An empty stretch of the "
        "compute lane is a wait for a transfer.</p>",
        "<table>",
        *(f"<tr><td>{name}</td><td>{seconds:.3f} s</td></tr>" for name, seconds in rows),
        "<tr><td>share of ideal, all-in</td>"
        f"<td>{report.all_in_share_of_ideal:.1%}</td></tr></table>",
        _key(),
        *map(_figure, loops[:_NUM_LOOPS]),
    ]
    output = Path(path)
    output.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{_STYLE}</style>{''.join(body)}</html>\n",
        encoding="utf-8",
    )
    return output


def _key() -> str:
    names = {**_COLOURS, "other compute": _OTHER}
    return (
        '<p class="key">'
        + "".join(f'<span style="background:{c}"></span>{name}' for name, c in names.items())
        + "</p>"
    )


def _figure(loop: Loop) -> str:
    kind = "backward" if "transpose(" in loop.op.op_name else "forward"
    lanes = {COMPUTE: 0} | {
        lane: i + 1 for i, lane in enumerate(sorted({e.lane for e in loop.events} - {COMPUTE}))
    }
    height = _LANE * len(lanes) + 30
    scale = (_WIDTH - _LEFT) / loop.seconds
    labels = (
        f'<text x="0" y="{_LANE * (i + 0.6):.0f}">{html.escape(lane)}</text>'
        for lane, i in lanes.items()
    )
    ticks = (
        f'<text x="{_LEFT + 1e-3 * ms * scale:.1f}" y="{height - 8}">{ms} ms</text>'
        for ms in range(0, int(1e3 * loop.seconds) + 1, max(1, round(1e2 * loop.seconds)))
    )
    bars = (_bar(event, lanes[event.lane], scale) for event in _drawn(loop))
    return (
        f"<figure><figcaption>{kind} loop: one of {loop.times} executions, "
        f"{1e3 * loop.seconds:.1f} ms</figcaption>"
        f'<svg width="{_WIDTH}" height="{height}" role="img">'
        f"{''.join(labels)}{''.join(ticks)}{''.join(bars)}</svg></figure>"
    )


def _drawn(loop: Loop) -> Iterable[Event]:
    return (e for e in loop.events if e.end - e.start > _SHORTEST * loop.seconds)


def _bar(event: Event, lane: int, scale: float) -> str:
    colour = next((c for part, c in _COLOURS.items() if part in event.name), _OTHER)
    title = html.escape(f"{event.name}: {1e3 * (event.end - event.start):.2f} ms")
    return (
        f'<rect x="{_LEFT + event.start * scale:.1f}" y="{_LANE * lane + 4}" '
        f'width="{(event.end - event.start) * scale:.1f}" height="{_LANE - 8}" fill="{colour}">'
        f"<title>{title}</title></rect>"
    )
