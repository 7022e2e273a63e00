"""A small mixture, a batch and parameters for tests of single training steps.

Letters: B batch, T tokens.
"""

import functools

import jax
import numpy as np

from hunyuan_jax.config import (
    CheckpointConfig,
    Config,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from hunyuan_jax.train.state import build_program
from support.models import mesh_of

BATCH, LENGTH = 8, 12

MODEL = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    max_position=LENGTH,
    pad_token_id=0,
    moe=MoeConfig(
        num_experts=4,
        num_shared_experts=1,
        dispatch="dropless",
        aux_loss_weight=0.05,
        z_loss_weight=0.01,
    ),
)


def config_for(model=MODEL, state_dtype="float32", **train):
    return Config(
        model=model,
        optimizer=OptimizerConfig(state_dtype=state_dtype, spike_factor=100.0, spike_after=3),
        schedule=ScheduleConfig(peak_lr=3e-3, warmup_steps=0),
        train=TrainConfig(**{"num_steps": 3, "batch_size": BATCH, "seq_len": LENGTH} | train),
        checkpoint=CheckpointConfig(keep=1),
    )


@functools.cache
def batch():
    """Returns a batch with padding, rows of two documents, and 0 to 12 targets per row."""
    rng = np.random.default_rng(0)
    tokens_BT, targets_BT = rng.integers(1, MODEL.vocab_size, (2, BATCH, LENGTH)).astype(np.int32)
    segments_BT = np.ones((BATCH, LENGTH), np.int32)
    segments_BT[1, 5:], segments_BT[4, 9:], segments_BT[6, 4:] = 0, 0, 2
    weights_BT = (segments_BT > 0) * (
        np.arange(LENGTH) < np.asarray([12, 5, 0, 3, 9, 1, 12, 0])[:, None]
    )
    return {
        "tokens": np.where(segments_BT > 0, tokens_BT, 0),
        "targets": targets_BT,
        "segment_ids": segments_BT,
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_BT.shape),
        "loss_weights": weights_BT.astype(np.float32),
    }


@functools.cache
def initial_params():
    """Returns the float32 parameters of every variant of MODEL as numpy arrays."""
    rng = np.random.default_rng(0)

    def fill(path, tap):
        return (("norm" in jax.tree_util.keystr(path)) + 0.3 * rng.normal(size=tap.shape)).astype(
            np.float32
        )

    return jax.tree.map_with_path(fill, build_program(config_for(), mesh_of()).taps)
