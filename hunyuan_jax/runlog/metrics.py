"""Metrics of a run: metrics.jsonl, TensorBoard events, Weights & Biases."""

import importlib.util
import json
import math
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_jax.config import Config, to_dict
from hunyuan_jax.errors import ConfigError

FILE = "metrics.jsonl"
COMPLETIONS = "completions.jsonl"  # of a run by rewards: one group of each batch, to be read
DEAD_SHARE = 0.01


class MetricsWriter:
    """Appends one JSON object per logged step to DIR/metrics.jsonl and scalars to DIR/tensorboard,
    and to Weights & Biases if asked to.
    """

    def __init__(self, workdir: str | os.PathLike, first_step: int, config: Config):
        """Drops rows of steps after `first_step`, which the run is about to repeat."""
        from tensorboardX import SummaryWriter

        path = Path(workdir) / FILE
        _drop_later_rows(path, first_step)
        if (completions := path.with_name(COMPLETIONS)).is_file():
            _drop_later_rows(completions, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(
            str(Path(workdir) / "tensorboard"), purge_step=first_step + 1
        )
        self._wandb = _start_wandb(Path(workdir), config) if config.train.wandb_project else None

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes scalars and (JSON only) lists; a number that is not finite is written as null."""
        metrics = _finite(metrics)
        self._file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
        self._file.flush()
        scalars = {
            name: value for name, value in metrics.items() if isinstance(value, int | float)
        }
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        """Flushes everything."""
        self._file.close()
        self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _drop_later_rows(path: Path, last_step: int) -> None:
    kept = [
        json.dumps(_finite(row), allow_nan=False) + "\n"
        for row in read_objects(path)
        if isinstance(row.get("step"), int) and row["step"] <= last_step
    ]
    new = path.with_suffix(".new")
    new.write_text("".join(kept), encoding="utf-8")
    new.replace(path)  # whole or not at all, if the process is killed here


def _finite(value: Any) -> Any:
    """`value` with None for every number that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require_wandb(project: str) -> None:
    """Raises ConfigError if Weights & Biases is asked for and not installed; `project` is
    config.train.wandb_project.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"config.train.wandb_project = {project!r} needs Weights & Biases, which is not "
            "installed: pip install wandb, or leave the "
            "field empty; metrics.jsonl and TensorBoard are written in any case."
        )


def _start_wandb(workdir: Path, config: Config):
    """The Weights & Biases run of a workdir, the same one after every restart: its id is in
    DIR/wandb_id.
    """
    import wandb

    path = workdir / "wandb_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    return wandb.init(
        project=config.train.wandb_project,
        id=path.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(workdir),
        name=workdir.name,
        config=to_dict(config),
    )


def moe_health(metrics: dict[str, np.ndarray]) -> dict[str, Any]:
    """The figures of `router_metrics` (layers/ffn/moe/layer.py) under the names of metrics.jsonl.

    {} for a dense model; docs/observability.md says what each means.

    An expert of a layer is dead in a step if the router names it for less than DEAD_SHARE of an
    even share (1 / E) of the choices.
    """
    if "load_LE" not in metrics:
        return {}
    load_LE, demand_LE = metrics["load_LE"], metrics["demand_LE"]
    num_experts = load_LE.shape[1]
    names = ("recycled", "dropped", "entropy", *(("bias",) if "bias_L" in metrics else ()))
    by_layer = {name: metrics[f"{name}_L"] for name in names}
    return {
        **{f"moe/{name}": float(value_L.mean()) for name, value_L in by_layer.items()},
        "moe/aux_loss": float(metrics["aux_loss"]),
        "moe/z_loss": float(metrics["z_loss"]),
        "moe/load_max_over_mean": float(load_LE.max() * num_experts),
        "moe/demand_max_over_mean": float(demand_LE.max() * num_experts),
        "moe/dead_experts": int((demand_LE * num_experts < DEAD_SHARE).sum()),
        "moe/load": _rounded(load_LE),
        "moe/demand": _rounded(demand_LE),
        **{f"moe/{name}_by_layer": _rounded(value_L) for name, value_L in by_layer.items()},
    }


def layer_figures(metrics: dict[str, np.ndarray]) -> dict[str, Any]:
    """The metrics "layers/NAME_L" as layers/NAME, their mean, and layers/NAME_by_layer."""
    row = {}
    for name, value_L in metrics.items():
        if name.startswith("layers/"):
            row[name.removesuffix("_L")] = float(value_L.mean())
            row[f"{name.removesuffix('_L')}_by_layer"] = _rounded(value_L)
    return row


def _rounded(values: np.ndarray) -> list:
    return np.round(values.astype(np.float64), 5).tolist()


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Returns the JSON objects of a file with one a line; [] if there is no file.  Damaged lines
    are left out, such as one that a crash cut off.
    """
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:  # no JSON, or no UTF-8
            continue
        found += [value] if isinstance(value, dict) else []
    return found
