"""A workdir has one owner: in real processes, one of which is killed."""

import os
import signal
import subprocess
import sys

import pytest

from hunyuan_jax.checkpoint import owner
from hunyuan_jax.checkpoint.owner import owned
from hunyuan_jax.errors import ConfigError
from support import paths

HOLD = """
import signal, sys, time
from hunyuan_jax.checkpoint.owner import owned

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
with owned(sys.argv[1], print, boot=sys.argv[2] or None, lease=float(sys.argv[3])):
    print("owned", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def hold():
    """Starts a process that owns a workdir, on another machine if `boot` names one."""
    started = []

    def start(workdir, boot="", lease=90.0):
        command = [sys.executable, "-c", HOLD, str(workdir), boot, str(lease)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=paths.ROOT)
        started.append(process)
        assert process.stdout.readline() == "owned\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_while_the_first_lives_and_not_after_a_kill(tmp_path, hold):
    first = hold(tmp_path / "run")
    with (
        pytest.raises(ConfigError, match=rf"run is in use by process {first.pid} on .*another --"),
        owned(tmp_path / "run", pytest.fail),
    ):
        pass
    assert os.listdir(tmp_path / "run") == [owner.FILE]
    first.kill()
    first.wait()
    with owned(tmp_path / "run", pytest.fail) as require:  # at once: nothing to wait for
        require()
        assert owner.owner_id(tmp_path / "run")
        with pytest.raises(ConfigError, match="in use"), owned(tmp_path / "run", pytest.fail):
            pass
    with owned(tmp_path / "run", pytest.fail):
        pass


def without_locks(monkeypatch):
    """As on a file system that does not pass locks on."""
    monkeypatch.setattr(owner.fcntl, "flock", lambda *_: None)


def test_an_owner_on_another_machine_lives_as_long_as_it_beats(tmp_path, hold, monkeypatch):
    without_locks(monkeypatch)
    lines = []
    first = hold(tmp_path, "elsewhere", 1.0)
    with pytest.raises(ConfigError, match="in use by"), owned(tmp_path, lines.append, lease=60.0):
        pass
    first.kill()
    first.wait()
    with owned(tmp_path, lines.append, lease=0.5):
        pass
    assert len(lines) == 2 and "waiting up to" in lines[1]
    second = hold(tmp_path, "elsewhere", 1.0)
    second.send_signal(signal.SIGINT)  # ends it in order: nobody waits for it
    second.wait()
    with owned(tmp_path, pytest.fail):
        pass


def test_a_run_that_slept_too_long_notices_that_another_took_over(tmp_path, hold, monkeypatch):
    without_locks(monkeypatch)
    with owned(tmp_path, print) as require:
        (tmp_path / owner.FILE).write_text("")
        second = hold(tmp_path, "elsewhere")
        with pytest.raises(ConfigError, match=rf"taken over by process {second.pid}.*without"):
            require()
    assert owner.owner_id(tmp_path)  # the other's


def test_a_refused_start_leaves_no_workdir(tmp_path):
    def refuse():
        with owned(tmp_path / "a/b", pytest.fail):
            (tmp_path / "a/b/checkpoints").mkdir()
            raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        refuse()
    assert os.listdir(tmp_path) == []
    (tmp_path / "c").mkdir()
    with owned(tmp_path / "c", pytest.fail):
        pass
    assert os.listdir(tmp_path / "c") == [owner.FILE]
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="cannot be written to: Not a directory"),
        owned(tmp_path / "file/run", pytest.fail),
    ):
        pass
