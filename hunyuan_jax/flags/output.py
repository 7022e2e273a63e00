"""A command's figures, for people or for programs."""

import json
from collections.abc import Mapping
from typing import Any


def print_result(result: Mapping[str, Any], as_json: bool) -> None:
    """Prints name and value of each figure on a line, or all of them as one JSON object."""
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name.replace('_', ' '):32s}{_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, float) and value < 100:
        return f"{value:,.4g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)
