"""Saving and restoring a run: its arrays (orbax), what the run is, and which checkpoints are good.

A workdir holds config.json and checkpoints/STEP/{params,optimizer,run,manifest.json}.  `params`
and `optimizer` are items: pytrees of arrays, each restored with or without the other.  `run` is
the JSON of `manifest.facts`.  A checkpoint is

* committed when checkpoints/STEP is there: orbax renames a folder in which everything is written;
* finished when it has its manifest too: the size and checksum of every file, made in the
  background after the commit.

Format 1 kept both items in one, `state`: {"params": params, **optimizer}.  It is read, and never
written.

Beside the steps may lie damaged-STEP (set aside at a restore, for a person to look at), and what a
killed process left (_LEFTOVER), removed at the next start.
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
from hunyuan_jax.config import CheckpointConfig, Config, from_config_dict, to_dict
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import json_object, write_whole
from hunyuan_jax.parallel import hosts

ITEMS = ("params", "optimizer")
_ITEM_OF_FORMAT_1 = "state"
_LEFTOVER = re.compile(r"(deleting|downloading|checksums)-\d+|\d+\.orbax-checkpoint-tmp.*")
_POLL_SECONDS = 0.05
_PEER_SECONDS = 3600.0  # for the other processes to checksum their share
_DISK_FULL = ("No space left on device", "Disk quota exceeded")

Items = dict[str, Any]  # item -> pytree of arrays, or of jax.ShapeDtypeStruct


class Store:
    """The checkpoints of one workdir.  All processes of a run make one and take part in each call;
    each writes its own shards.

    What takes time happens in a thread: writing, checksums (each process takes a share of the
    files), deleting what `config.checkpoint` does not keep.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        cfg: CheckpointConfig,
        report: Callable[[str], None],
        is_alone: bool = False,
    ):
        """Connects to the mirror, if cfg names one; `report` gets lines for the user, from several
        threads.

        is_alone: to read by this process, whatever the others do; arrays must be for its own
        devices.

        Raises:
          ConfigError: the mirror cannot be used.
        """
        self._cfg, self._report, self._folder = cfg, report, _folder(workdir)
        self._index, self._count = (
            (0, 1) if is_alone else (jax.process_index(), jax.process_count())
        )
        # Told which processes take part, orbax waits for them through jax's service and not
        # through the devices: a thread may do that.
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
        self.save_seconds: float | None = (
            None  # from the call of the last save until its manifest was there
        )
        logging.getLogger("absl").addFilter(
            _is_news
        )  # for good: orbax's threads outlive a save that failed

    # --- Restoring

    def restore_newest(
        self, target_of: Callable[[Facts], Items]
    ) -> tuple[int, Items, Facts] | None:
        """(step, items, facts) of the newest good checkpoint, here or in the mirror, or None.
        Call it once, before the first save.

        Every file is read and compared with the manifest.  A step that is damaged is set aside
        with a warning, and the one before it is looked at.  A step without manifest, whose process
        was killed right after the commit, has no checksums to compare with: it is taken, with a
        warning, if it can be read, and gets its manifest.

        Args:
          target_of: facts -> the items as pytrees of shapes, dtypes and shardings to restore to;
            may refuse the checkpoint with ConfigError.

        Raises:
          ConfigError: there were only damaged ones, or the newest has a format of later versions.
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
        # Process 0 speaks for all: it may just have written a manifest that the others do not see
        # yet.
        newest, self.best_loss = json.loads(
            hosts.gathered(json.dumps([max(losses, default=0), best]))[0]
        )
        if self._mirror:
            with hosts.fail_together():
                self._mirror.start([newest] if newest else [])
        return found

    def newest_good(self, items: Collection[str] = ITEMS) -> tuple[int, Facts]:
        """(step, facts) of the newest checkpoint here whose `items` are not damaged; changes
        nothing, and reads no file of other items.

        Raises:
          ConfigError: there is none, or it has a format of later versions.
        """
        for step in reversed(steps(self._folder)):
            facts, wrong = self._verified(step, items)
            if not wrong:
                return step, facts
            self._report(
                f"warning: checkpoint {step} of {self._folder} is damaged: {wrong}. The one "
                "before is tried."
            )
        raise ConfigError(
            f"{self._folder.parent} holds no finished checkpoint yet; train until "
            f"config.checkpoint.every = {self._cfg.every} steps."
        )

    def restore(self, step: int, targets: Items, *, is_partial: bool = False) -> Items:
        """The items of a committed step that `targets` names, with its shapes, dtypes and
        shardings.  Nothing is read of the others.

        Args:
          step: see `steps`.
          targets: item -> pytree of jax.ShapeDtypeStruct with shardings.
          is_partial: whether a target may leave out entries of its item, which are not read then.
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
        """Starts saving in the background; the arrays may be donated when this returns.  Waits for
        the save before.

        Args:
          step: steps done, more than at any save before.
          items: a pytree of arrays for each of ITEMS; a dict for "optimizer".
          facts: see `manifest.facts`.

        Raises:
          ConfigError: no space was left for the save before.
        """
        self.wait()
        if facts["validation_loss"] is not None:
            self.best_loss = min(self.best_loss, facts["validation_loss"])
        start = time.monotonic()
        # orbax copies the arrays to the host while its caller waits, and does more.  Where the
        # host is the device, one pass over the memory makes a copy, and all of orbax can run in
        # the thread; an accelerator has no room for a second state.
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
                    malloc.trim()  # of what orbax has made of it
                self.save_seconds = time.monotonic() - start
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name=f"save {step}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises what the last save has met by now; ConfigError if no space was left."""
        if self._error is None:
            return
        error, self._error = self._error, None
        if not _says_disk_full(error):
            raise error
        if self._index == 0:
            self._remove_leftovers()
        raise self.disk_full() from error

    def require_room(self) -> None:
        """Raises ConfigError if less is free than the newest checkpoint takes: better to know
        before the save.
        """
        manifests = finished_steps(self._folder)
        if manifests:
            needed = sum(size for size, _ in manifests[max(manifests)]["files"].values())
            if shutil.disk_usage(self._folder).free < needed:
                raise self.disk_full()

    def disk_full(self) -> ConfigError:
        """What to tell the user when the workdir's disk is full."""
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
        """Waits for the save in progress, its manifest included; raises what `check` raises."""
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
            except Exception as error:  # orbax and its file format have many for a broken file
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
        """(manifest, or without one the facts; what is wrong with the files of `items` or "") on
        all processes, each of which reads a share.

        Raises:
          ConfigError: the checkpoint has a format of later versions.
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
        """Copies a step from the mirror; False if it is damaged there."""
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
        """Writes the manifest of a committed step, deletes the steps that are not kept, and tells
        the mirror.
        """
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
            target = (
                self._folder / f"deleting-{step}"
            )  # no half-deleted step, wherever the process may be killed
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
        """The first text of all processes that is not empty, or ""."""
        return text if self._count == 1 else next(filter(None, hosts.gathered(text)), "")

    def _share(self, manifest: Facts) -> list[str]:
        return manifest_lib.share(
            {name: size for name, (size, _) in manifest["files"].items()}, self._index, self._count
        )


def steps(folder: Path) -> list[int]:
    """Committed steps in a folder of checkpoints, rising."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def finished_steps(folder: Path) -> dict[int, Facts]:
    """{step: manifest} of the finished ones, rising; a damaged manifest is none."""
    found = {}
    for step in steps(folder):
        with contextlib.suppress(ValueError):
            if manifest := manifest_lib.read(folder / str(step)):
                found[step] = manifest
    return found


def claim_workdir(workdir: str | os.PathLike, config: Config) -> None:
    """Writes config.json, or checks that the run in the workdir is this one.

    Raises:
      ConfigError: the workdir holds checkpoints of a run with another model, data or batch order,
        naming the first field; or it cannot be written to.
    """
    path = Path(workdir) / "config.json"
    if path.is_file() and steps(_folder(workdir)):
        manifest_lib.require_same_run(
            manifest_lib.fixed_fields(_read_json(path)), config, f"{workdir} holds checkpoints"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(to_dict(config), indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} cannot be written to: {error.strerror}. Choose a folder of your "
            "own with room."
        ) from error


def describe_workdir(workdir: str | os.PathLike) -> dict[str, Any]:
    """What this process sees in a workdir, for comparing with the others: config.json and the
    committed steps.
    """
    path = Path(workdir) / "config.json"
    return {
        "config": path.read_text(encoding="utf-8") if path.is_file() else None,
        "checkpoints": steps(_folder(workdir)),
    }


def read_config(workdir: str | os.PathLike) -> Config:
    """The Config of the run in a workdir.

    Raises:
      ConfigError: there is none.
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


def _is_news(record: logging.LogRecord) -> bool:
    """Filter of orbax's log: not the traces, one by each of its threads, of a full disk, which
    `Store.check` says in a line.
    """
    return not (record.exc_info and _says_disk_full(record.exc_info[1]))


def _wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PEER_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {_PEER_SECONDS / 60:.0f} minutes for {what}")
        time.sleep(_POLL_SECONDS)


def _unused(path: Path) -> Path:
    """`path`, or with -2, -3, ... behind it, whichever does not exist."""
    names = (path.name if n == 1 else f"{path.name}-{n}" for n in itertools.count(1))
    return next(p for name in names if not (p := path.with_name(name)).exists())


def _is_on_cpu(items: Items) -> bool:
    return all(
        device.platform == "cpu" for device in jax.tree.leaves(items)[0].sharding.device_set
    )


def _copied(items: Items) -> Items:
    """The arrays once more, on the same devices; compiles nothing, and waits for nothing."""
    leaves, treedef = jax.tree.flatten(items)
    shards = [shard.data for leaf in leaves for shard in leaf.addressable_shards]
    copies = iter(jax.device_put(shards, [shard.sharding for shard in shards], may_alias=False))
    return treedef.unflatten(
        jax.make_array_from_single_device_arrays(
            leaf.shape, leaf.sharding, [next(copies) for _ in leaf.addressable_shards]
        )
        for leaf in leaves
    )
