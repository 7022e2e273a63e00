"""Results as tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(name: str, result: Mapping[str, Any]) -> str:
    """The figures of a task in markdown, with its name and time."""
    title = f"\n{name}, {result['seconds']:.1f} s"
    if "by_position" in result or "tokens" in result:
        return "\n".join([title, *_perplexity(result)])
    if "needles" in result:
        return "\n".join([title, *_needles(result)])
    if "by_depth" in result:
        return "\n".join([title, *_ruler(result)])
    return "\n".join([title, *_harness(result)])


def _ruler(result: Mapping[str, Any]) -> list[str]:
    lengths = sorted({length for row in result["scores"].values() for length in row})
    rows = [[task, *_percents(row, lengths)] for task, row in result["scores"].items()]
    if len(rows) > 1:
        rows.append(["mean", *_percents(result["mean"], lengths)])
    lines = _lines(["task", *map(str, lengths)], rows)
    by_depth = result["by_depth"]
    depths = list(dict.fromkeys(depth for row in by_depth.values() for depth in row))
    depths.sort(key=lambda depth: int(depth.split("-")[0]))
    if depths:
        lines += ["", "Tasks with needles, by depth in percent:"]
        lines += _lines(
            ["depth", *map(str, lengths)],
            [
                [depth, *(_percent(by_depth.get(length, {}).get(depth)) for length in lengths)]
                for depth in depths
            ],
        )
    return lines


def _needles(result: Mapping[str, Any]) -> list[str]:
    lengths = list(result["scores"])
    depths = sorted({depth for row in result["scores"].values() for depth in row})
    rows = [
        [f"{depth:g}", *(_percent(result["scores"][length].get(depth)) for length in lengths)]
        for depth in depths
    ]
    rows.append(["mean", *_percents(result["mean"], lengths)])
    return _lines(["depth", *map(str, lengths)], rows)


def _perplexity(result: Mapping[str, Any]) -> list[str]:
    names = ("texts", "tokens", "bytes", "nats_per_token", "perplexity", "bits_per_byte")
    rows = [
        [name, f"{result[name]:,.4f}" if isinstance(result[name], float) else f"{result[name]:,}"]
        for name in names
        if name in result
    ]
    by_position = [
        [f"{first}-{last}", f"{num:,}", f"{loss:.4f}"]
        for first, last, num, loss in result.get("by_position", ())
    ]
    return [
        *_lines(["figure", "value"], rows),
        "",
        *_lines(["position", "tokens", "nats"], by_position),
    ]


def _harness(result: Mapping[str, Any]) -> list[str]:
    rows = [
        [task, str(result["samples"].get(task, "")), metric.removesuffix(",none"), f"{value:.4f}"]
        for task, metrics in result["scores"].items()
        for metric, value in metrics.items()
    ]
    return _lines(["task", "documents", "metric", "value"], rows)


def _percents(row: Mapping[Any, float], keys: Sequence[Any]) -> list[str]:
    return [_percent(row.get(key)) for key in keys]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A markdown table with columns of equal width."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"| {' | '.join(padded)} |")
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [lines[0], rule, *lines[1:]]
