"""Fine-tuning and preferences with a row over several chips: gradients, loss and metrics of one
chip, with adapters.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from hunyuan_jax.config import (
    Config,
    DpoConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    ScheduleConfig,
    TrainConfig,
)
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.post.build import build_objective
from hunyuan_jax.train import step
from hunyuan_jax.train.state import build_program, init_state
from support.models import assert_close, fast_jit, mesh_of

LENGTH = 16
CONFIG = Config(
    model=ModelConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_position=LENGTH,
        lora=LoraConfig(rank=2),
    ),
    schedule=ScheduleConfig(warmup_steps=0),
    train=TrainConfig(num_steps=2, batch_size=4, seq_len=LENGTH),
)


@functools.cache
def initial_params():
    params = init_state(build_program(CONFIG, single_device_mesh())).params
    rng = np.random.default_rng(0)
    # An adapter begins as zero: half of its gradients would be zero too.
    return jax.tree.map(lambda w: w + rng.normal(0, 0.1, w.shape).astype(w.dtype), params)


def batch_of(objective):
    """Random tokens in two documents a row, of which some are learned."""
    batch = objective.random_batch()
    rng = np.random.default_rng(1)
    batch["segment_ids"][:, : LENGTH // 2] = 1
    batch["segment_ids"][:, LENGTH // 2 :] = 2
    positions_T = np.arange(LENGTH, dtype=np.int32) % (LENGTH // 2)
    return batch | {
        "positions": np.broadcast_to(positions_T, batch["tokens"].shape),
        "loss_weights": (rng.random(batch["tokens"].shape) < 0.6).astype(np.float32),
    }


def gradients(config, mesh):
    program = build_program(config, mesh, build_objective)
    params = jax.device_put(initial_params(), program.shardings.params)
    compute = fast_jit(functools.partial(step.gradients, program))
    batch = step.place_batch(program, batch_of(program.objective))
    return jax.tree.map(np.asarray, compute(params, batch, jax.random.key(0)))


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(name="sft"),
        ObjectiveConfig(name="dpo", dpo=DpoConfig(reference="adapter_off", sft_weight=0.3)),
    ],
    ids=lambda objective: objective.name,
)
@pytest.mark.heavy
def test_two_chips_a_row_give_the_gradients_of_one(objective):
    config = dataclasses.replace(CONFIG, objective=objective)
    found = gradients(config, mesh_of(context=2))
    expected = gradients(config, single_device_mesh())
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    for name, value in expected[2].sums.items():
        np.testing.assert_allclose(found[2].sums[name], value, rtol=1e-5, atol=1e-6)
    jax.tree.map(functools.partial(assert_close, tolerance=2e-5), found[0], expected[0])
    assert all(np.any(gradient) for gradient in jax.tree.leaves(expected[0]))
