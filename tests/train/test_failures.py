"""Real runs in real processes that are killed, starved and damaged: each is started again, and its
losses are those of an undisturbed run, bit for bit.

docs/reliability.md has the last result of the slow ones: `pytest -m slow tests/test_failures.py -n
0 -s` prints the rows of its table.
"""

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest

from hunyuan_jax.checkpoint.store import finished_steps
from support import paths
from support.damage import DAMAGE
from support.processes import (
    KILLER,
    LONG,
    finish,
    finished,
    losses,
    processes,
    run,
    start,
    write_corpus,
)

ROOT = paths.ROOT
NUM_STEPS = LONG["train.num_steps"]
NUM_KILLS = 20

SLOW_SAVES = """
import runpy, time
from hunyuan_jax.checkpoint.store import Store

finish = Store._finish
Store._finish = lambda *args: (time.sleep(10), finish(*args))
runpy.run_path("train.py", run_name="__main__")
"""
NOT_LOOKING = """
import runpy
from hunyuan_jax.checkpoint.store import Store

Store.require_room = lambda self: None
runpy.run_path("train.py", run_name="__main__")
"""
# (first and last call, longest delay): batches are read eight ahead, and a save takes about a
# tenth of a second.
PLACES = {
    "in a step": ((2, 9), 0.02),
    "in the data worker": ((10, 18), 0.005),
    "in the save": ((1, 2), 0.15),
    "in the checksums": ((1, 2), 0.03),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """{step: numbers} of a run that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("reference")
    run(corpus, workdir)
    found = losses(workdir)
    assert list(found) == list(range(1, NUM_STEPS + 1))
    return found


def assert_same(workdir, reference, is_whole=True):
    found = losses(workdir)
    last = max(found)
    expected = {step: numbers for step, numbers in reference.items() if is_whole or step <= last}
    if not is_whole:  # it may have been killed before the validation of its last step
        expected[last] = {name: expected[last][name] for name in found[last]}
    assert found == expected


def report(case, count, text):
    """A row of the table in docs/reliability.md."""
    print(f"\n| {case} | {count} | {text} |")


def damage(workdir, kind):
    """Of the newest checkpoint; the step of the one before and its own."""
    before, newest = sorted(finished_steps(workdir / "checkpoints"))[-2:]
    DAMAGE[kind](workdir / "checkpoints" / str(newest))
    return before, newest


# -----------------------------------------------------------------------------
# the least of it


@pytest.mark.slow
def test_killed_in_a_save_and_started_again_as_if_nothing_had_happened(corpus, tmp_path):
    short = {"train.num_steps": 8, "data.validation_fraction": 0.0}
    run(corpus, tmp_path / "whole", **short)
    process = start(corpus, tmp_path / "run", ("-c", KILLER, "in the save", "2", "0.001"), **short)
    status, error = finished(process)
    assert status == -signal.SIGKILL, error
    assert 4 in finished_steps(tmp_path / "run" / "checkpoints")
    error = run(corpus, tmp_path / "run", **short)
    assert re.search("resuming at step [48]:", error)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


# -----------------------------------------------------------------------------
# the whole matrix


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kill_9_at_random_moments(corpus, reference, tmp_path):
    rng, counts, lines = (
        random.Random(int(os.environ.get("SEED", "0"))),
        dict.fromkeys([*PLACES, "by the clock"], 0),
        [],
    )
    for place in itertools.islice(itertools.cycle(counts), NUM_KILLS):
        if place == "by the clock":
            process = start(corpus, tmp_path)
            time.sleep(rng.uniform(1.0, 12.0))
            process.kill()
        else:
            (first, last), delay = PLACES[place]
            process = start(
                corpus,
                tmp_path,
                ("-c", KILLER, place, str(rng.randint(first, last)), str(rng.uniform(0, delay))),
            )
        status, error = finished(process)
        assert status == -signal.SIGKILL, error
        lines += [
            line
            for line in error.splitlines()
            if "resuming at" in line or "has no manifest" in line
        ]
        counts[place] += 1
        assert_same(tmp_path, reference, is_whole=False)
    print(*lines, sep="\n")
    run(corpus, tmp_path)
    assert_same(tmp_path, reference)
    report("kill -9", NUM_KILLS, ", ".join(f"{count} {place}" for place, count in counts.items()))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_at_random_moments(corpus, reference, tmp_path):
    rng, seconds = random.Random(1), []
    for _ in range(5):
        process = start(corpus, tmp_path)
        wait_for_line(process, "starting", "resuming")
        time.sleep(rng.uniform(0.0, 2.0))
        before = time.monotonic()
        process.terminate()
        status, error = finished(process)
        seconds.append(time.monotonic() - before)
        assert status == 0 and "the same command continues from there" in error, error
        assert max(finished_steps(tmp_path / "checkpoints")) == max(losses(tmp_path))
    run(corpus, tmp_path)
    assert_same(tmp_path, reference)
    report(
        "SIGTERM",
        5,
        f"exit 0, {min(seconds):.1f} to {max(seconds):.1f} s after the signal (compiling the "
        "first step included)",
    )


@pytest.mark.slow
def test_ctrl_c_twice(corpus, reference, tmp_path):
    process = start(corpus, tmp_path, ("-c", SLOW_SAVES))
    wait_for_line(process, "step 20")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    before = time.monotonic()
    status, error = finished(process)
    seconds = time.monotonic() - before
    assert status == 130 and "Traceback" not in error and seconds < 5, error
    run(corpus, tmp_path)
    assert_same(tmp_path, reference)
    report("Ctrl-C twice, in the middle of a save", 1, f"exit 130 within {seconds + 0.1:.1f} s")


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_the_newest_checkpoint_is_damaged(corpus, reference, tmp_path, kind):
    process = start(corpus, tmp_path, ("-c", KILLER, "in a step", "30", "0"))
    assert finished(process)[0] == -signal.SIGKILL
    before, newest = damage(tmp_path, kind)
    error = run(corpus, tmp_path)
    assert (
        f"warning: checkpoint {newest} is damaged: " in error
        and f"resuming at step {before}:" in error
    )
    assert_same(tmp_path, reference)
    report(
        f"newest checkpoint: {kind}",
        1,
        f"{newest} set aside with a warning, went on from {before}",
    )


@pytest.mark.slow
def test_another_optimizer_dtype_and_mesh(corpus, reference, tmp_path):
    process = start(corpus, tmp_path, ("-c", KILLER, "in a step", "30", "0"))
    assert finished(process)[0] == -signal.SIGKILL
    changed = {"optimizer.state_dtype": "bfloat16", "mesh.data": 1, "mesh.expert": 2}
    error = run(corpus, tmp_path, **changed)
    assert re.search(r"the state of step \d+ is converted from float32 to bfloat16", error)
    found = losses(tmp_path)
    differences = [abs(found[step]["loss"] / reference[step]["loss"] - 1) for step in range(1, 51)]
    assert max(differences) < 0.05
    report(
        "resumed with bfloat16 moments, experts split over two devices",
        1,
        f"first 50 losses within {max(differences):.1%}",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [("train.py",), ("-c", NOT_LOOKING)], ids=["before a save", "while orbax writes"]
)
def test_the_disk_is_full(corpus, reference, tmp_path, script):
    with tmpfs(tmp_path, "60m"):
        workdir = tmp_path / "run"
        process = start(corpus, workdir, script)
        wait_for_line(process, "step 25")
        with contextlib.suppress(OSError):  # the run takes some of it meanwhile
            (tmp_path / "ballast").write_bytes(bytes(shutil.disk_usage(tmp_path).free - 2**16))
        status, error = finished(process)
        message = error.splitlines()[-1]
        assert status == 2 and message.startswith(
            f"error: not enough space is left in {workdir}: "
        ), error
        assert (
            "Finished checkpoints are untouched; the newest is" in message
            and "ERROR:absl" not in error
        )
        (tmp_path / "ballast").unlink()
        run(corpus, workdir)
        assert_same(workdir, reference)
    report(
        f"disk full, {'seen before a save' if script[0] == 'train.py' else 'while orbax writes'}",
        1,
        "exit 2 with one message; goes on when there is room",
    )


@pytest.mark.slow
@pytest.mark.parametrize("days", [-400, 400])
def test_the_clock_is_changed(corpus, reference, tmp_path, days):
    """Between two processes, and the times of all files with it."""
    process = start(corpus, tmp_path, ("-c", KILLER, "in a step", "30", "0"))
    assert finished(process)[0] == -signal.SIGKILL
    for path in [*tmp_path.rglob("*"), *corpus.rglob("*")]:
        os.utime(path, (time.time() + days * 86400,) * 2)
    clock = f"import time, runpy; real = time.time; time.time = lambda: real() + {-days * 86400}; "
    run(corpus, tmp_path, script=("-c", clock + "runpy.run_path('train.py', run_name='__main__')"))
    assert_same(tmp_path, reference)
    report(f"files {days:+} days, clock {-days:+} days", 1, "bit-equal")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_of_four_is_lost(corpus, tmp_path):
    fields = {
        **LONG,
        "data.source": str(corpus),
        "data.validation_fraction": 0.2,
        "mesh.data": 4,
        "mesh.tensor": 2,
        "train.num_steps": 40,
    }
    with processes([fields] * 4, tmp_path / "whole") as started:
        statuses, errors = finish(started, timeout=280)
    assert statuses == [0] * 4, errors
    with processes([fields] * 4, tmp_path / "run") as started:
        wait_for_rows(tmp_path / "run", 10)
        started[2].kill()
        before = time.monotonic()
        statuses_after, errors = finish(started, timeout=280)
        seconds = time.monotonic() - before
    assert statuses_after[2] == -signal.SIGKILL and 0 not in statuses_after, errors
    with processes([fields] * 4, tmp_path / "run") as started:
        statuses, errors = finish(started, timeout=280)
    assert statuses == [0] * 4 and "resuming at step" in errors[0], errors
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    report(
        "one of four processes killed",
        1,
        f"the others ended {seconds:.0f} s later, statuses {statuses_after}; all four started "
        "again",
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_hang_and_later_lose_their_disk(corpus, tmp_path):
    """One is stopped, so that the other waits in a collective; then both are killed, and the
    workdir is gone but for the mirror.
    """
    fields = {
        **LONG,
        "data.source": str(corpus),
        "data.validation_fraction": 0.2,
        "mesh.expert": 2,
        "train.num_steps": 60,
    }
    with processes([fields] * 2, tmp_path / "whole") as started:
        statuses, errors = finish(started)
    assert statuses == [0] * 2, errors
    fields |= {"checkpoint.mirror": f"file://{tmp_path}/bucket", "train.watchdog_minutes": 0.1}
    stacks = tmp_path / "run" / "stacks-0.txt"
    with processes([fields] * 2, tmp_path / "run") as started:
        wait_for_rows(tmp_path / "run", 10)
        stacks.unlink(missing_ok=True)  # it may have been compiling for long
        started[1].send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while not (stacks.is_file() and "in run\n" in stacks.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        started[1].send_signal(signal.SIGCONT)
        wait_for_rows(tmp_path / "run", 25)
        for process in started:
            process.kill()
    text = stacks.read_text()
    assert "process 0 of 2 has done" in text and "Thread MainThread" in text
    shutil.rmtree(tmp_path / "run")
    kept = max(finished_steps(tmp_path / "bucket"))
    with processes([fields] * 2, tmp_path / "run") as started:
        statuses, errors = finish(started)
    assert (
        statuses == [0] * 2
        and f"checkpoint {kept} was brought back from file://{tmp_path}/bucket" in errors[0]
    ), errors
    found, expected = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert found == {step: expected[step] for step in range(kept + 1, 61)}
    report(
        "one of two processes hangs (SIGSTOP)",
        1,
        "the other's watchdog wrote its stacks; both went on after SIGCONT",
    )
    report("both killed, workdir deleted", 1, f"went on from step {kept} of the mirror")


def wait_for_line(process, *texts):
    """Reads its standard error until a line has one of the texts."""
    for line in process.stderr:
        if any(text in line for text in texts):
            return
    raise AssertionError(f"{texts} did not come")


def wait_for_rows(workdir, count):
    deadline = time.monotonic() + 200
    path = workdir / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.is_file() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{count} rows did not come")


@contextlib.contextmanager
def tmpfs(folder, size):
    """A small filesystem in memory."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
