"""The manifest of a checkpoint: facts about its run, and the size and checksum of every file.

checkpoints/STEP/manifest.json is the last file written to a step.  Imports no jax.
"""

import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hunyuan_jax.config import Config, defaults, flat_fields, to_dict
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import write_whole

FILE = "manifest.json"
FORMAT = 2  # of new checkpoints; those without a format have format 1, see store.py

# Fields that may not change between the runs of a workdir: the model, the text, the objective, and
# whatever decides the order of the batches.
_FIXED_SECTIONS = ("model", "data", "objective")
_FIXED_FIELDS = tuple(("train", name) for name in ("batch_size", "seq_len", "seed", "ema_decay"))
# Fields of those sections that change neither a number nor its meaning.  Text and tokens are
# compared by what they hold (`position["corpus"]`), wherever they lie.
FREE_FIELDS = {
    "model.context_attention",
    "model.kernels",
    "model.remat",
    "data.max_bad_fraction",
    "data.source",
    "data.text_field",
    "data.tokenizer",
    "objective.distill.teacher",  # compared by its weights (post/distill.py)
    "objective.distill.inherit_from",
}
# Fields that may change when a run is continued, which then says so: they act on the numbers from
# there on.  Those of config.schedule and train.num_steps are told by the learning rate.
_NOTED_SECTIONS = ("optimizer",)
_NOTED_FIELDS = ("train.grad_accum_steps", "train.eval_batches", "train.init_from")

_PACKAGES = ("hunyuan_jax", "jax", "jaxlib", "orbax-checkpoint")
_NUM_THREADS = 4  # for reading and hashing files; hashing releases the GIL
_BLOCK_BYTES = 2**22

# The result of `facts`.  A manifest also has "files": {name: [bytes, checksum]}.
Facts = dict[str, Any]


def facts(
    config: Config,
    mesh_shape: dict[str, int],
    position: dict[str, Any],
    validation_loss: float | None,
) -> Facts:
    """Returns what a checkpoint says about its run, as JSON values.

    format: of the checkpoint.
    config_hash: of the whole config.
    fixed: the fields that may not change, see `fixed_fields`.
    noted: the fields whose change is said, see `noted_fields`.
    state_dtype: config.optimizer.state_dtype.
    schedule, num_steps: config.schedule and config.train.num_steps, which plan the learning rate.
    versions: package -> version.
    mesh: axis -> size.
    position: of the data.
    validation_loss: of this very step, or None.
    """
    values = to_dict(config)
    return json.loads(
        json.dumps(
            {
                "format": FORMAT,
                "config_hash": _digest_of(values),
                "fixed": fixed_fields(values),
                "noted": noted_fields(values),
                "state_dtype": config.optimizer.state_dtype,
                "schedule": values["schedule"],
                "num_steps": config.train.num_steps,
                "versions": _versions(),
                "mesh": dict(mesh_shape),
                "position": position,
                "validation_loss": validation_loss,
            }
        )
    )


def require_known_format(facts: Facts, where: str) -> None:
    """Raises ConfigError if a later version of this library wrote the checkpoint `where`."""
    if facts.get("format", 1) not in range(1, FORMAT + 1):
        raise ConfigError(
            f"{where} has format {facts['format']}; this version of hunyuan_jax reads formats 1 "
            f"to {FORMAT}. Use the version that wrote it, or a later one."
        )


def fixed_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Returns {dotted name: value} of the fields that may not change during a run.

    values: a config as a nested dict.
    """
    found = {
        name: value
        for section in _FIXED_SECTIONS
        for name, value in flat_fields(values.get(section, {}), f"{section}.")
        if name not in FREE_FIELDS
    }
    if sources := found.get("data.sources"):
        found["data.sources"] = [source["name"] for source in sources]
    return found | {
        f"{section}.{name}": values.get(section, {}).get(name) for section, name in _FIXED_FIELDS
    }


def noted_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Returns {dotted name: value} of the fields that act on the numbers and may change.

    values: a config as a nested dict.
    """
    return {
        name: value
        for name, value in flat_fields(values)
        if name.startswith(tuple(f"{section}." for section in _NOTED_SECTIONS))
        or name in _NOTED_FIELDS
    }


def changed_fields(facts: Facts, config: Config) -> dict[str, tuple[Any, Any]]:
    """Returns {dotted name: (value at the checkpoint, value now)} of noted fields that differ.

    A field that is younger than the checkpoint is left out.
    """
    before, now = facts.get("noted", {}), json.loads(json.dumps(noted_fields(to_dict(config))))
    return {
        name: (before[name], value)
        for name, value in now.items()
        if name in before and before[name] != value
    }


def require_same_run(old: dict[str, Any], config: Config, where: str) -> None:
    """Compares the `fixed_fields` of an earlier run, `old`, with a config.

    where: beginning of the error message.

    Raises:
      ConfigError: a field differs; the message names the first.
    """
    new = json.loads(json.dumps(fixed_fields(to_dict(config))))
    # A field that is younger than the run has its default.
    known = {
        name: value for name, value in old.items() if value is not None and name not in FREE_FIELDS
    }
    if sources := known.get("data.sources"):  # with their paths, in earlier versions
        known["data.sources"] = [s["name"] if isinstance(s, dict) else s for s in sources]
    old = json.loads(json.dumps({**{n: v for n, v in defaults().items() if n in new}, **known}))
    for name in {**new, **old}:
        if old.get(name) != new.get(name):
            raise ConfigError(
                f"{where} made with config.{name} = {old.get(name)!r}; now it is "
                f"{new.get(name)!r}. "
                "Use another --workdir (and config.checkpoint.mirror), or set it back."
            )


def files(folder: Path) -> dict[str, int]:
    """Returns the files of a step without the manifest, sorted.

    Maps a path relative to the step's folder, with '/', to its size in bytes.
    """
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return dict(sorted((name, size) for name, size in found.items() if name != FILE))


def share(sizes: dict[str, int], index: int, count: int) -> list[str]:
    """Returns the files that process `index` of `count` handles.

    Each file belongs to one process, and all processes have about the same number of bytes.
    """
    loads, taken = [0] * count, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += max(sizes[name], 1)
        if least == index:
            taken.append(name)
    return taken


def checksums(folder: Path, names: Iterable[str]) -> dict[str, list]:
    """Returns {name: [bytes, checksum]} of files, as in a manifest."""
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        return dict(
            zip(names, pool.map(lambda name: _checksum(folder / name), names), strict=True)
        )


def problem(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> str | None:
    """Returns what is wrong with the files `names` of a step; None if they match the manifest."""
    for name in names:
        size = manifest["files"][name][0]
        if not (folder / name).is_file():
            return f"{name} is missing"
        found = (folder / name).stat().st_size
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    try:
        for name, found in checksums(folder, names).items():
            if found != manifest["files"][name]:
                return f"{name} has another checksum than when it was written"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None


def read(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest of a step; None if it has none.

    Raises:
      ValueError: the manifest is damaged.
    """
    try:
        return parse((folder / FILE).read_bytes())
    except FileNotFoundError:
        return None


def parse(data: bytes) -> dict[str, Any]:
    """Parses the bytes of a manifest.

    Raises:
      ValueError: its checksum does not match.
    """
    try:
        manifest = json.loads(data)
        is_whole = manifest.pop("checksum") == _digest_of(manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{FILE} is damaged")
    return manifest


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes a step's manifest atomically, with its own checksum."""
    write_whole(
        folder / FILE, json.dumps(manifest | {"checksum": _digest_of(manifest)}, indent=1).encode()
    )


def kept(losses: dict[int, float | None], keep: int, keep_every: int, keep_best: int) -> set[int]:
    """Returns the steps to keep.

    Args:
      losses: {step: validation loss or None} of all steps.
      keep: number of newest steps; this and the others are fields of config.checkpoint.
      keep_every: multiples of it are kept; 0 keeps none.
      keep_best: number of steps with the lowest validation loss.
    """
    steps = sorted(losses)
    best = sorted((loss, -step) for step, loss in losses.items() if loss is not None)
    return {
        *steps[-keep:],
        *(step for step in steps if keep_every and step % keep_every == 0),
        *(-step for _, step in best[:keep_best]),
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        # This package itself may run from a checkout without being installed.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _checksum(path: Path) -> list:
    digest, size = hashlib.blake2b(digest_size=16), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return [size, digest.hexdigest()]


def _digest_of(values: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()
