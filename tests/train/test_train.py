"""The training loop on a small model and real files: learning, exact resume, what it writes, and
what it refuses.
"""

import dataclasses
import gc
import json
import os
import re
import shutil
import signal
import threading
import time
import weakref

import numpy as np
import pytest

from hunyuan_jax.checkpoint import manifest
from hunyuan_jax.checkpoint.store import steps
from hunyuan_jax.config import (
    CheckpointConfig,
    Config,
    ScheduleConfig,
    TrainConfig,
    field_names,
    to_dict,
)
from hunyuan_jax.data import loader
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.runlog import watchdog
from hunyuan_jax.train import loop
from hunyuan_jax.train import stop as stop_lib
from support import jax_settings
from support.runs import MODEL, config_for, losses, on_one_device, rows, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """These tests are about the loop; test_moe.py is about meshes."""
    with on_one_device():
        yield


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The workdir of a run that nothing disturbed, but for a watchdog that looks while it
    compiles.
    """
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert loop.run(config_for(corpus, watchdog_minutes=0.002), workdir) == 0
    return workdir


@pytest.fixture
def finished(whole, tmp_path):
    """A workdir like it, to work on."""
    return shutil.copytree(whole, tmp_path / "finished")


def validation_losses(workdir):
    return {
        row["step"]: row["validation_loss"] for row in rows(workdir) if "validation_loss" in row
    }


@pytest.mark.heavy
def test_stopped_and_continued_run_is_bit_equal(corpus, whole, tmp_path):
    """Whatever the settings of jax are in the process that continues."""
    # The schedule depends on num_steps, so the shorter run is stopped by a signal, not by its
    # length.
    config = config_for(corpus)
    calls = []
    original = loop.Log.step

    def stop_at_three(self, step, metrics):
        original(self, step, metrics)
        calls.append(step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Log, "step", stop_at_three)
        assert loop.run(config, tmp_path / "parts") == 0
    assert calls[-1] in (3, 4)
    assert steps(tmp_path / "parts" / "checkpoints")[-1] == calls[-1]
    with jax_settings.unusual():
        assert loop.run(config, tmp_path / "parts") == 0
    assert losses(tmp_path / "parts") == losses(whole)
    assert validation_losses(tmp_path / "parts") == validation_losses(whole)


@pytest.mark.heavy
def test_killed_run_repeats_the_steps_after_its_checkpoint(corpus, whole, tmp_path, capsys):
    """After a kill there are rows newer than the checkpoint; they are replaced, equal, and not
    doubled.
    """
    config = config_for(corpus)

    def die_at_five(self, step, metrics, original=loop.Log.step):
        original(self, step, metrics)
        if step == 5:
            raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Log, "step", die_at_five)
        with pytest.raises(RuntimeError, match="killed"):
            loop.run(config, tmp_path / "parts")
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a row cut off by the crash
    assert loop.run(config, tmp_path / "parts") == 0
    assert f"generate --checkpoint={tmp_path / 'parts'} --prompt=" in capsys.readouterr().err
    assert [row["step"] for row in rows(tmp_path / "parts")] == [
        row["step"] for row in rows(whole)
    ]
    assert losses(tmp_path / "parts") == losses(whole)


def test_finished_run_started_again_changes_nothing(corpus, finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    assert loop.run(config_for(corpus), finished) == 0
    assert "is at step 6 of 6 already" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_text() == before


def test_what_a_run_writes(whole):
    workdir = whole
    stacks = (workdir / "stacks-0.txt").read_text()
    assert (
        "process 0 of 1 has done 0 steps and is compiling its first step. The stacks" in stacks
        and "in run\n" in stacks
    )
    assert json.loads((workdir / "config.json").read_text())["model"]["moe"]["num_experts"] == 4
    assert list((workdir / "tensorboard").glob("events*"))
    assert sorted(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*")) == [4, 6]
    logged = [row for row in rows(workdir) if "loss" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    for row in logged:
        assert set(row) >= {
            "loss",
            "learning_rate",
            "grad_norm",
            "seconds_per_step",
            "tokens_per_second",
        }
        load = np.array(row["moe/load"])
        assert load.shape == (1, 4)
        np.testing.assert_allclose(load.sum(1), 1.0, atol=1e-4)
        assert row["moe/dropped"] == 0.0
        assert 0 <= row["moe/recycled"] < 1
        assert 0 < row["moe/entropy"] <= np.log(4) + 1e-6
        # At capacity 1.0 with every token valid, recycling leaves a perfect balance.
        np.testing.assert_allclose(load, 0.25, atol=1e-4)
    assert logged[0]["learning_rate"] == pytest.approx(1.5e-3)
    validated = [row for row in rows(workdir) if "validation_loss" in row]
    assert [row["step"] for row in validated] == [3, 6]
    assert logged[5]["loss"] < logged[0]["loss"] - 0.3  # it learns: 5.56, 5.07
    assert validated[1]["validation_loss"] < validated[0]["validation_loss"] - 0.05
    assert "mfu" not in logged[0]  # a CPU's peak is not known


@pytest.mark.slow
def test_it_learns(corpus, tmp_path):
    config = config_for(corpus, num_steps=60, batch_size=4, log_every=60, eval_every=60)
    assert loop.run(config, tmp_path / "run") == 0
    logged = losses(tmp_path / "run")
    assert logged[1][0] > 5.0
    assert logged[60][0] < 3.5
    assert validation_losses(tmp_path / "run")[60] < 3.5


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (
            lambda c: dataclasses.replace(c, model=dataclasses.replace(c.model, num_layers=2)),
            "config.model.num_layers = 1",
        ),
        (
            lambda c: dataclasses.replace(
                c,
                model=dataclasses.replace(
                    c.model, moe=dataclasses.replace(c.model.moe, dispatch="drop")
                ),
            ),
            "config.model.moe.dispatch = 'recycle'",
        ),
        (
            lambda c: dataclasses.replace(
                c, data=dataclasses.replace(c.data, validation_fraction=0.2)
            ),
            "config.data.validation_fraction",
        ),
        (
            lambda c: dataclasses.replace(c, train=dataclasses.replace(c.train, seed=1)),
            "config.train.seed = 0",
        ),
        (
            lambda c: dataclasses.replace(c, train=dataclasses.replace(c.train, batch_size=4)),
            "config.train.batch_size = 2",
        ),
    ],
)
def test_workdir_of_another_run_is_refused(corpus, finished, change, name):
    before = (finished / "config.json").read_text()
    with pytest.raises(ConfigError, match=name):
        loop.require_same_run(finished, change(config_for(corpus)))
    assert (finished / "config.json").read_text() == before


def test_longer_run_of_the_same_model_is_accepted(corpus, finished):
    loop.claim_workdir(finished, config_for(corpus, num_steps=100))
    assert json.loads((finished / "config.json").read_text())["train"]["num_steps"] == 100


@pytest.mark.slow
def test_a_longer_run_says_what_becomes_of_its_learning_rate(corpus, finished, capsys):
    """A run of 6 steps that goes on: planned anew, or with the length of the old plan."""
    keeping = config_for(corpus, num_steps=7)
    keeping = dataclasses.replace(
        keeping, schedule=dataclasses.replace(keeping.schedule, num_steps=6)
    )
    kept = shutil.copytree(finished, finished.with_name("kept"))
    assert loop.run(config_for(corpus, num_steps=8), finished) == 0
    line = (
        r"the learning rate of the next step is .* \(step 6, planned for 6 steps\) had 0\.0003\. "
    )
    assert re.search(
        line + r".*anew over 8 steps.*config\.schedule\.num_steps = 6", output(capsys)
    )
    assert loop.run(keeping, kept) == 0
    assert "learning rate of" not in output(capsys)
    rates = [row["learning_rate"] for row in rows(kept) if "learning_rate" in row]
    assert rates[-1] == rates[-2] == pytest.approx(3e-4)


def output(capsys):
    return capsys.readouterr().err


@pytest.mark.heavy
def test_a_run_goes_on_with_changes_and_says_those_that_act(corpus, finished, tmp_path, capsys):
    """Kernels, remat and the place of the text change no number; weight decay does."""
    moved = shutil.copytree(corpus, tmp_path / "moved")
    config = config_for(moved, num_steps=7, eval_batches=1, init_from=str(tmp_path))
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat="full", kernels="xla"),
        optimizer=dataclasses.replace(config.optimizer, weight_decay=0.2),
    )
    assert loop.run(config, finished) == 0
    assert max(losses(finished)) == 7
    said = output(capsys)
    assert "config.optimizer.weight_decay is 0.2 from here on; up to step 6 it was 0.1." in said
    assert "config.train.eval_batches is 1 from here on; up to step 6 it was 2." in said
    assert f"config.train.init_from = {str(tmp_path)!r} has no effect" in said
    assert said.count("from here on") == 2


def test_every_field_of_training_is_fixed_noted_or_changes_no_number():
    values = to_dict(config_for("x"))
    noted, fixed = manifest.noted_fields(values), manifest.fixed_fields(values)
    assert not set(noted) & set(fixed)
    free = {
        name
        for name in field_names()
        if name.startswith(("train.", "optimizer.")) and name not in {*noted, *fixed}
    }
    assert free == {
        *("train.num_steps", "train.num_epochs", "train.log_every", "train.eval_every"),
        "train.max_skipped_steps",
        *("train.watchdog_minutes", "train.profile_steps", "train.wandb_project"),
    }


def test_every_field_of_the_fixed_sections_is_known():
    """A new field of them may not change during a run; FREE_FIELDS lists those that may."""
    named = set(manifest.fixed_fields(to_dict(config_for("x"))))
    sections = ("model.", "data.", "objective.")
    all_fields = {name for name in field_names() if name.startswith(sections)}
    assert all_fields - named == manifest.FREE_FIELDS
    assert named - all_fields == {
        f"train.{name}" for name in ("batch_size", "seq_len", "seed", "ema_decay")
    }


def test_changed_text_is_refused(corpus, finished):
    extra = corpus / "extra.txt"
    extra.write_text("more")
    try:
        with pytest.raises(ConfigError, match="has changed since"):
            loop.run(config_for(corpus, num_steps=7), finished)
    finally:
        extra.unlink()


@pytest.mark.heavy
def test_a_row_of_skipped_steps_is_reported_and_stops_the_run(corpus, tmp_path, capsys):
    config = config_for(corpus, max_skipped_steps=3, num_steps=20, log_every=2)
    config = dataclasses.replace(
        config,
        schedule=ScheduleConfig(peak_lr=1e30, warmup_steps=0),
        checkpoint=CheckpointConfig(every=5, keep=2, keep_best=0),
    )
    message = (
        r"3 steps in a row were skipped, up to step 4: loss (nan|inf), .*max_skipped_steps = "
        r"3.*lower config.schedule.peak_lr"
    )
    with pytest.raises(ConfigError, match=message):
        loop.run(config, tmp_path / "run")
    printed = capsys.readouterr().err
    for step in (2, 3, 4):  # step 1 ruins the parameters
        assert re.search(rf"step {step} was skipped: loss .*; documents: text/\d+\.txt", printed)
    assert not steps(tmp_path / "run" / "checkpoints")
    last = rows(tmp_path / "run")[-1]
    assert last["step"] == 4 and last["skipped_steps"] == 3 and last["loss"] is None
    assert last["goodput/skipped_seconds"] > 0


def test_checkpoints_by_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    config = Config(
        MODEL,
        train=TrainConfig(seq_len=MODEL.max_position),
        checkpoint=CheckpointConfig(every=0, every_minutes=2.0),
    )
    schedule = loop._Saves(config)
    now[0] = 119.0
    assert not schedule.is_due(100, is_logged=True)
    now[0] = 121.0
    assert schedule.is_due(101, is_logged=True) and not schedule.is_due(101, is_logged=False)
    schedule.saved()
    assert not schedule.is_due(102, is_logged=True)
    by_steps = loop._Saves(dataclasses.replace(config, checkpoint=CheckpointConfig(every=7)))
    now[0] = 1e6
    assert [step for step in range(1, 15) if by_steps.is_due(step, is_logged=True)] == [7, 14]


def test_the_watchdog_writes_the_stacks_of_all_threads_again_and_again(tmp_path):
    released = threading.Event()

    def a_hung_collective():
        released.wait()

    hung = threading.Thread(target=a_hung_collective)
    hung.start()
    watching = watchdog.Watchdog(0.1 / 60, tmp_path / "stacks.txt", "process 3 of 4")
    watching.finished(17)
    try:
        with watching.doing("in a step"):
            deadline = time.monotonic() + 20
            while (
                not (tmp_path / "stacks.txt").is_file()
                or (tmp_path / "stacks.txt").read_text().count("watchdog: ") < 2
            ):
                assert time.monotonic() < deadline
                time.sleep(0.02)
    finally:
        released.set()
        watching.close()
        hung.join()
    text = (tmp_path / "stacks.txt").read_text()
    assert (
        "process 3 of 4 has done 17 steps and is in a step." in text
        and "in a_hung_collective" in text
    )


def test_the_watchdog_keeps_nothing_of_the_threads_it_shows():
    inside, released, batches = threading.Event(), threading.Event(), [np.zeros(1)]
    batch_ref = weakref.ref(batches[0])

    def a_step():
        batch = batches.pop()
        inside.set()
        released.wait()
        assert batch.size

    thread = threading.Thread(target=a_step)
    gc.disable()
    try:
        thread.start()
        inside.wait()
        stacks = watchdog._stacks()
        released.set()
        thread.join()
        assert "in a_step" in stacks and batch_ref() is None
    finally:
        gc.enable()


def test_the_watchdog_looks_from_the_start_to_the_last_upload(corpus, finished, monkeypatch):
    stacks = finished / "stacks-0.txt"
    stacks.unlink()

    def hanging(function, says):
        def wrapper(*args):
            deadline = time.monotonic() + 20
            while not (stacks.is_file() and says in stacks.read_text()):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            return function(*args)

        return wrapper

    for place, name, says in (
        (loader, "open_corpus", "process 0 of 1 has done 0 steps and is reading its text."),
        (
            loop.Store,
            "restore_newest",
            "process 0 of 1 has done 0 steps and is restoring a checkpoint.",
        ),
        (
            loop.Store,
            "close",
            "process 0 of 1 has done 6 steps and is waiting for saves and uploads.",
        ),
    ):
        monkeypatch.setattr(place, name, hanging(getattr(place, name), says))
    assert loop.run(config_for(corpus, watchdog_minutes=0.002), finished) == 0


def test_a_watchdog_of_a_run_that_makes_progress_is_silent(tmp_path):
    watching = watchdog.Watchdog(1.0 / 60, tmp_path / "stacks.txt", "process 0 of 1")
    for step in range(30):
        time.sleep(0.05)
        watching.finished(step)
    watching.close()
    watchdog.Watchdog(0.0, tmp_path / "stacks.txt", "never").close()
    assert not (tmp_path / "stacks.txt").exists()


def test_tokenizer_larger_than_the_vocabulary_is_refused(corpus, tmp_path):
    config = config_for(corpus)
    config = dataclasses.replace(
        config, model=dataclasses.replace(MODEL, vocab_size=256, pad_token_id=-1)
    )
    with pytest.raises(ConfigError, match="vocab_size = 256 must be at least that"):
        loop.run(config, tmp_path / "run")


def test_second_ctrl_c_interrupts_at_once():
    with stop_lib.stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
