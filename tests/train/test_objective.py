"""Objectives: what the train step, the loop and the plan ask of any of them.

Letters: B batch, T tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.checkpoint import manifest
from hunyuan_jax.config import (
    Config,
    ModelConfig,
    ScheduleConfig,
    TrainConfig,
)
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.post.build import build_objective
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.evaluate import evaluate
from hunyuan_jax.train.objective import Field, LossMetrics
from hunyuan_jax.train.pretrain import Pretrain
from hunyuan_jax.train.state import build_program, init_state
from support.models import assert_close, fast_jit, mesh_of

NUM_PAIRS, LENGTH = 8, 8
MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    max_position=LENGTH,
)


def config_for(**train):
    return Config(
        model=MODEL,
        schedule=ScheduleConfig(warmup_steps=0),
        train=TrainConfig(**{"num_steps": 2, "batch_size": NUM_PAIRS, "seq_len": LENGTH} | train),
    )


class Preferences:
    """An objective unlike pre-training: pairs of answers, and one number for each from a reference
    model.  The loss is that of direct preference optimisation (arXiv 2305.18290) at beta 1.
    """

    def __init__(self, config):
        shape = (config.train.batch_size, 2, config.train.seq_len)
        self.batch_spec = {
            **dict.fromkeys(
                ("tokens", "targets"), Field(shape, "int32", ("batch", "example_rows", "seq"))
            ),
            "reference": Field(shape[:2], "float32", ("batch", "example_rows")),
        }
        self.eval_spec = self.batch_spec

    def constants(self, mesh):
        return {}

    def read_constants(self, mesh):
        return {}

    def totals(self, batch):
        return {"pairs": jnp.float32(batch["reference"].shape[0])}

    def loss(self, model, batch, totals, key):
        tokens, targets = (
            batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "targets")
        )
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        output = model(tokens, positions, jnp.ones_like(tokens), key=key, is_training=True)
        log_probs = -model.token_losses(output.hidden_BTD, targets).sum(-1).reshape(-1, 2)
        margin = (log_probs - batch["reference"]) @ jnp.array([1.0, -1.0])
        sums = {"accuracy": (margin > 0).astype(jnp.float32).sum() / totals["pairs"]}
        loss = -jax.nn.log_sigmoid(margin).sum() / totals["pairs"]
        return loss, LossMetrics(sums, output.stats)

    def evaluate(self, model, batch):
        one = {"pairs": jnp.float32(1)}
        loss, metrics = self.loss(model, batch, one, None)
        return {"loss": loss, **self.totals(batch), **metrics.sums}


def pairs():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, MODEL.vocab_size, (NUM_PAIRS, 2, LENGTH + 1)).astype(np.int32)
    return {
        "tokens": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "reference": rng.normal(-46, 1, (NUM_PAIRS, 2)).astype(np.float32),
    }


def program_of(num_micro_batches, sizes):
    config = config_for(grad_accum_steps=num_micro_batches)
    program = build_program(config, mesh_of(*sizes))
    return program._replace(objective=Preferences(config))


@functools.cache
def params():
    program = build_program(config_for(), single_device_mesh())
    return jax.tree.map(np.asarray, init_state(program).params)


@functools.cache
def measured(num_micro_batches, sizes):
    """(gradients, loss, accuracy)"""
    program = program_of(num_micro_batches, sizes)
    placed = jax.device_put(params(), program.shardings.params)
    batch = step_lib.place_batch(program, pairs())
    compute = fast_jit(functools.partial(step_lib.gradients, program))
    grads, loss, metrics = compute(placed, batch, jax.random.key(0))
    return grads, loss, metrics.sums["accuracy"]


@pytest.mark.cases(1)
@pytest.mark.parametrize(("num_micro_batches", "sizes"), [(2, (1, 1, 1)), (2, (2, 1, 1))])
def test_pairs_are_the_same_in_micro_batches_and_on_a_mesh(num_micro_batches, sizes):
    whole, split = measured(1, (1, 1, 1)), measured(num_micro_batches, sizes)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), split, whole)


def test_an_evaluation_adds_up_micro_batches():
    program = program_of(2, (1, 1, 1))
    sums = step_lib.make_eval_step(program)(params(), step_lib.place_batch(program, pairs()))
    _, loss, accuracy = measured(1, (1, 1, 1))
    expected = {"loss": NUM_PAIRS * loss, "pairs": NUM_PAIRS, "accuracy": NUM_PAIRS * accuracy}
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5)


def test_metrics_of_a_step_have_the_objectives_sums():
    program = program_of(2, (1, 1, 1))
    batch = step_lib.abstract_batch(program)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        name: (a.shape, a.dtype) for name, a in pairs().items()
    }
    metrics = jax.eval_shape(step_lib.make_train_step(program), program.state, batch)[1]
    assert metrics["objective/accuracy"].shape == ()


def test_an_examples_pair_is_not_split_over_the_mesh():
    sharding = step_lib.abstract_batch(program_of(1, (4, 1, 1)))["reference"].sharding
    assert sharding.shard_shape((NUM_PAIRS, 2)) == (2, 2)


# Pre-training


def test_a_random_batch_is_what_the_spec_says():
    objective = build_objective(config_for())
    assert {
        name: (array.shape, str(array.dtype)) for name, array in objective.random_batch().items()
    } == {name: (field.shape, field.dtype) for name, field in objective.batch_spec.items()}


def test_evaluation_is_over_all_targets():
    sums = {
        "a": {"nats": 30.0, "targets": 10.0, "bytes": 20.0},
        "b": {"nats": 10.0, "targets": 10.0, "bytes": 12.0},
    }
    found = evaluate(
        Pretrain(config_for()), lambda _, name: sums[name], None, ["a", "b"], lambda: False
    )
    assert found["validation_loss"] == 2.0
    assert found["validation_perplexity"] == pytest.approx(np.exp(2.0))
    assert found["validation_bits_per_byte"] == pytest.approx(40 / np.log(2) / 32)


def test_evaluation_looks_between_batches():
    seen = []

    def eval_step(_, name):
        seen.append(name)
        return {"nats": 1.0, "targets": 1.0, "bytes": 1.0}

    stop = lambda: len(seen) == 2  # noqa: E731
    assert evaluate(Pretrain(config_for()), eval_step, None, "abcdef", stop) is None
    assert seen == ["a", "b"]


def test_a_workdir_keeps_its_objective():
    facts = manifest.facts(config_for(), {"data": 1}, {}, None)
    manifest.require_same_run(facts["fixed"], config_for(), "it was")
    other = {**facts["fixed"], "objective.name": "sft"}
    with pytest.raises(
        ConfigError, match=r"config\.objective\.name = 'sft'; now it is 'pretrain'"
    ):
        manifest.require_same_run(other, config_for(), "it was")
