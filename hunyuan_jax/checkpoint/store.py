"""Saving and restoring a run: train state (orbax), data position and the config it belongs to.

A workdir holds config.json and checkpoints/STEP/{state,position}.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hunyuan_jax.config import Config, ConfigError, ModelConfig, flat_fields, from_config_dict, to_dict
from hunyuan_jax.model import lora
from hunyuan_jax.quant.scaled import load_params

# What may not change between the runs of a workdir: the model, the text, what decides the order of the batches, how the state is kept.
_FIXED_SECTIONS = ("model", "data")
_FIXED_FIELDS = (("train", "batch_size"), ("train", "seq_len"), ("train", "seed"), ("optimizer", "state_dtype"))


class Store:
    """The checkpoints of one workdir.  All processes of a run make one and take part in each call; each writes its own shards."""

    def __init__(self, workdir: str | os.PathLike, keep: int):
        self._manager = ocp.CheckpointManager(
            (Path(workdir) / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        )

    def latest_step(self) -> int | None:
        """Steps done at the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Starts saving in the background; the state's arrays are copied before this returns.

        Args:
          step: steps done.
          state: pytree of arrays.
          position: JSON-serialisable position of the data.
        """
        if step == self.latest_step():
            return
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)))

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """(state, position) of a step, with the shapes, dtypes and shardings of `abstract_state`."""
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), position=ocp.args.JsonRestore())
        )
        return restored["state"], restored["position"]

    def close(self) -> None:
        """Waits for saves in progress."""
        self._manager.wait_until_finished()
        self._manager.close()


def claim_workdir(workdir: str | os.PathLike, config: Config) -> None:
    """Writes config.json, or checks that the run in the workdir is this one.

    Raises:
      ConfigError: the workdir holds checkpoints of a run with another model, data or batch order, naming the first field.
    """
    path = Path(workdir) / "config.json"
    if path.is_file() and any((Path(workdir) / "checkpoints").glob("[0-9]*")):
        old, new = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(to_dict(config)))
        changed = [
            (f"{prefix}.{name}", old_value, new_value)
            for prefix, name, old_value, new_value in _fixed_fields(old, new)
            if old_value != new_value
        ]
        if changed:
            name, old_value, new_value = changed[0]
            raise ConfigError(
                f"{workdir} holds checkpoints made with config.{name} = {old_value!r}; now it is {new_value!r}. "
                "Use another --workdir, or set it back."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")


def describe_workdir(workdir: str | os.PathLike) -> dict[str, Any]:
    """What this process sees in a workdir, for comparing with the others: config.json and the names of the checkpoints."""
    path = Path(workdir) / "config.json"
    return {
        "config": path.read_text(encoding="utf-8") if path.is_file() else None,
        "checkpoints": sorted(folder.name for folder in (Path(workdir) / "checkpoints").glob("[0-9]*")),
    }


def load_for_inference(workdir: str | os.PathLike, dtype: str | None) -> tuple[ModelConfig, dict[str, Any]]:
    """(model config, params) of the newest checkpoint of a run, LoRA adapters merged into the weights they belong to.

    Raises:
      ConfigError: no checkpoint yet.
    """
    cfg, params = lora.merge(*_load_newest(workdir))
    dtype = dtype or cfg.dtype
    params = jax.tree.map_with_path(
        lambda path, a: a if jax.tree_util.keystr(path, simple=True, separator="/").endswith("router_DE") else a.astype(dtype), params
    )
    return dataclasses.replace(cfg, dtype=dtype), params


def load_adapters(workdir: str | os.PathLike) -> tuple[ModelConfig, dict[str, Any]]:
    """(model config with its lora section, the adapters as float32 numpy arrays) of the newest checkpoint of a run.

    Raises:
      ConfigError: no checkpoint yet, or a run without adapters.
    """
    cfg, params = _load_newest(workdir)
    if not cfg.lora.rank:
        raise ConfigError(f"{workdir} has trained all parameters (config.model.lora.rank = 0); it has no adapter. Export the whole model.")
    return cfg, jax.tree.map(np.asarray, lora.split(params, cfg)[0])


def _load_newest(workdir: str | os.PathLike) -> tuple[ModelConfig, dict[str, Any]]:
    config = read_config(workdir)
    store = Store(workdir, keep=config.checkpoint.keep)
    step = store.latest_step()
    if step is None:
        raise ConfigError(
            f"{workdir} holds no finished checkpoint yet; train until config.checkpoint.every = {config.checkpoint.every} steps."
        )
    from hunyuan_jax.parallel.mesh import single_device_mesh
    from hunyuan_jax.train.state import abstract_state, build_program

    state, _ = store.restore(step, abstract_state(build_program(config, single_device_mesh())))
    store.close()
    return config.model, load_params(state.params)


def read_config(workdir: str | os.PathLike) -> Config:
    """The Config of the run in a workdir.

    Raises:
      ConfigError: there is none.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{workdir} is no run: it has no config.json. Pass the --workdir of `python train.py`.")
    return from_config_dict(json.loads(path.read_text(encoding="utf-8")))


def _fixed_fields(old: dict[str, Any], new: dict[str, Any]):
    """(section, field, old value, new value) of everything that may not change."""
    for section in _FIXED_SECTIONS:
        flat_old, flat_new = dict(flat_fields(old.get(section, {}))), dict(flat_fields(new[section]))
        for name in {**flat_new, **flat_old}:
            yield section, name, flat_old.get(name), flat_new.get(name)
    for section, name in _FIXED_FIELDS:
        yield section, name, old.get(section, {}).get(name), new[section][name]
