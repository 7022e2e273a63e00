"""A small model, text files and a config for tests that run the training loop."""

import contextlib
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

MODEL = ModelConfig(
    vocab_size=259,
    hidden_size=32,
    intermediate_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=64,
    cla_share_factor=2,
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
    """Makes `loop.run` use one of the eight devices, whatever the config's mesh is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda _: mesh.single_device_mesh())
        yield


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
