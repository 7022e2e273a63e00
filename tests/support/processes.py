"""Starts, kills and waits for training runs in their own processes."""

import contextlib
import json
import os
import socket
import subprocess
import sys

from support import paths

# XLA flags of the tests (conftest.py), which save a process half of its compilation, with one
# device, as a user's process has, and with two; the last flag counts.
ONE_DEVICE = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
XLA_FLAGS = " ".join(
    [
        os.environ["XLA_FLAGS"],
        "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
    ]
)

# Seconds that a test waits for a process on a busy machine; a test may take 300 (pyproject.toml).
PATIENCE = 270

# A run of a few steps.
NUM_STEPS = 4
SMALL = {
    "model.num_layers": 1,
    "model.cla_share_factor": 1,
    "model.hidden_size": 32,
    "model.intermediate_size": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.remat": "none",
    "schedule.warmup_steps": 2,
    "train.num_steps": NUM_STEPS,
    "train.batch_size": 8,
    "train.seq_len": 16,
    "train.log_every": 1,
    "train.eval_every": NUM_STEPS,
    "train.eval_batches": 2,
    "checkpoint.every": 2,
}


def write_corpus(folder):
    for i in range(30):
        (folder / f"{i}.txt").write_text(
            "".join(f"line {j} of file {i}: {'abc' * i}\n" for j in range(20))
        )
    return folder


def environments(num, xla_flags=XLA_FLAGS):
    """The environment of each of so many processes that meet on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(num),
        "XLA_FLAGS": xla_flags,
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    }
    return [env | {"JAX_PROCESS_ID": str(index)} for index in range(num)]


@contextlib.contextmanager
def processes(fields_of_each, workdir, script=("train.py",)):
    """Runs `python train.py` once for each dict of config fields.

    Kills the processes that are still running at the end of the block.
    """
    started = []
    try:
        for env, fields in zip(environments(len(fields_of_each)), fields_of_each, strict=True):
            overrides = [f"--config.{name}={value}" for name, value in fields.items()]
            command = [
                sys.executable,
                *script,
                "--config=configs/tiny.py",
                *overrides,
                f"--workdir={workdir}",
            ]
            started.append(
                subprocess.Popen(
                    command,
                    cwd=paths.ROOT,
                    env=env,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def finish(started, timeout=PATIENCE):
    """Returns (exit statuses, standard errors) of the processes."""
    errors = [process.communicate(timeout=timeout)[1] for process in started]
    return [process.returncode for process in started], errors


def losses(workdir):
    """Returns {step: [losses and gradient norm]} of the metrics that a run wrote.

    Asserts that no step was written twice.
    """
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for row in rows:
        values = {
            name: row[name] for name in ("loss", "grad_norm", "validation_loss") if name in row
        }
        assert not found.get(row["step"], {}).keys() & values.keys()
        found.setdefault(row["step"], {}).update(values)
    return found


# For `start`: a run that is long enough to be killed while it trains.
LONG = SMALL | {
    "model.hidden_size": 64,
    "model.intermediate_size": 128,
    "train.num_steps": 150,
    "train.eval_every": 25,
    "checkpoint.every": 4,
    "checkpoint.keep": 3,
    "mesh.data": 2,
}


# Kills its own process, as kill -9 does, so many seconds after the n-th call of a function.
KILLER = """
import itertools, os, runpy, signal, sys, threading
from types import SimpleNamespace as Namespace
from hunyuan_jax.checkpoint.store import Store
from hunyuan_jax.data.loader import PackedRows
from hunyuan_jax.infer.engine import Engine
from hunyuan_jax.train import step

place, n, delay = sys.argv.pop(1), int(sys.argv.pop(1)), float(sys.argv.pop(1))
calls = itertools.count(1)

def armed(function):
    def wrapper(*args, **kwargs):
        if next(calls) == n:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return function(*args, **kwargs)
    return wrapper

if place == "in a step":
    make = step.make_train_step
    def make_armed(program):
        lower = make(program).lower
        return Namespace(
            lower=lambda *args: Namespace(compile=lambda: armed(lower(*args).compile()))
        )
    step.make_train_step = make_armed
elif place == "in the data worker":
    PackedRows.batch = armed(PackedRows.batch)
elif place == "in a rollout":
    Engine.run = armed(Engine.run)
elif place == "in the save":
    Store._write = armed(Store._write)
elif place == "in the checksums":
    Store._finish = armed(Store._finish)
runpy.run_path("train.py", run_name="__main__")
"""


def start(corpus, workdir, script=("train.py",), **fields):
    """Starts one process with two devices."""
    fields = {**LONG, "data.source": str(corpus), "data.validation_fraction": 0.2, **fields}
    command = [sys.executable, *script, "--config=configs/tiny.py", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    flags = {
        "XLA_FLAGS": XLA_FLAGS,
        # Otherwise each process compiles the same programs for seconds.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command, cwd=paths.ROOT, env={**os.environ, **flags}, stderr=subprocess.PIPE, text=True
    )


def finished(process):
    """Waits for a process; returns its exit status and standard error."""
    error = process.communicate(timeout=200)[1]
    return process.returncode, error


def run(corpus, workdir, **arguments):
    """Runs a training that must succeed; returns its standard error."""
    status, error = finished(start(corpus, workdir, **arguments))
    assert status == 0, error
    return error
