"""Checkpoints on small arrays and real files: manifests, what is kept, damage, a full disk, and
the mirror on a filesystem that fails.
"""

import dataclasses
import gc
import importlib.util
import itertools
import json
import logging
import os
import random
import shutil
import subprocess
import time

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax import presets
from hunyuan_jax.checkpoint import manifest, mirror
from hunyuan_jax.checkpoint import store as store_lib
from hunyuan_jax.checkpoint.store import Store, finished_steps, steps
from hunyuan_jax.config import CheckpointConfig, Config
from hunyuan_jax.errors import ConfigError
from support.damage import DAMAGE, flip_bit, largest_file

KEEP = CheckpointConfig(keep=2)


@pytest.fixture
def dropped_coroutines():
    """orbax drops its coroutines when a file is broken: they are collected in the test that made
    them, not in one that comes later.
    """
    yield
    gc.collect()


def state_of(step):
    rng = np.random.default_rng(step)
    return {
        "params": {"w": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)},
        "optimizer": {"step": jnp.int32(step)},
    }


def facts_of(validation_loss=None):
    return manifest.facts(Config(presets.tiny()), {"data": 1}, {"row": 7}, validation_loss)


def save_steps(workdir, numbers, cfg=KEEP, losses=None, report=print):
    """A store that saves `numbers`, after a restore as in a run; what was restored."""
    store = Store(workdir, cfg, report)
    restored = store.restore_newest(target)
    for step in numbers:
        store.save(step, state_of(step), facts_of((losses or {}).get(step)))
    store.close()
    return restored


def target(facts):
    assert facts["position"] == {"row": 7}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), state_of(0)
    )


def assert_is(restored, step):
    assert restored[0] == step
    for got, expected in zip(
        jax.tree.leaves(restored[1]), jax.tree.leaves(state_of(step)), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


# -----------------------------------------------------------------------------
# the manifest


@settings(max_examples=50)
@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, 1000)), st.integers(1, 9))
def test_each_file_has_one_process_and_all_have_about_as_many_bytes(sizes, count):
    shares = [manifest.share(sizes, index, count) for index in range(count)]
    assert sorted(itertools.chain(*shares)) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0) + len(sizes)


@settings(max_examples=50)
@given(
    st.dictionaries(st.integers(1, 60), st.none() | st.sampled_from([1.0, 2.0, 3.0])),
    st.integers(1, 3),
    st.integers(0, 7),
    st.integers(0, 2),
)
def test_what_is_kept(losses, keep, keep_every, keep_best):
    kept = manifest.kept(losses, keep, keep_every, keep_best)
    assert kept <= set(losses) and set(sorted(losses)[-keep:]) <= kept
    assert all(step in kept for step in losses if keep_every and step % keep_every == 0)
    validated = sorted(loss for loss in losses.values() if loss is not None)
    best = [losses[step] for step in kept if losses[step] is not None]
    assert sorted(best)[: min(keep_best, len(validated))] == validated[:keep_best]
    assert len(kept) <= keep + keep_best + sum(
        bool(keep_every) and step % keep_every == 0 for step in losses
    )


def test_of_equally_good_steps_the_newest_is_the_best():
    assert manifest.kept({1: 2.0, 2: 1.0, 3: 1.0, 4: 3.0}, keep=1, keep_every=0, keep_best=1) == {
        3,
        4,
    }


def test_any_change_of_a_manifest_is_seen(tmp_path):
    manifest.write(tmp_path, facts_of() | {"files": {"a": [1, "b"]}})
    data = (tmp_path / manifest.FILE).read_bytes()
    assert manifest.read(tmp_path)["files"] == {"a": [1, "b"]}
    rng = random.Random(0)
    for _ in range(200):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        for broken in (bytes(changed), data[: rng.randrange(len(data))]):
            try:
                found = manifest.parse(broken)
            except ValueError:
                continue
            assert found == manifest.parse(data)  # such as a space for a line break
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        manifest.parse(b"")


def test_facts_of_a_run_and_what_may_not_change():
    config = Config(presets.tiny())
    facts = facts_of(1.5)
    assert json.loads(json.dumps(facts)) == facts
    assert (
        facts["state_dtype"] == "float32"
        and facts["validation_loss"] == 1.5
        and facts["mesh"] == {"data": 1}
    )
    assert facts["versions"]["jax"] == jax.__version__
    manifest.require_same_run(facts["fixed"], config, "it was")
    longer = dataclasses.replace(
        config, train=dataclasses.replace(config.train, num_steps=900, log_every=7)
    )
    manifest.require_same_run(facts["fixed"], longer, "it was")
    assert manifest.facts(longer, {}, {}, None)["config_hash"] != facts["config_hash"]
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=9))
    with pytest.raises(
        ConfigError,
        match=r"it was made with config.train.seed = 0; now it is 9. Use another --workdir",
    ):
        manifest.require_same_run(facts["fixed"], other, "it was")


# -----------------------------------------------------------------------------
# the store


@pytest.mark.parametrize("is_on_cpu", [True, False])
def test_what_was_saved_is_restored_though_the_state_was_donated_at_once(
    tmp_path, monkeypatch, is_on_cpu
):
    monkeypatch.setattr(
        store_lib, "_is_on_cpu", lambda state: is_on_cpu
    )  # an accelerator's state goes the other way
    store = Store(tmp_path, KEEP, print)
    assert store.restore_newest(target) is None
    spoil = jax.jit(lambda tree: jax.tree.map(lambda a: a * 0 - 1, tree), donate_argnums=0)
    for step in (3, 5):
        state = state_of(step)
        store.save(step, state, facts_of())
        spoil(state)
        assert state["params"]["w"].is_deleted() or not is_on_cpu  # orbax may hold on to it
    store.close()
    assert store.save_seconds > 0
    assert_is(save_steps(tmp_path, []), 5)
    assert (tmp_path / "checkpoints" / "5" / "manifest.json").is_file()


@pytest.mark.heavy
def test_newest_every_kth_and_best_are_kept(tmp_path):
    cfg = CheckpointConfig(keep=2, keep_every=4, keep_best=1)
    save_steps(tmp_path, range(1, 9), cfg, losses={2: 3.0, 3: 1.0, 5: 2.0, 6: 4.0})
    assert steps(tmp_path / "checkpoints") == [3, 4, 7, 8]
    store = Store(tmp_path, cfg, print)
    store.restore_newest(target)
    assert store.best_loss == 1.0
    store.save(9, state_of(9), facts_of(0.5))
    assert store.best_loss == 0.5
    store.close()
    assert steps(tmp_path / "checkpoints") == [4, 8, 9]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, kind):
    save_steps(tmp_path, [1, 2])
    DAMAGE[kind](tmp_path / "checkpoints" / "2")
    lines = []
    assert_is(save_steps(tmp_path, [2], report=lines.append), 1)
    (line,) = lines
    pattern = {
        "truncated": "bytes instead of",
        "missing": "is missing",
        "bit flip": "another checksum",
        "empty file": "_METADATA has 0 bytes instead",
        "manifest": "manifest.json is damaged",
    }[kind]
    assert (
        line.startswith("warning: checkpoint 2 is damaged: ")
        and pattern in line
        and "damaged-2; the one before is tried" in line
    )
    assert (tmp_path / "checkpoints" / "damaged-2").is_dir()
    assert_is(save_steps(tmp_path, []), 2)  # made again


def test_a_run_does_not_start_over_when_all_are_damaged(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in (1, 2):
        DAMAGE["bit flip"](tmp_path / "checkpoints" / str(step))
    for _ in range(2):
        with pytest.raises(
            ConfigError,
            match=r"only damaged ones are there, and a run does not start over by itself",
        ):
            save_steps(tmp_path, [])
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "damaged-1",
        "damaged-2",
    }


@pytest.mark.usefixtures("dropped_coroutines")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_without_a_manifest_a_checkpoint_is_used_if_it_can_be_read(tmp_path):
    """The process was killed after the commit, before the checksums."""
    save_steps(tmp_path, [1, 2])
    (tmp_path / "checkpoints" / "2" / "manifest.json").unlink()
    lines = []
    assert_is(save_steps(tmp_path, [], report=lines.append), 2)
    assert (
        len(lines) == 1
        and "checkpoint 2 has no manifest.json" in lines[0]
        and "It is used unchecked" in lines[0]
    )
    assert list(finished_steps(tmp_path / "checkpoints")) == [1, 2]
    (tmp_path / "checkpoints" / "2" / "manifest.json").unlink()
    DAMAGE["truncated"](tmp_path / "checkpoints" / "2")
    assert_is(save_steps(tmp_path, [], report=lines.append), 1)
    assert "checkpoint 2 is damaged: " in lines[-1]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    save_steps(tmp_path, [1])
    folder = tmp_path / "checkpoints"
    for name in (
        "2.orbax-checkpoint-tmp",
        "2.orbax-checkpoint-tmp-7",
        "deleting-1",
        "downloading-3",
        "checksums-2",
        "damaged-1",
        "mine",
    ):
        (folder / name / "x").mkdir(parents=True)
    assert_is(save_steps(tmp_path, []), 1)
    assert {path.name for path in folder.iterdir()} == {"1", "damaged-1", "mine"}


@pytest.mark.usefixtures("dropped_coroutines")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_explained_and_older_checkpoints_stay_good(tmp_path, caplog):
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", tmp_path],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr}")
    try:
        save_steps(tmp_path, [1])
        (tmp_path / "ballast").write_bytes(bytes(shutil.disk_usage(tmp_path).free - 2**13))
        store = Store(tmp_path, KEEP, print)
        store.restore_newest(target)
        with pytest.raises(ConfigError, match="not enough space is left"):
            store.require_room()
        store.save(2, state_of(2), facts_of())
        with pytest.raises(
            ConfigError,
            match=rf"not enough space is left in {tmp_path}: .*the newest is 1. Make room, or "
            r"lower .*keep \(now 2\)",
        ):
            store.close()
        # A thread of orbax may go on for a moment, and leave a folder for the next start to
        # remove.
        assert steps(tmp_path / "checkpoints") == [1]
        assert [
            record for record in caplog.records if record.name == "absl" and record.exc_info
        ] == []  # orbax: one by each thread
        (tmp_path / "ballast").unlink()
        store.require_room()
        assert_is(save_steps(tmp_path, [2]), 1)
        assert_is(save_steps(tmp_path, []), 2)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_other_errors_of_orbax_are_still_shown(tmp_path, caplog):
    Store(tmp_path, KEEP, print).close()
    for error in (
        ValueError("something else"),
        OSError(28, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Disk quota exceeded"),
    ):
        logging.getLogger("absl").error("a thread raised an exception: %s", error, exc_info=error)
    logging.getLogger("absl").warning("No space left on device")  # not an error that comes back
    assert [record.getMessage() for record in caplog.records] == [
        "a thread raised an exception: something else",
        "No space left on device",
    ]


# -----------------------------------------------------------------------------
# the mirror


class FaultyFileSystem(LocalFileSystem):
    """A real folder behind a bad line: operations fail, and files arrive cut off, one time in
    `rate`.
    """

    protocol = "faulty"
    cachable = False
    rate = 3
    rng = random.Random(0)

    def _fail(self):
        if self.rate and self.rng.randrange(self.rate) == 0:
            raise ConnectionError("the line is bad")

    def ls(self, path, detail=False, **kwargs):
        self._fail()
        return super().ls(path, detail=detail, **kwargs)

    def get_file(self, *args, **kwargs):
        self._fail()
        return super().get_file(*args, **kwargs)

    def rm(self, *args, **kwargs):
        self._fail()
        return super().rm(*args, **kwargs)

    def open(self, path, mode="rb", **kwargs):
        file = super().open(path, mode, **kwargs)
        if mode == "wb":
            self._fail()
            if self.rate and self.rng.randrange(self.rate) == 0:
                file.write = lambda data, write=file.write: write(data[: len(data) // 2])
        return file


@pytest.fixture
def mirrored(tmp_path, monkeypatch):
    """(config, folder of the mirror) with pauses of a hundredth of a second."""
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    monkeypatch.setattr(FaultyFileSystem, "rate", 3)
    monkeypatch.setattr(FaultyFileSystem, "rng", random.Random(0))
    monkeypatch.setattr(mirror, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(mirror, "_LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(mirror, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(mirror, "_ATTEMPTS", 30)  # of which all fail once in 3^30
    monkeypatch.setattr(mirror, "_PATIENCE", 30)
    return dataclasses.replace(
        KEEP, keep_best=1, mirror=f"faulty://{tmp_path}/bucket"
    ), tmp_path / "bucket"


def test_the_mirror_has_what_is_kept_and_brings_it_back(tmp_path, mirrored):
    cfg, bucket = mirrored
    save_steps(tmp_path / "run", [1, 2, 3, 4], cfg, losses={2: 1.0, 3: 2.0})
    assert (
        steps(bucket)
        == list(finished_steps(bucket))
        == [2, 3, 4]
        == steps(tmp_path / "run" / "checkpoints")
    )
    for step, found in finished_steps(bucket).items():
        assert manifest.problem(bucket / str(step), found, found["files"]) is None
    shutil.rmtree(tmp_path / "run")
    lines = []
    assert_is(save_steps(tmp_path / "run", [], cfg, report=lines.append), 4)
    assert lines == [f"checkpoint 4 was brought back from {cfg.mirror}."]


def test_the_newer_of_both_sides_is_used_and_damage_is_met_on_either(tmp_path, mirrored):
    cfg, bucket = mirrored
    workdir, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    save_steps(workdir, [1, 2, 3], cfg)
    shutil.rmtree(folder / "3")
    assert_is(save_steps(workdir, [], cfg), 3)
    lines = []
    flip_bit(largest_file(folder / "3"))  # here only: the mirror's is as good
    assert_is(save_steps(workdir, [], cfg, report=lines.append), 3)
    assert "checkpoint 3 is damaged" in lines[0] and "checkpoint 3 was brought back" in lines[1]
    flip_bit(largest_file(folder / "3"))
    flip_bit(largest_file(bucket / "3"))
    assert_is(save_steps(workdir, [3], cfg, report=lines.append), 2)
    assert "checkpoint 3 in the mirror is damaged" in lines[-1] and (bucket / "damaged-3").is_dir()
    assert list(finished_steps(bucket)) == [2, 3]
    (bucket / "3" / "manifest.json").unlink()  # an upload that was interrupted
    (bucket / "3" / "stale").write_text("")
    shutil.rmtree(folder / "3")
    assert_is(save_steps(workdir, [], cfg), 2)
    assert steps(bucket) == [2]


def test_what_was_not_uploaded_is_uploaded_at_the_next_start(tmp_path, mirrored):
    cfg, bucket = mirrored
    save_steps(tmp_path / "run", [1, 2])
    assert_is(save_steps(tmp_path / "run", [], cfg), 2)
    assert list(finished_steps(bucket)) == [2]


def test_a_mirror_that_is_gone_does_not_stop_a_run(tmp_path, mirrored, monkeypatch):
    cfg, bucket = mirrored
    monkeypatch.setattr(mirror, "_ATTEMPTS", 2)
    monkeypatch.setattr(mirror, "_PATIENCE", 1)
    monkeypatch.setattr(FaultyFileSystem, "rate", 0)
    lines = []
    store = Store(tmp_path / "run", cfg, lines.append)
    store.restore_newest(target)
    monkeypatch.setattr(FaultyFileSystem, "rate", 1)
    store.save(1, state_of(1), facts_of())
    store.close()
    trying, given_up = lines
    assert (
        trying
        == f"warning: {cfg.mirror} has failed 1 times (the line is bad); it is tried 2 times in "
        "all."
    )
    assert (
        given_up.startswith(f"warning: step 1 was not uploaded to {cfg.mirror}: ")
        and "the line is bad" in given_up
    )
    with pytest.raises(
        ConfigError,
        match=r"config.checkpoint.mirror = 'faulty://.*' has failed 2 times: ConnectionError: the "
        r"line is bad",
    ):
        save_steps(tmp_path / "run", [], cfg)
    monkeypatch.setattr(FaultyFileSystem, "rate", 0)
    assert_is(save_steps(tmp_path / "run", [2], cfg), 1)
    assert list(finished_steps(bucket)) == [1, 2]


@pytest.mark.parametrize("url", ["nothing://x", "gs://bucket/run"])
def test_a_url_that_cannot_be_used_is_refused(tmp_path, url):
    if url.startswith("gs") and importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(
        ConfigError,
        match=rf"config.checkpoint.mirror = '{url}' cannot be used: .*pip install "
        r"-e '\.\[gcs\]'",
    ):
        Store(tmp_path, dataclasses.replace(KEEP, mirror=url), print)


def test_a_mirror_takes_its_share_of_several_processes(tmp_path, mirrored):
    """Two processes of one run, as two mirrors on one folder; the first writes the manifest when
    the files of both are there.
    """
    cfg, bucket = mirrored
    save_steps(tmp_path / "run", [1])
    mirrors = [
        mirror.Mirror(cfg, tmp_path / "run" / "checkpoints", index, 2, print) for index in range(2)
    ]
    mirrors[0].start([1])
    time.sleep(0.3)
    assert not (bucket / "1" / "manifest.json").exists()
    mirrors[1].start([1])
    for each in mirrors:
        each.close()
    assert list(finished_steps(bucket)) == [1]
    targets = [each.download(1, tmp_path / "target") for each in mirrors]
    assert targets == [None, None]
    assert manifest.files(tmp_path / "target") == manifest.files(
        tmp_path / "run" / "checkpoints" / "1"
    )


def test_a_workdir_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"--workdir=.*/file/run cannot be written to: Not a directory"
    ):
        store_lib.claim_workdir(tmp_path / "file" / "run", Config(presets.tiny()))


def test_an_item_is_restored_without_the_other(tmp_path):
    save_steps(tmp_path, [1, 2])
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "optimizer")  # not even its checksums are read
    flip_bit(largest_file(tmp_path / "checkpoints" / "1"))
    store = Store(tmp_path, KEEP, print)
    step, facts = store.newest_good(("params",))
    restored = store.restore(step, {"params": target(facts)["params"]})
    store.close()
    assert step == 2 and restored.keys() == {"params"}
    np.testing.assert_array_equal(restored["params"]["w"], state_of(2)["params"]["w"])


def test_a_format_of_later_versions_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "FORMAT", 3)
        save_steps(tmp_path, [1])
    with pytest.raises(
        ConfigError,
        match=r"checkpoint 1 of .* has format 3; this version of hunyuan_jax reads formats 1 to 2",
    ):
        save_steps(tmp_path, [2])
    assert steps(tmp_path / "checkpoints") == [1]
