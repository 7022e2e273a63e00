"""One run on several processes over loopback, two CPU devices each: the same numbers as one
process, and everyone stops together.
"""

import json
import re
import runpy
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from hunyuan_jax import from_pretrained
from hunyuan_jax.config import MeshConfig, from_config_dict, to_dict
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.parallel import hosts, mesh, rules
from hunyuan_jax.train import loop
from support import paths
from support.processes import NUM_STEPS, SMALL, finish, losses, processes, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def fields_of(corpus, **fields):
    mesh_fields = {"mesh.data": 2, "mesh.expert": 2}
    return {
        **SMALL,
        "data.source": str(corpus),
        "data.validation_fraction": 0.2,
        **mesh_fields,
        **fields,
    }


def config_of(fields):
    recipe = runpy.run_path(str(paths.ROOT / "configs" / "tiny.py"))["get_config"]()
    recipe.update_from_flattened_dict(fields)
    return from_config_dict(recipe)


def run_here(fields, workdir, num_devices):
    """The same run in this process, on the first few of its eight devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop, "make_mesh", lambda cfg: mesh.make_mesh(cfg, jax.devices()[:num_devices])
        )
        assert loop.run(config_of(fields), workdir) == 0


def assert_same_losses(workdir, reference):
    actual, expected = losses(workdir), losses(reference)
    assert list(actual) == list(expected) == list(range(1, NUM_STEPS + 1))
    for step in range(1, NUM_STEPS + 1):
        assert actual[step] == pytest.approx(expected[step], rel=1e-4), step


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """The run on one process with four devices."""
    workdir = tmp_path_factory.mktemp("reference")
    run_here(fields_of(corpus), workdir, 4)
    return workdir


@pytest.mark.heavy
def test_two_processes_train_like_one(corpus, reference, tmp_path):
    with processes([fields_of(corpus)] * 2, tmp_path / "run") as started:
        statuses, errors = finish(started)
    assert statuses == [0, 0], errors
    assert "4 device(s)" in errors[0] and f"step {NUM_STEPS}/{NUM_STEPS}" in errors[0]
    assert "step" not in errors[1]  # one process speaks for all
    assert_same_losses(tmp_path / "run", reference)
    assert "validation_loss" in losses(reference)[NUM_STEPS]
    assert len(list((tmp_path / "run" / "tensorboard").glob("events*"))) == 1
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")) == [
        "2",
        "4",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["workdir", "folder"])
def test_two_processes_start_from_weights_like_one(corpus, reference, tmp_path, kind):
    if kind == "folder":
        from_pretrained(reference, dtype="float32").save_pretrained(tmp_path / "model")
    source = {"workdir": reference, "folder": tmp_path / "model"}[kind]
    fields = fields_of(corpus, **{"train.init_from": str(source), "data.validation_fraction": 0.0})
    run_here(fields, tmp_path / "one", 4)
    with processes([fields] * 2, tmp_path / "two") as started:
        statuses, errors = finish(started)
    assert statuses == [0, 0], errors
    assert_same_losses(tmp_path / "two", tmp_path / "one")
    assert (
        losses(tmp_path / "two")[1]["loss"] < losses(reference)[1]["loss"] - 0.05
    )  # it does start from them


@pytest.mark.slow
def test_checkpoint_of_four_processes_continues_on_one_with_another_mesh(corpus, tmp_path):
    no_validation = {"data.validation_fraction": 0.0}  # one program less to compile, four times
    with processes(
        [fields_of(corpus, **no_validation, **{"mesh.tensor": 2})] * 4, tmp_path / "run"
    ) as started:
        statuses, errors = finish(started)
    assert statuses == [0] * 4, errors
    run_here(fields_of(corpus, **no_validation), tmp_path / "reference", 4)
    assert_same_losses(tmp_path / "run", tmp_path / "reference")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")) == [
        "2",
        "4",
    ]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    run_here(fields_of(corpus, **no_validation), tmp_path / "run", 4)
    assert_same_losses(tmp_path / "run", tmp_path / "reference")


@pytest.mark.heavy
def test_workdir_of_another_run_stops_all(corpus, tmp_path):
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    config = config_of(fields_of(corpus, **{"train.seed": 7}))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    with processes([fields_of(corpus)] * 2, tmp_path) as started:
        statuses, errors = finish(started)
    assert statuses == [2, 2], errors
    message = "holds checkpoints made with config.train.seed = 7; now it is 0."
    assert f"error: {tmp_path} {message}" in errors[0]
    assert f"error: process 0 of 2 has stopped: {tmp_path} {message}" in errors[1]


@pytest.mark.heavy
def test_different_commands_stop_all(corpus, tmp_path):
    with processes(
        [fields_of(corpus), fields_of(corpus, **{"train.num_steps": 5})], tmp_path
    ) as started:
        statuses, errors = finish(started)
    assert statuses == [2, 2], errors
    for error in errors:
        assert "processes [1] see another config than process 0" in error
    assert not (tmp_path / "checkpoints").exists()


PERMUTED = """
import jax, numpy, runpy
from hunyuan_jax.parallel import mesh
from hunyuan_jax.train import loop

def permuted(cfg):
    devices = jax.devices()
    return mesh.make_mesh(cfg, [devices[i] for i in (0, 2, 1, 3)])

loop.make_mesh = permuted
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_rows_that_are_not_consecutive(corpus, reference, tmp_path):
    """As on a torus: each process holds every second part of the batch."""
    with processes([fields_of(corpus)] * 2, tmp_path, ("-c", PERMUTED)) as started:
        statuses, errors = finish(started)
    assert statuses == [0, 0], errors
    assert_same_losses(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "statuses_expected"), [(signal.SIGTERM, [0, 0]), (signal.SIGINT, [0, 130])]
)
def test_signal_to_one_stops_all_and_the_same_command_continues(
    corpus, tmp_path, number, statuses_expected
):
    fields = fields_of(
        corpus,
        **{"train.num_steps": 100_000, "checkpoint.every": 100_000, "train.eval_every": 100_000},
    )
    last_step = 0
    for _ in range(2):
        with processes([fields] * 2, tmp_path) as started:
            wait_for_step(tmp_path, last_step + 2, started)
            started[1].send_signal(number)
            statuses, errors = finish(started)
        assert statuses == statuses_expected, errors
        if last_step:
            assert f"resuming at step {last_step}" in errors[0]
        saved = [int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")]
        steps = list(losses(tmp_path))
        assert steps == list(range(1, max(saved) + 1))
        assert max(saved) > last_step
        assert re.search(
            rf"SIGTERM: saved step {max(saved)} in [\d.]+ s; the same command continues", errors[0]
        )
        last_step = max(saved)


@pytest.mark.slow
def test_non_finite_loss_stops_all(corpus, tmp_path):
    fields = fields_of(
        corpus,
        **{"schedule.peak_lr": 1e30, "schedule.warmup_steps": 0, "train.max_skipped_steps": 2},
    )
    with processes([fields] * 2, tmp_path) as started:
        statuses, errors = finish(started)
    assert statuses == [2, 2], errors
    for error in errors:
        assert "2 steps in a row were skipped, up to step 3: loss nan" in error
    assert "step 2 was skipped: loss nan, gradient norm nan; documents: text/" in errors[0]


def wait_for_step(workdir, step, started):
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and all(process.poll() is None for process in started):
        if (workdir / "metrics.jsonl").is_file() and f'{{"step": {step},' in (
            workdir / "metrics.jsonl"
        ).read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached: {[process.poll() for process in started]}")


# Which rows a process holds


def test_rows_follow_from_the_mesh():
    devices = jax.devices()[:4]
    sharding = rules.sharding(
        mesh.make_mesh(MeshConfig(data=2, tensor=2), devices), ("batch", "seq")
    )
    np.testing.assert_array_equal(
        hosts.process_rows(sharding, (6, 3)), np.arange(6)
    )  # this process holds all
    made = hosts.global_batch(
        {"tokens": np.ones((6, 3))}, {"tokens": sharding}, {"tokens": (6, 3)}
    )
    assert made["tokens"].sharding == sharding


# Joining


@pytest.fixture
def calls(monkeypatch):
    """Arguments of the calls of jax.distributed.initialize; the environment is free of what
    launchers set.
    """
    for name in (
        *mesh._EXPLICIT,
        *mesh._SLURM,
        *mesh._TPU_WORKERS,
        "OMPI_COMM_WORLD_SIZE",
        "KUBERNETES_SERVICE_HOST",
    ):
        monkeypatch.delenv(name, raising=False)
    made = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: made.append(arguments))
    return made


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "a[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
TOLD = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
TOLD_ARGUMENTS = {
    "coordinator_address": "host:1234",
    "num_processes": 4,
    "process_id": 3,
    "cluster_detection_method": "deactivate",
}


@pytest.mark.parametrize(
    ("env", "has_tpu", "expected"),
    [
        ({}, False, []),
        (TOLD, False, [TOLD_ARGUMENTS]),
        (
            {**TOLD, "TPU_WORKER_HOSTNAMES": "a,b"},
            True,
            [TOLD_ARGUMENTS],
        ),  # what the user says comes first
        (SLURM, False, [{}]),
        ({**SLURM, "SLURM_NTASKS": "1"}, False, []),
        (
            {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"},
            False,
            [],
        ),  # a batch script, not srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, False, [{}]),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False, []),
        ({"KUBERNETES_SERVICE_HOST": "k", "JOB_COMPLETION_INDEX": "0"}, False, [{}]),
        ({"KUBERNETES_SERVICE_HOST": "k"}, False, []),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, [{}]),  # GKE
        (
            {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_COORDINATOR_ADDRESS": "a:1"},
            True,
            [{}],
        ),  # jax reads the address itself
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, []),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, []),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True, [{}]),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, []),  # Colab
        ({}, True, [{}]),  # a TPU VM: its metadata server knows
    ],
)
def test_processes_are_joined_only_where_there_are_several(
    monkeypatch, calls, env, has_tpu, expected
):
    monkeypatch.delenv(
        "TPU_SKIP_MDS_QUERY", raising=False
    )  # jax sets it on a machine without TPUs
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mesh, "_has_tpu", lambda: has_tpu)
    mesh.join_processes()
    assert calls == expected


@pytest.mark.parametrize(
    "change",
    [
        {"JAX_COORDINATOR_ADDRESS": None},
        {"JAX_NUM_PROCESSES": None},
        {"JAX_PROCESS_ID": None},
        {"JAX_NUM_PROCESSES": None, "JAX_PROCESS_ID": None},
        {"JAX_PROCESS_ID": "4"},
        {"JAX_PROCESS_ID": "-1"},
        {"JAX_NUM_PROCESSES": "four"},
        {"JAX_COORDINATOR_ADDRESS": "host"},
    ],
)
def test_incomplete_or_wrong_variables_are_refused(monkeypatch, calls, change):
    for name, value in {**TOLD, **change}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    name, value = next(iter(change.items()))
    stated = f"{name} is not set" if value is None else f"{name} = '{value}'"
    with pytest.raises(
        ConfigError, match=rf"{stated}.*: all three are needed, .*Set them on every host"
    ):
        mesh.join_processes()
    assert not calls


def test_a_failure_to_join_comes_through(monkeypatch, calls):
    def fail(**arguments):
        raise RuntimeError("deadline exceeded")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError,
        match=r"JAX_NUM_PROCESSES = 4.*joining them failed: deadline exceeded Start the same "
        r"command",
    ):
        mesh.join_processes()


def test_nothing_is_asked_of_a_machine_without_tpus():
    assert not mesh._has_tpu()
