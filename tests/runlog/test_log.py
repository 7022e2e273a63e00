"""The rows that a run writes for its steps."""

import json

import jax.numpy as jnp
import pytest

from hunyuan_jax import presets
from hunyuan_jax.config import Config, ScheduleConfig, TrainConfig
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.runlog.log import Log, Work
from hunyuan_jax.runlog.metrics import MetricsWriter
from pallas_kernels import chips


def metrics_of(**changes):
    values = {"loss": 2.0, "grad_norm": 1.0, "num_updates": 0, "num_skipped": 0} | changes
    return {name: jnp.asarray(value) for name, value in values.items()}


def test_a_row_has_the_objectives_figures_and_the_speed_of_its_work(tmp_path, monkeypatch):
    monkeypatch.setattr(chips, "peak_flops", lambda kind: 1e6)  # a CPU's is not known
    mesh = single_device_mesh()
    config = Config(
        presets.tiny(),
        schedule=ScheduleConfig(warmup_steps=0),
        train=TrainConfig(num_steps=1, log_every=1),
    )
    log = Log(config, tmp_path)
    work = Work(parameters=10, active_parameters=8, flops_per_token=50, tokens_per_step=64)
    log.open(0, mesh, lambda num_updates: jnp.float32(0.5), work)
    log.start(0, 0, mesh)
    with log.running(1):
        pass
    assert log.step(1, metrics_of(**{"objective/accuracy": 0.75, "objective/margin": jnp.nan}))
    log.stop(is_finished=True)
    log.close()
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["accuracy"] == 0.75 and row["margin"] is None
    assert row["learning_rate"] == 0.5
    assert row["tokens_per_second"] * row["seconds_per_step"] == pytest.approx(64)
    assert row["mfu"] == pytest.approx(50 * row["tokens_per_second"] / 1e6)


def test_a_number_that_is_not_finite_is_null_in_every_row(tmp_path):
    config = Config(presets.tiny())
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n')  # of an earlier version
    writer = MetricsWriter(tmp_path, 1, config)
    writer.write(2, {"moe/load": [[0.5, float("nan")]], "validation_loss": float("inf"), "x": 1.0})
    writer.close()
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # called for NaN and Infinity
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {"step": 1, "loss": None}
    assert second == {"step": 2, "moe/load": [[0.5, None]], "validation_loss": None, "x": 1.0}
