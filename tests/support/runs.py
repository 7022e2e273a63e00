"""A small model, text files and a config for tests that run the training loop."""

import contextlib
import dataclasses
import json

import pytest

from hunyuan_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from hunyuan_jax.parallel import mesh
from hunyuan_jax.train import loop
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.pretrain import Pretrain

MODEL = ModelConfig(
    vocab_size=259,
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=64,
    cla_share_factor=1,
    attention_dropout=0.1,
    hidden_dropout=0.1,
    pad_token_id=258,
    bos_token_id=256,
    eos_token_ids=(257,),
    moe=MoeConfig(
        num_experts=4,
        num_shared_experts=1,
        dispatch="recycle",
        aux_loss_weight=0.01,
        z_loss_weight=0.001,
    ),
)


def write_corpus(folder):
    for i in range(12):
        (folder / f"{i}.txt").write_text(
            "".join(f"line {j} of file {i}: abcabcabc\n" for j in range(20))
        )
    return folder


@contextlib.contextmanager
def on_one_device():
    """Makes `loop.run` use one of the eight devices, whatever the config's mesh is.

    Runs of pre-training that compute the same share their programs: tracing and compiling them
    again is what most of the time of such tests would go into.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda _: mesh.single_device_mesh())
        for name in ("make_train_step", "make_eval_step"):
            patch.setattr(step_lib, name, _shared(getattr(step_lib, name)))
        yield


def _shared(make_step):
    """As `make_step`, which makes one step for all programs that compute the same."""
    steps = {}

    def make(program):
        config = program.config
        if type(program.objective) is not Pretrain:
            return make_step(program)
        # What only the loop reads is left out.
        idle = {"log_every": 1, "eval_every": 1, "watchdog_minutes": 0.0, "init_from": ""}
        train = dataclasses.replace(config.train, **idle)
        key = (config.model, config.optimizer, config.schedule, train)
        if key not in steps:
            steps[key] = make_step(program)
        return steps[key]

    return make


def config_for(corpus, **train):
    train = {
        "num_steps": 6,
        "batch_size": 2,
        "seq_len": 32,
        "log_every": 1,
        "eval_every": 3,
        "eval_batches": 2,
    } | train
    return Config(
        model=MODEL,
        mesh=MeshConfig(),
        data=DataConfig(source=str(corpus), validation_fraction=0.1),
        optimizer=OptimizerConfig(),
        schedule=ScheduleConfig(peak_lr=3e-3, warmup_steps=2),
        train=TrainConfig(**train),
        checkpoint=CheckpointConfig(every=2, keep=2),
    )


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows(workdir) if "loss" in row}
