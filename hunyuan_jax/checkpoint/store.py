"""Saves and restores a run with orbax, and verifies its checkpoints.

A workdir has config.json and checkpoints/STEP/{params,optimizer,run,manifest.json}.  `params` and
`optimizer` are items: pytrees of arrays that are restored separately or together.  `run` is the
JSON of `manifest.facts`.  A checkpoint is

* committed when checkpoints/STEP exists: orbax writes a temporary folder and renames it;
* finished when it has a manifest: the size and checksum of every file, computed in the background
  after the commit.

Format 1 has both items in one, `state`: {"params": params, **optimizer}.  It is read but never
written.

The folder may also have damaged-STEP, a damaged checkpoint kept for inspection, and leftovers of a
killed process (_LEFTOVER), which the next start removes.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from hunyuan_jax import malloc
from hunyuan_jax.checkpoint import manifest as manifest_lib
from hunyuan_jax.checkpoint.manifest import Facts
from hunyuan_jax.checkpoint.mirror import Mirror
from hunyuan_jax.checkpoint.owner import owner_id
from hunyuan_jax.config import CheckpointConfig, Config, from_config_dict, to_dict
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import json_object, write_whole
from hunyuan_jax.parallel import hosts

ITEMS = ("params", "optimizer")
_ITEM_OF_FORMAT_1 = "state"
_LEFTOVER = re.compile(r"(deleting|downloading|checksums)-\d+|\d+\.orbax-checkpoint-tmp.*")
_POLL_SECONDS = 0.05
_PEER_SECONDS = 3600.0  # longest wait for the other processes to checksum their share
_DISK_FULL = ("No space left on device", "Disk quota exceeded")

Items = dict[str, Any]  # item -> pytree of arrays, or of jax.ShapeDtypeStruct


class Store:
    """The checkpoints of one workdir.

    All processes of a run create a Store and make the same calls.  Each process writes its own
    shards.  A thread does what takes time: writing, checksums (each process hashes a share of the
    files), and deleting the steps that `config.checkpoint` does not keep.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        cfg: CheckpointConfig,
        report: Callable[[str], None],
        is_alone: bool = False,
    ):
        """Connects to the mirror if cfg names one.

        Args:
          workdir: folder of the run.
          cfg: config.checkpoint.
          report: prints a line for the user; called from several threads.
          is_alone: this process reads without the others, to its own devices only.

        Raises:
          ConfigError: the mirror cannot be used.
        """
        self._cfg, self._report, self._folder = cfg, report, _folder(workdir)
        self._index, self._count = (
            (0, 1) if is_alone else (jax.process_index(), jax.process_count())
        )
        # With active_processes, orbax waits through jax's coordination service instead of the
        # devices, which a thread may do.
        first = jax.process_index() if is_alone else 0
        processes = (
            None if jax.process_count() == 1 else {first + index for index in range(self._count)}
        )
        options = ocp.options.MultiprocessingOptions(
            primary_host=first, active_processes=processes
        )
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=options),
            **{
                item: ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
                for item in (*ITEMS, _ITEM_OF_FORMAT_1)
            },
            run=ocp.JsonCheckpointHandler(multiprocessing_options=options),
        )
        self._checkpointer = ocp.AsyncCheckpointer(handler, multiprocessing_options=options)
        self._mirror = (
            Mirror(cfg, self._folder, self._index, self._count, report) if cfg.mirror else None
        )
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.best_loss = math.inf  # lowest validation loss of the steps that are kept
        # From the call of the last save until its manifest was written.
        self.save_seconds: float | None = None
        # Never removed: orbax's threads outlive a failed save.
        logging.getLogger("absl").addFilter(_is_not_disk_full)

    # --- Restoring

    def restore_newest(
        self, target_of: Callable[[Facts], Items]
    ) -> tuple[int, Items, Facts] | None:
        """Restores the newest good checkpoint, local or in the mirror.

        Call it once, before the first save.  It reads every file and compares it with the
        manifest.  A damaged step is renamed to damaged-STEP with a warning, and the step before it
        is tried.  If a process was killed right after the commit, the step has no manifest.  Such
        a step is used, with a warning, if it can be read, and gets its manifest.

        Args:
          target_of: facts -> the items as pytrees of shapes, dtypes and shardings to restore to;
            may refuse the checkpoint with ConfigError.

        Returns:
          (step, items, facts), or None if there is no checkpoint.

        Raises:
          ConfigError: all checkpoints are damaged, or the newest was written by a later version.
        """
        here, there = set(), set()
        with hosts.fail_together():
            if self._index == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()
                here = set(steps(self._folder))
                if self._mirror:
                    self._mirror.remove_incomplete()
                    there = set(self._mirror.steps())
        found = None
        while found is None and (step := hosts.broadcast_from_first(max(here | there, default=0))):
            is_here = hosts.broadcast_from_first(step in here)
            (here if is_here else there).discard(step)
            if is_here or self._bring_back(step):
                found = self._restore_or_set_aside(step, target_of)
        with hosts.fail_together():
            if found is None and any(self._folder.glob("damaged-*")):
                raise ConfigError(
                    f"no checkpoint in {self._folder} can be used any more, only damaged ones are "
                    "there, and a run does not start over by "
                    "itself. Use another --workdir, or delete them."
                )
            losses = {
                step: manifest["validation_loss"]
                for step, manifest in finished_steps(self._folder).items()
            }
        best = min((loss for loss in losses.values() if loss is not None), default=math.inf)
        # Process 0 decides: it may just have written a manifest that the others do not see yet.
        newest, self.best_loss = json.loads(
            hosts.gathered(json.dumps([max(losses, default=0), best]))[0]
        )
        if self._mirror:
            with hosts.fail_together():
                self._mirror.start([newest] if newest else [])
        return found

    def newest_good(self, items: Collection[str] = ITEMS) -> tuple[int, Facts]:
        """Returns (step, facts) of the newest local checkpoint whose `items` are not damaged.

        It changes nothing, and does not read the files of other items.  A step that its run
        deletes meanwhile is not damaged: there are newer ones then.

        Raises:
          ConfigError: there is none, or it was written by a later version.
        """
        pending = steps(self._folder)
        while pending:
            step = pending.pop()
            facts, wrong = self._verified(step, items)
            if not wrong:
                return step, facts
            if not self.has(step):
                pending = steps(self._folder)
                continue
            self._report(
                f"warning: checkpoint {step} of {self._folder} is damaged: {wrong}. The one "
                "before is tried."
            )
        raise ConfigError(
            f"{self._folder.parent} holds no finished checkpoint yet; train until "
            f"config.checkpoint.every = {self._cfg.every} steps."
        )

    def has(self, step: int) -> bool:
        """Whether a step is there.  What was read of it before is whole: a step is renamed before
        its files are deleted.
        """
        return (self._folder / str(step)).is_dir()

    def restore(self, step: int, targets: Items, *, is_partial: bool = False) -> Items:
        """Returns the items of a committed step that `targets` names; reads no others.

        Args:
          step: see `steps`.
          targets: item -> pytree of jax.ShapeDtypeStruct with shardings.
          is_partial: whether a target may omit entries of its item; they are not read.
        """
        folder = self._folder / str(step)
        if not (folder / _ITEM_OF_FORMAT_1).is_dir():
            return self._restore(folder, targets, is_partial)
        whole = {"params": targets["params"]} if "params" in targets else {}
        whole |= targets.get("optimizer", {})
        is_partial |= len(targets) < len(ITEMS)
        whole = self._restore(folder, {_ITEM_OF_FORMAT_1: whole}, is_partial)[_ITEM_OF_FORMAT_1]
        params = {"params": whole.pop("params")} if "params" in targets else {}
        return params | ({"optimizer": whole} if "optimizer" in targets else {})

    # --- Saving

    def save(self, step: int, items: Items, facts: Facts) -> None:
        """Starts a save in the background; the arrays may be donated when this returns.

        Waits for the previous save first.

        Args:
          step: steps done, more than at any earlier save.
          items: a pytree of arrays for each of ITEMS; a dict for "optimizer".
          facts: see `manifest.facts`.

        Raises:
          ConfigError: the disk was full during the previous save.
        """
        self.wait()
        if facts["validation_loss"] is not None:
            self.best_loss = min(self.best_loss, facts["validation_loss"])
        start = time.monotonic()
        # orbax copies the arrays to the host while its caller waits, and does more.  On CPU one
        # copy of the memory is enough, and all of orbax can run in the thread.  An accelerator has
        # no memory for a second state.
        if is_on_cpu := _is_on_cpu(items):
            items = _copied(items)
        else:
            self._write(step, items, facts)

        def work():
            try:
                if is_on_cpu:
                    self._write(step, items, facts)
                self._checkpointer.wait_until_finished()
                self._finish(step, facts)
                if is_on_cpu:
                    malloc.trim()  # returns what orbax used
                self.save_seconds = time.monotonic() - start
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name=f"save {step}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Re-raises an error of the background save; ConfigError if the disk was full."""
        if self._error is None:
            return
        error, self._error = self._error, None
        if not _says_disk_full(error):
            raise error
        if self._index == 0:
            self._remove_leftovers()
        raise self.disk_full() from error

    def require_room(self) -> None:
        """Raises ConfigError if the free space is less than the size of the newest checkpoint."""
        manifests = finished_steps(self._folder)
        if manifests:
            needed = sum(size for size, _ in manifests[max(manifests)]["files"].values())
            if shutil.disk_usage(self._folder).free < needed:
                raise self.disk_full()

    def disk_full(self) -> ConfigError:
        """Returns the error to raise when the workdir's disk is full."""
        usage, newest = (
            shutil.disk_usage(self._folder),
            max(finished_steps(self._folder), default=None),
        )
        untouched = (
            "There is no finished checkpoint yet"
            if newest is None
            else f"Finished checkpoints are untouched; the newest is {newest}"
        )
        return ConfigError(
            f"not enough space is left in {self._folder.parent}: {usage.free / 1e9:.3g} GB of "
            f"{usage.total / 1e9:.3g} GB are free. {untouched}. Make room, or lower "
            f"config.checkpoint.keep (now {self._cfg.keep}); the same command continues."
        )

    def wait(self) -> None:
        """Waits for the save in progress and its manifest; raises what `check` raises."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Waits for the save in progress and for the mirror; raises what `check` raises."""
        try:
            self.wait()
        finally:
            if self._mirror:
                self._mirror.close()
            self._checkpointer.close()

    # --- Restoring, step by step

    def _restore(self, folder: Path, targets: Items, is_partial: bool) -> Items:
        arguments = {
            item: ocp.args.PyTreeRestore(
                target,
                ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=is_partial,
            )
            for item, target in targets.items()
        }
        restored = self._checkpointer.restore(folder, args=ocp.args.Composite(**arguments))
        return {item: restored[item] for item in targets}

    def _restore_or_set_aside(
        self, step: int, target_of: Callable[[Facts], Items]
    ) -> tuple[int, Items, Facts] | None:
        facts, wrong = self._verified(step)
        if not wrong:
            with hosts.fail_together():
                targets = target_of(facts)
            if "files" in facts:
                return step, self.restore(step, targets), facts
            self._report_once(
                f"warning: checkpoint {step} has no {manifest_lib.FILE}: its process ended "
                "between writing it and the checksums. It is used unchecked."
            )
            try:
                items = self.restore(step, targets)
            except Exception as error:  # orbax raises many types for a damaged file
                wrong = f"{type(error).__name__}: {error}"
            wrong = self._first_of_all(wrong)
            if not wrong:
                self._finish(step, facts)
                return step, items, facts
        with hosts.fail_together():
            if self._index == 0:
                target = _unused(self._folder / f"damaged-{step}")
                (self._folder / str(step)).rename(target)
                self._report(
                    f"warning: checkpoint {step} is damaged: {wrong}. It is now {target}; the one "
                    "before is tried."
                )
        return None

    def _verified(self, step: int, items: Collection[str] = ITEMS) -> tuple[Facts, str]:
        """Verifies the files of `items`; each process reads a share.

        Returns:
          (manifest, or the facts if there is none; what is wrong with a file of any process's
          share, or "").

        Raises:
          ConfigError: the checkpoint was written by a later version.
        """
        folder, facts, wrong = self._folder / str(step), {}, ""
        try:
            manifest = manifest_lib.read(folder)
            facts = manifest or json.loads(
                (folder / "run" / "metadata").read_text(encoding="utf-8")
            )
            manifest_lib.require_known_format(facts, f"checkpoint {step} of {self._folder}")
            if manifest:
                unread = {f"{item}/" for item in ITEMS if item not in items}
                names = [
                    name for name in self._share(manifest) if not name.startswith(tuple(unread))
                ]
                wrong = manifest_lib.problem(folder, manifest, names) or ""
        except ConfigError:
            raise
        except (ValueError, OSError) as error:
            wrong = str(error)
        return facts, self._first_of_all(wrong)

    def _bring_back(self, step: int) -> bool:
        """Downloads a step from the mirror; returns False if it is damaged there."""
        target = self._folder / f"downloading-{step}"
        with hosts.fail_together():
            wrong = self._mirror.download(step, target) or ""
        wrong = self._first_of_all(wrong)
        with hosts.fail_together():
            if self._index == 0 and wrong:
                where = self._mirror.set_aside(step)
                self._report(
                    f"warning: checkpoint {step} in the mirror is damaged: {wrong}. It is now "
                    f"{where}; the one before is tried."
                )
            elif self._index == 0:
                manifest_lib.write(target, self._mirror.manifest(step))
                target.rename(self._folder / str(step))
                self._report(f"checkpoint {step} was brought back from {self._cfg.mirror}.")
        return not wrong

    # --- Saving, step by step

    def _write(self, step: int, items: Items, facts: Facts) -> None:
        arguments = ocp.args.Composite(
            **{item: ocp.args.PyTreeSave(items[item]) for item in ITEMS},
            run=ocp.args.JsonSave(facts),
        )
        self._checkpointer.save(self._folder / str(step), args=arguments)

    def _finish(self, step: int, facts: Facts) -> None:
        """Writes the manifest of a committed step, deletes old steps, and queues the upload."""
        folder, parts = self._folder / str(step), self._folder / f"checksums-{step}"
        _wait_until(folder.is_dir, f"process 0 to commit checkpoint {step}")
        sums = manifest_lib.checksums(
            folder, manifest_lib.share(manifest_lib.files(folder), self._index, self._count)
        )
        if self._index > 0:
            parts.mkdir(exist_ok=True)
            write_whole(parts / str(self._index), json.dumps(sums).encode())
        else:
            for other in (parts / str(index) for index in range(1, self._count)):
                _wait_until(
                    other.is_file,
                    f"process {other.name} to checksum its share of checkpoint {step}",
                )
                sums |= json.loads(other.read_bytes())
            manifest_lib.write(folder, facts | {"files": dict(sorted(sums.items()))})
            if self._count > 1:
                shutil.rmtree(parts)
            self._delete_old()
        if self._mirror:
            self._mirror.add(step)

    def _delete_old(self) -> None:
        losses = {
            step: manifest["validation_loss"]
            for step, manifest in finished_steps(self._folder).items()
        }
        kept = manifest_lib.kept(losses, self._cfg.keep, self._cfg.keep_every, self._cfg.keep_best)
        for step in set(steps(self._folder)) - kept - {self._mirror and self._mirror.uploading}:
            # Renamed first, so that a killed process leaves no half-deleted step.
            target = self._folder / f"deleting-{step}"
            (self._folder / str(step)).rename(target)
            shutil.rmtree(target)

    def _remove_leftovers(self) -> None:
        for path in self._folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path)

    def _report_once(self, text: str) -> None:
        if self._index == 0:
            self._report(text)

    def _first_of_all(self, text: str) -> str:
        """Returns the first non-empty text of all processes, or ""."""
        return text if self._count == 1 else next(filter(None, hosts.gathered(text)), "")

    def _share(self, manifest: Facts) -> list[str]:
        return manifest_lib.share(
            {name: size for name, (size, _) in manifest["files"].items()}, self._index, self._count
        )


def steps(folder: Path) -> list[int]:
    """Returns the committed steps in a folder of checkpoints, in rising order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def finished_steps(folder: Path) -> dict[int, Facts]:
    """Returns {step: manifest} of the steps with an undamaged manifest, in rising order."""
    found = {}
    for step in steps(folder):
        with contextlib.suppress(ValueError):
            if manifest := manifest_lib.read(folder / str(step)):
                found[step] = manifest
    return found


def require_same_run(workdir: str | os.PathLike, config: Config) -> None:
    """Raises ConfigError if the workdir's checkpoints are of a run with another model, data or
    batch order; the message names the first field.
    """
    path = Path(workdir) / "config.json"
    if path.is_file() and steps(_folder(workdir)):
        manifest_lib.require_same_run(
            manifest_lib.fixed_fields(_read_json(path)), config, f"{workdir} holds checkpoints"
        )


def claim_workdir(workdir: str | os.PathLike, config: Config) -> None:
    """Writes config.json.

    Raises:
      ConfigError: it cannot be written to.
    """
    path = Path(workdir) / "config.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(to_dict(config), indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} cannot be written to: {error.strerror}. Choose a folder of your "
            "own with room."
        ) from error


def describe_workdir(workdir: str | os.PathLike) -> dict[str, Any]:
    """Returns the owner, config.json and the committed steps as this process sees them.

    The processes of a run compare it.
    """
    path = Path(workdir) / "config.json"
    return {
        "owner": owner_id(workdir),
        "config": path.read_text(encoding="utf-8") if path.is_file() else None,
        "checkpoints": steps(_folder(workdir)),
    }


def read_config(workdir: str | os.PathLike) -> Config:
    """Returns the Config of the run in a workdir.

    Raises:
      ConfigError: the workdir has no config.json.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{workdir} is not a run: it has no config.json. Pass the --workdir of `python "
            f"train.py`."
        )
    return from_config_dict(_read_json(path))


def _read_json(path: Path) -> dict[str, Any]:
    return json_object(str(path), path.read_bytes())


def _folder(workdir: str | os.PathLike) -> Path:
    return (Path(workdir) / "checkpoints").absolute()


def _says_disk_full(error: BaseException | None) -> bool:
    return any(text in str(error) for text in _DISK_FULL)


def _is_not_disk_full(record: logging.LogRecord) -> bool:
    """Filters the tracebacks of a full disk from orbax's log.

    Each orbax thread logs one; `Store.check` reports it in one line.
    """
    return not (record.exc_info and _says_disk_full(record.exc_info[1]))


def _wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PEER_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {_PEER_SECONDS / 60:.0f} minutes for {what}")
        time.sleep(_POLL_SECONDS)


def _unused(path: Path) -> Path:
    """Returns the first of `path`, `path`-2, `path`-3, ... that does not exist."""
    names = (path.name if n == 1 else f"{path.name}-{n}" for n in itertools.count(1))
    return next(p for name in names if not (p := path.with_name(name)).exists())


def _is_on_cpu(items: Items) -> bool:
    return all(
        device.platform == "cpu" for device in jax.tree.leaves(items)[0].sharding.device_set
    )


def _copied(items: Items) -> Items:
    """Copies the arrays on their devices, without compiling and without waiting."""
    leaves, treedef = jax.tree.flatten(items)
    shards = [shard.data for leaf in leaves for shard in leaf.addressable_shards]
    copies = iter(jax.device_put(shards, [shard.sharding for shard in shards], may_alias=False))
    return treedef.unflatten(
        jax.make_array_from_single_device_arrays(
            leaf.shape, leaf.sharding, [next(copies) for _ in leaf.addressable_shards]
        )
        for leaf in leaves
    )
