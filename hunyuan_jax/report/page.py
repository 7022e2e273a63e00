"""Writes one self-contained HTML page about a run or an evaluation, from files in its folder.

The plots are interactive (plotly, extra `report`): one can zoom into a spike of a run of weeks,
and read the number of a heatmap's cell.  plotly's script is in the page.  A content security
policy admits only that script and ours, by their hashes, so the page loads nothing, and a script
hidden in the run's texts does not run.
"""

import base64
import datetime
import hashlib
import html
import importlib.util
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_jax.config import flat_fields
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import user_path
from hunyuan_jax.report import evaluation
from hunyuan_jax.runlog import goodput, metrics

_MAX_POINTS = 1200  # per curve; more than a screen has pixels
_MAX_COLUMNS = 160  # of the heatmap
_INK, _GREY, _GRID, _BLUE, _ORANGE, _GREEN, _RED = (
    "#1b2430",
    "#66717f",
    "#e8ebef",
    "#2563eb",
    "#ea580c",
    "#0d9488",
    "#dc2626",
)
_CAUSE_COLOURS = {
    goodput.PRODUCTIVE: _GREEN,
    "startup": "#94a3b8",
    "restore": "#64748b",
    "compile": "#6366f1",
    "skipped": "#be185d",
    "data": "#eab308",
    "evaluation": "#38bdf8",
    "checkpoint": _ORANGE,
    "profile": "#a78bfa",
    "repeated": "#f43f5e",
    "down": "#7f1d1d",
}
_SCALE = [
    [0.0, "#b45309"],
    [0.25, "#fcd9a8"],
    [0.5, "#f8fafc"],
    [0.75, "#93c5fd"],
    [1.0, "#1e40af"],
]

_SHOWN_GROUPS, _SHOWN_CHARACTERS = 5, 400  # of completions


def write(workdir: str | os.PathLike, output: str | os.PathLike | None = None) -> Path:
    """Writes the page, by default to WORKDIR/report.html, and returns its path.

    Raises:
      ConfigError: the workdir has neither metrics nor an evaluation, the output's folder does not
        exist, or plotly is missing.
    """
    workdir = Path(user_path(workdir, "--workdir"))
    rows = [
        row for row in metrics.read_objects(workdir / metrics.FILE) if type(row.get("step")) is int
    ]
    if not rows and not _read(workdir / evaluation.FILE):
        raise ConfigError(
            f"{workdir} holds no metrics ({metrics.FILE} is missing or empty). Pass the --workdir "
            "of `python train.py`, or the --output of `eval`."
        )
    if importlib.util.find_spec("plotly") is None:
        raise ConfigError(
            "the report needs plotly, which is not installed: pip install -e '.[report]'"
        )
    path = Path(user_path(output, "--output")) if output else workdir / "report.html"
    if not path.parent.is_dir():
        raise ConfigError(
            f"--output={path}: the folder {path.parent} does not exist; make it first."
        )
    path.write_text(page(workdir, sorted(rows, key=lambda row: row["step"])), encoding="utf-8")
    return path


def page(workdir: Path, rows: list[dict[str, Any]]) -> str:
    """Returns the HTML of a run.

    Args:
      workdir: folder of the run; its config, environment and goodput ledger are read if present.
      rows: rows of metrics.jsonl, ascending by step; none for a folder with an evaluation only.
    """
    from plotly.offline import get_plotlyjs

    config, environment = _read(workdir / "config.json"), _read(workdir / "environment.json")
    ledger = goodput.Ledger(goodput.read_rows(workdir / goodput.FILE))
    name = workdir.absolute().name
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    found = _read(workdir / evaluation.FILE)
    figures = _figures(rows, ledger) if rows else {}
    figures |= evaluation.figures(found, _lay_out)
    metrics_of_tasks = evaluation.table(found)
    cards = "".join(
        f'<section class="card {width}"><h2>{html.escape(title)}</h2>'
        f'<p>{html.escape(note)}</p><div id="{key}"></div></section>'
        for key, (title, note, width, _) in figures.items()
    )
    if metrics_of_tasks:
        cards += f'<section class="card half"><h2>Tasks</h2>{_table(metrics_of_tasks)}</section>'
    data = json.dumps({key: json.loads(figure.to_json()) for key, (*_, figure) in figures.items()})
    scripts = [get_plotlyjs(), _BOOT]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in scripts
    )
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(name)}</title><style>{_STYLE}</style></head>
<body><header><h1>{html.escape(name)}</h1><span>{html.escape(_subtitle(environment))}</span>
<span class="right">{html.escape(now)}</span></header>
<div class="tiles">{_tiles(rows, ledger, config) if rows else ""}</div>
<main>{cards}{_completions(workdir)}
<section class="card half"><h2>Environment</h2>{_table(environment)}</section>
<section class="card half"><h2>Configuration</h2>{_table(dict(flat_fields(config)))}</section>
</main>
<script type="application/json" id="data">{_for_script(data)}</script>
<script>{scripts[0]}</script><script>{scripts[1]}</script></body></html>
"""


_BOOT = """
const figures = JSON.parse(document.getElementById("data").textContent);
const config = {displayModeBar: false, responsive: true, plotlyServerURL: ""};
Promise.all(Object.entries(figures).map(([id, f]) => Plotly.newPlot(id, f.data, f.layout, config)))
  .then(() => document.body.setAttribute("data-drawn", Object.keys(figures).length));
"""

_STYLE = f"""
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; padding: 28px 32px; max-width: 1320px; background: #f5f6f8; color: {_INK};
  font: 14px/1.45 system-ui, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif }}
header {{ display: flex; align-items: baseline; gap: 14px; color: {_GREY}; margin-bottom: 16px }}
h1 {{ margin: 0; font-size: 25px; color: {_INK}; overflow-wrap: anywhere }}
.right {{ margin-left: auto; white-space: nowrap }}
h2 {{ margin: 0; font-size: 15px }}
.card > p {{ margin: 1px 0 4px; color: {_GREY}; font-size: 12.5px }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 12px;
  margin-bottom: 12px }}
.tile, .card {{ background: #fff; border: 1px solid #e1e5ea; border-radius: 10px; min-width: 0 }}
.tile {{ padding: 11px 14px }}
.tile b {{ display: block; font-size: 22px; font-weight: 650; white-space: nowrap }}
.tile span, .tile small {{ color: {_GREY}; font-size: 12px; white-space: nowrap }}
main {{ display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px }}
.half {{ grid-column: span 2 }} .card {{ padding: 13px 16px }} .wide {{ grid-column: span 4 }}
@media (max-width: 860px) {{ main {{ grid-template-columns: 1fr }}
  .half, .wide {{ grid-column: span 1 }} }}
table {{ border-collapse: collapse; width: 100%; margin-top: 6px; font-size: 12.5px }}
td {{ padding: 3px 0; border-top: 1px solid #f0f2f4; vertical-align: top;
  overflow-wrap: anywhere }}
h3 {{ margin: 10px 0 0; font-size: 13px }} .completions td:first-child {{ width: 12% }}
td:first-child {{ color: {_GREY}; width: 46% }}
"""


def _tiles(rows: list[dict[str, Any]], ledger: goodput.Ledger, config: dict[str, Any]) -> str:
    num_steps = (
        config.get("train", {}).get("num_steps") if isinstance(config.get("train"), dict) else None
    )
    last = {
        name: _curve(rows, name)[1][-1]
        for name in ("loss", "validation_loss", "validation_bits_per_byte", "mfu")
        if _curve(rows, name)[1]
    }
    speed = _curve(rows, "tokens_per_second")[1][-20:]
    step, skipped = rows[-1]["step"], (_curve(rows, "skipped_steps")[1] or [0])[-1]
    notes = [f"of {num_steps:,}"] if isinstance(num_steps, int) else []
    notes += [f"{skipped:,.0f} skipped"] if skipped else []
    tiles = [
        ("Step", f"{step:,}", ", ".join(notes)),
        ("Training loss", _number(last.get("loss"), ".4f"), "nats per token"),
        (
            "Validation loss",
            _number(last.get("validation_loss"), ".4f"),
            f"{last['validation_bits_per_byte']:.3f} bits per byte"
            if "validation_bits_per_byte" in last
            else "nats per token",
        ),
        (
            "Tokens/s",
            _number(float(np.median(speed)) if speed else None, ",.0f"),
            "median of the last 20 rows",
        ),
        (
            "MFU",
            _number(last.get("mfu"), ".1%"),
            "of the bf16 peak" if "mfu" in last else "unknown peak",
        ),
        (
            "Goodput",
            _number(ledger.goodput if ledger.total else None, ".1%"),
            f"of {_duration(ledger.total)}",
        ),
        (
            "Restarts",
            f"{max(ledger.num_starts - 1, 0)}",
            f"{_duration(ledger.seconds['down'])} down",
        ),
    ]
    return "".join(
        f'<div class="tile"><span>{html.escape(name)}</span><b>{html.escape(value)}</b>'
        f"<small>{html.escape(note)}&nbsp;</small></div>"
        for name, value, note in tiles
    )


def _figures(
    rows: list[dict[str, Any]], ledger: goodput.Ledger
) -> dict[str, tuple[str, str, str, Any]]:
    """Returns {id: (title, note, width class, figure)} of the plots that the run has data for."""
    import plotly.graph_objects as go

    def lines(height, form, *curves, kind="auto"):
        figure = go.Figure()
        shown = []
        for name, label, colour, mode in curves:
            steps, values = _thinned(*_curve(rows, name))
            shown += values
            line = {"color": colour, "width": 1.6}
            figure.add_scatter(
                x=steps,
                y=values,
                name=label,
                mode=mode,
                line=line,
                marker={"size": 7},
                hovertemplate=f"%{{y:{form}}}",
            )
        axis = (
            kind
            if kind != "auto"
            else "log"
            if shown and min(shown) > 0 and max(shown) > 4 * min(shown)
            else "linear"
        )
        _lay_out(figure, height, showlegend=len(curves) > 1, hovermode="x unified")
        figure.update_yaxes(
            type=axis,
            **(
                {"dtick": "D1" if max(shown) < 8 * min(shown) else "D2", "tickformat": "~g"}
                if axis == "log"
                else {}
            ),
        )
        if axis == "log" and max(shown) > 100 * min(shown):
            figure.update_yaxes(dtick=1)
        if kind == "linear":
            figure.update_yaxes(rangemode="tozero")
        return figure

    loss = lines(
        330,
        ".4f",
        ("loss", "training", _BLUE, "lines"),
        ("validation_loss", "validation", _ORANGE, "lines+markers"),
    )
    found = {
        "loss": ("Loss", "cross entropy, nats per token", "wide", loss),
        "lr": (
            "Learning rate",
            "of the dense matrices; other parameters multiply it by their ratio",
            "half",
            lines(230, ".3~g", ("learning_rate", "", _BLUE, "lines"), kind="linear"),
        ),
        "norm": (
            "Gradient norm",
            "before clipping",
            "half",
            lines(230, ".3~g", ("grad_norm", "", _BLUE, "lines")),
        ),
        "speed": (
            "Throughput",
            "tokens per second, without evaluation and saving",
            "half",
            lines(230, ",.0f", ("tokens_per_second", "", _BLUE, "lines"), kind="linear"),
        ),
    }
    if ledger.total:
        found["goodput"] = (
            "Where the time went",
            f"{_duration(ledger.total)} of wall time, over all restarts",
            "half",
            _goodput_figure(ledger),
        )
    if any("moe/demand" in row or "moe/load" in row for row in rows):
        note = (
            "each expert's share of its layer's choices, relative to an even share; columns are "
            "logged steps"
        )
        found["experts"] = ("Experts by layer and time", note, "wide", _heatmap(rows))
        curves = (
            ("moe/recycled", "recycled", _ORANGE, "lines"),
            ("moe/dropped", "dropped", _RED, "lines"),
        )
        found["moved"] = (
            "Recycled and dropped",
            "share of choices whose expert was full",
            "half",
            lines(230, ".2%", *curves, kind="linear"),
        )
        found["moved"][3].update_yaxes(tickformat=".0%")
        entropy, dead = (
            ("moe/entropy", "", _BLUE, "lines"),
            ("moe/dead_experts", "", _RED, "lines"),
        )
        found["entropy"] = (
            "Router entropy",
            "nats, mean over tokens and layers",
            "quarter",
            lines(230, ".3f", entropy, kind="linear"),
        )
        note = "over all layers; chosen for under 1 % of an even share"
        found["dead"] = ("Dead experts", note, "quarter", lines(230, ".0f", dead, kind="linear"))
    if rewards := _reward_curves(rows):
        note = "mean over a batch"
        found["reward"] = ("Rewards", note, "wide", lines(280, ".3f", *rewards, kind="linear"))
    for name, title, note in _OF_POST_TRAINING:
        if _curve(rows, name)[1]:
            figure = lines(230, ".3~g", (name, "", _BLUE, "lines"), kind="linear")
            found[name.replace("/", "-")] = (title, note, "half", figure)
    return found


# Curves of preferences and rewards: (metric, title, note).
_OF_POST_TRAINING = (
    (
        "rewards/accuracies",
        "Accuracy of preferences",
        "pairs whose chosen answer is rewarded more",
    ),
    ("rewards/margins", "Margin of preferences", "reward of the chosen less that of the rejected"),
    ("frac_reward_zero_std", "Groups without signal", "share of groups whose rewards are equal"),
    ("completions/mean_length", "Length of completions", "tokens, mean over a batch"),
    ("kl", "Divergence from the initial weights", "nats a token, K3 estimate"),
    ("entropy", "Entropy of predictions", "nats a token"),
)


def _reward_curves(rows: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(metric, label, colour, mode) of the total reward and of each reward function."""
    names = sorted({name for row in rows for name in row if name.startswith("rewards/")})
    names = [name for name in names if name.endswith(("/mean", "/chosen", "/rejected"))]
    colours = itertools.cycle([_ORANGE, _GREY, _RED])
    curves = [
        (name, name.removeprefix("rewards/").removesuffix("/mean"), colour, "lines")
        for name, colour in zip(names, colours, strict=False)
    ]
    if _curve(rows, "reward")[1]:
        curves = [("reward", "total", _BLUE, "lines"), *(curves if len(curves) > 1 else [])]
    return curves


def _completions(workdir: Path) -> str:
    """The section with the last completions of a run by rewards; "" if it has none."""
    found = list(metrics.read_objects(workdir / metrics.COMPLETIONS))[-_SHOWN_GROUPS:]
    groups = "".join(
        f"<h3>step {html.escape(str(row.get('step')))}: "
        f"{html.escape(_shortened(row.get('prompt')))}</h3>"
        + _table(
            {
                f"{i + 1}: {reward}": _shortened(text)
                for i, (reward, text) in enumerate(
                    zip(row.get("rewards", []), row.get("completions", []), strict=False)
                )
            }
        )
        for row in reversed(found)
    )
    note = "the first group of a batch, with the reward of each"
    return groups and (
        f'<section class="card wide completions"><h2>Completions</h2><p>{note}</p>{groups}'
        "</section>"
    )


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ..."


def _goodput_figure(ledger: goodput.Ledger) -> Any:
    import plotly.graph_objects as go

    spent = sorted(((seconds, cause) for cause, seconds in ledger.seconds.items() if seconds > 0))
    shares = [100 * seconds / ledger.total for seconds, _ in spent]
    figure = go.Figure(
        go.Bar(
            x=shares,
            y=[cause for _, cause in spent],
            orientation="h",
            marker={"color": [_CAUSE_COLOURS.get(cause, _GREY) for _, cause in spent]},
            text=[
                f" {share:.1f} %, {_duration(seconds)}"
                for share, (seconds, _) in zip(shares, spent, strict=True)
            ],
            textposition="auto",
            cliponaxis=False,
            customdata=[goodput.CAUSES.get(cause, "") for _, cause in spent],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    _lay_out(figure, 230)
    figure.update_xaxes(title=None, range=[0, 100], ticksuffix=" %")
    figure.update_yaxes(showgrid=False, automargin=True)
    return figure


def _heatmap(rows: list[dict[str, Any]]) -> Any:
    """Returns a heatmap of all experts over time, with buttons for demand and load.

    Colours show powers of two relative to an even share.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    names = {
        "moe/demand": "demand (the router's choices)",
        "moe/load": "load (choices served)",
    }
    labels, ticks = {}, []
    for name, label in names.items():
        steps, table = _tables(rows, name)
        if not steps:
            continue
        table_LEC, steps = _bucketed(table, steps)
        L, E, _ = table_LEC.shape
        ratio = table_LEC.reshape(L * E, -1) * E
        customdata = np.round(ratio, 3)
        figure.add_heatmap(
            z=np.round(np.log2(np.clip(ratio, 2**-6, 2**6)), 3).tolist(),
            x=steps,
            customdata=customdata.tolist(),
            text=[[f"layer {row // E}, expert {row % E}"] * len(steps) for row in range(L * E)]
            if L * E <= 128
            else None,
            zmin=-2,
            zmax=2,
            colorscale=_SCALE,
            visible=not labels,
            colorbar={
                "tickvals": [-2, -1, 0, 1, 2],
                "ticktext": ["¼ or less", "½", "even", "2×", "4× or more"],
                "thickness": 12,
                "outlinewidth": 0,
            },
            hovertemplate="step %{x}, row %{y} %{text}: %{customdata} of an even "
            "share<extra></extra>",
        )
        labels[name], every = label, max(1, L // 16)
        ticks = [(layer * E + (E - 1) / 2, f"layer {layer}") for layer in range(0, L, every)]
        edges = [layer * E - 0.5 for layer in range(1, L)] if L <= 16 else []
    for edge in edges:
        figure.add_hline(y=edge, line={"color": "#ffffff", "width": 2})
    _lay_out(figure, 460)
    figure.update_yaxes(
        tickvals=[at for at, _ in ticks],
        ticktext=[text for _, text in ticks],
        autorange="reversed",
        showgrid=False,
    )
    if len(labels) > 1:
        buttons = [
            {
                "label": label,
                "method": "restyle",
                "args": ["visible", [other == name for other in labels]],
            }
            for name, label in labels.items()
        ]
        menu = {
            "type": "buttons",
            "direction": "right",
            "x": 1,
            "xanchor": "right",
            "y": 1.12,
            "pad": {"t": 0},
            "buttons": buttons,
        }
        figure.update_layout(
            updatemenus=[
                {**menu, "bgcolor": "#fff", "bordercolor": "#d5dae0", "font": {"size": 12}}
            ],
            margin={"t": 42},
        )
    return figure


def _lay_out(figure: Any, height: int, **layout: Any) -> None:
    axis = {"gridcolor": _GRID, "zeroline": False, "linecolor": "#cfd5dc", "automargin": True}
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 14, "t": 12, "b": 40},
        font={"family": "system-ui, Arial, DejaVu Sans, sans-serif", "size": 12, "color": _INK},
        xaxis={**axis, "title": {"text": "step", "standoff": 6}, "showgrid": False},
        yaxis=axis,
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"},
        **{"showlegend": False, **layout},
    )


def _curve(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns (steps, values) of a scalar, where it is a finite number."""
    found = [
        (row["step"], row[name])
        for row in rows
        if type(row.get(name)) in (int, float) and math.isfinite(row[name])
    ]
    return [step for step, _ in found], [value for _, value in found]


def _thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Returns at most _MAX_POINTS points: each stretch's lowest and highest, to keep spikes."""
    if len(values) <= _MAX_POINTS:
        return steps, values
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), _MAX_POINTS // 2 - 1):
        inside = np.asarray(values)[part]
        kept |= {int(part[inside.argmin()]), int(part[inside.argmax()])}
    return [steps[i] for i in sorted(kept)], [values[i] for i in sorted(kept)]


def _tables(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[np.ndarray]]:
    """Returns (steps, their [L, E] tables), for the rows whose table has the last one's shape."""
    found = []
    for row in rows:
        try:
            table = np.array(row.get(name), np.float64)
        except (TypeError, ValueError):  # not a rectangle of numbers
            continue
        if table.ndim == 2 and table.size and np.isfinite(table).all():
            found.append((row["step"], table))
    found = [(step, table) for step, table in found if table.shape == found[-1][1].shape]
    return [step for step, _ in found], [table for _, table in found]


def _bucketed(tables: list[np.ndarray], steps: list[int]) -> tuple[np.ndarray, list[int]]:
    """Returns (means over at most _MAX_COLUMNS stretches [L, E, C], last step of each)."""
    parts = np.array_split(np.arange(len(tables)), min(len(tables), _MAX_COLUMNS))
    return np.stack([np.mean([tables[i] for i in part], axis=0) for part in parts], axis=-1), [
        steps[part[-1]] for part in parts
    ]


def _read(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a file, or {} if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _subtitle(environment: dict[str, Any]) -> str:
    return ", ".join(f"{environment[name]}" for name in ("devices", "host") if name in environment)


def _table(values: dict[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{cells}</table>" if cells else "<p>not written yet</p>"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return (
        f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
        if seconds < 172_800
        else f"{seconds / 86_400:.1f} days"
    )


def _for_script(text: str) -> str:
    """Escapes JSON so that it cannot end the script element that holds it."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
