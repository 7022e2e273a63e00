"""Figures of an evaluation (`evaluation.json`): needle maps, RULER by length, loss by position."""

from collections.abc import Callable, Mapping
from typing import Any

FILE = "evaluation.json"

# Red to green, for scores of 0 to 100 percent.
_SCALE = [[0.0, "#b91c1c"], [0.5, "#fde68a"], [1.0, "#15803d"]]
_COLOURS = ("#2563eb", "#ea580c", "#0d9488", "#dc2626", "#6366f1", "#eab308", "#be185d",
            "#64748b", "#38bdf8", "#7f1d1d", "#a78bfa", "#1b2430")  # fmt: skip

# id -> (title, note, width class, figure), as the page has them.
Figures = dict[str, tuple[str, str, str, Any]]


def figures(found: Mapping[str, Any], lay_out: Callable[..., None]) -> Figures:
    """Of the tasks of an evaluation; those of lm-eval have numbers only.

    Args:
      found: the object of evaluation.json.
      lay_out: the page's way to lay a figure out.
    """
    shown: Figures = {}
    for name, result in found.get("tasks", {}).items():
        key = "eval-" + "".join(c if c.isalnum() else "-" for c in name)
        if "needles" in result:
            note = f"{result['samples']} samples a cell, percent found, depth over length"
            shown[key] = (_title(name, result), note, "half", _map(result["scores"], lay_out))
        elif "by_depth" in result:
            note = f"{result['samples']} samples a length, percent"
            shown[key] = (_title(name, result), note, "wide", _lines(result, lay_out))
            if result["by_depth"]:
                note = "tasks with needles, percent found, depth over length"
                by_depth = {
                    length: {depth: row[depth] for depth in sorted(row, key=_first)}
                    for length, row in result["by_depth"].items()
                }
                title = f"{name} by depth"
                shown[f"{key}-depth"] = (title, note, "half", _map(by_depth, lay_out))
        elif result.get("by_position"):
            bits = f"{result['bits_per_byte']:.4f} bits per byte"
            note = f"nats a token by the number of tokens before; {bits}"
            shown[key] = (_title(name, result), note, "half", _positions(result, lay_out))
    return shown


def table(found: Mapping[str, Any]) -> dict[str, str]:
    """Names and values of the metrics of lm-eval's tasks."""
    return {
        f"{task}, {metric.removesuffix(',none')}": f"{value:.4f}"
        for result in found.get("tasks", {}).values()
        if isinstance(result.get("samples"), dict)
        for task, metrics in result["scores"].items()
        for metric, value in metrics.items()
    }


def _title(name: str, result: Mapping[str, Any]) -> str:
    return f"{name}, {result['seconds']:.0f} s"


def _first(depths: str) -> float:
    return float(depths.split("-")[0])


def _map(scores: Mapping[str, Mapping[str, float]], lay_out: Callable[..., None]) -> Any:
    import plotly.graph_objects as go

    lengths = list(scores)
    depths = sorted({depth for row in scores.values() for depth in row}, key=_first)
    cells = [[scores[length].get(depth) for length in lengths] for depth in depths]
    figure = go.Figure()
    figure.add_heatmap(
        z=cells,
        x=lengths,
        y=depths,
        zmin=0,
        zmax=100,
        colorscale=_SCALE,
        xgap=2,
        ygap=2,
        texttemplate="%{z:.0f}",
        colorbar={"thickness": 12, "outlinewidth": 0},
        hovertemplate="length %{x}, depth %{y} %: %{z:.1f} %<extra></extra>",
    )
    lay_out(figure, 300)
    figure.update_xaxes(title={"text": "tokens", "standoff": 6}, type="category")
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure


def _lines(result: Mapping[str, Any], lay_out: Callable[..., None]) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    curves = {**result["scores"], "mean": result["mean"]}
    for (task, row), colour in zip(curves.items(), _COLOURS, strict=False):
        is_mean = task == "mean"
        figure.add_scatter(
            x=list(row),
            y=list(row.values()),
            name=task,
            mode="lines+markers",
            line={"color": colour, "width": 3.5 if is_mean else 1.4},
            hovertemplate="%{y:.1f} %",
        )
    lay_out(figure, 360, showlegend=True, hovermode="x unified")
    figure.update_xaxes(title={"text": "tokens", "standoff": 6}, type="category")
    figure.update_yaxes(range=[-3, 103], ticksuffix=" %")
    return figure


def _positions(result: Mapping[str, Any], lay_out: Callable[..., None]) -> Any:
    import plotly.graph_objects as go

    rows = result["by_position"]
    figure = go.Figure()
    figure.add_scatter(
        x=[first for first, *_ in rows],
        y=[loss for *_, loss in rows],
        mode="lines+markers",
        line={"color": _COLOURS[0], "width": 1.6},
        customdata=[f"{first} to {last}, {num} tokens" for first, last, num, _ in rows],
        hovertemplate="%{customdata}: %{y:.4f}<extra></extra>",
    )
    lay_out(figure, 300)
    figure.update_xaxes(title={"text": "tokens before", "standoff": 6}, type="log")
    return figure
