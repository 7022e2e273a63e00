"""Settings that change nothing are named before the first step, and change nothing indeed."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from hunyuan_jax.config import LatentConfig, LoraConfig, MoeConfig, without_effect
from hunyuan_jax.train.state import build_program
from hunyuan_jax.train.step import gradients, make_train_step
from support.models import fast_jit, mesh_of
from support.steps import MODEL, batch, config_for, initial_params

DENSE = dataclasses.replace(MODEL, moe=MoeConfig())
WITH_BIAS = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, selection_bias=True))


def config_of(model, schedule=(), optimizer=(), **train):
    config = config_for(model, **train)
    return dataclasses.replace(
        config,
        schedule=dataclasses.replace(config.schedule, **dict(schedule)),
        optimizer=dataclasses.replace(
            config.optimizer, **{"spike_factor": 0.0, "spike_after": 100} | dict(optimizer)
        ),
    )


def lowered(config):
    """The text of the whole train step, as the compiler receives it."""
    program = build_program(config, mesh_of())
    spec = {name: jax.typeof(value) for name, value in batch().items()}
    return make_train_step(program).lower(program.state, spec).as_text()


CASES = [
    pytest.param(
        config_of(dataclasses.replace(DENSE, rope_type="plain")),
        config_of(
            dataclasses.replace(
                DENSE,
                rope_type="plain",
                rope_alpha=7.0,
                rope_factor=3.0,
                moe=MoeConfig(
                    norm_topk_prob=True,
                    dispatch="drop",
                    capacity_factor=2.0,
                    min_capacity=4,
                    group_size=4,
                    aux_loss_weight=0.5,
                    z_loss_weight=0.5,
                    intermediate_size=5,
                    scoring="sigmoid",
                    routed_scale=2.0,
                    selection_bias=True,
                    bias_rate=0.1,
                    bias_limit=1.0,
                ),
                fp32_head=False,
                lora=LoraConfig(alpha=3.0, targets=("q",)),
                latent=LatentConfig(rotary_dim=2, group_size=4),
            ),
            schedule={"min_lr": 1e-4},
            optimizer={"spike_after": 7, "expert_lr_ratio": 0.9},
            profile_steps="4:5",
        ),
        {
            *(
                f"model.moe.{name}"
                for name in (
                    *("norm_topk_prob", "dispatch", "capacity_factor", "min_capacity"),
                    *("group_size", "aux_loss_weight", "z_loss_weight"),
                    *("intermediate_size", "scoring", "routed_scale"),
                    *("selection_bias", "bias_rate", "bias_limit"),
                )
            ),
            "model.fp32_head",
            *("model.rope_alpha", "model.rope_factor", "model.lora.alpha", "model.lora.targets"),
            *("model.latent.rotary_dim", "model.latent.group_size", "schedule.min_lr"),
            *("optimizer.spike_after", "optimizer.expert_lr_ratio", "train.profile_steps"),
        },
        id="dense",
    ),
    pytest.param(
        config_of(WITH_BIAS),
        config_of(
            dataclasses.replace(WITH_BIAS, moe=dataclasses.replace(WITH_BIAS.moe, bias_limit=1.0))
        ),
        {"model.moe.bias_limit"},
        id="frozen bias",
    ),
    pytest.param(
        config_of(MODEL, schedule={"name": "cosine_with_min_lr"}),
        config_of(
            dataclasses.replace(
                MODEL, moe=dataclasses.replace(MODEL.moe, capacity_factor=2.0, min_capacity=4)
            ),
            schedule={
                "name": "cosine_with_min_lr",
                "decay_ratio": 0.7,
                "anneal_fraction": 0.5,
                "anneal_ratio": 0.2,
            },
        ),
        {
            *("model.moe.capacity_factor", "model.moe.min_capacity", "schedule.decay_ratio"),
            *("schedule.anneal_fraction", "schedule.anneal_ratio"),
        },
        id="dropless",
    ),
]


@pytest.mark.cases(2)
@pytest.mark.parametrize(("before", "after", "idle"), CASES)
def test_a_setting_that_changes_nothing_is_named(before, after, idle):
    named = {line.split()[0].removeprefix("config.") for line in without_effect(after)}
    assert named == idle
    assert not set(without_effect(after)) & set(without_effect(before))
    assert lowered(after) == lowered(before)


def router_gradient(**moe):
    config = config_of(dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, **moe)))
    step = functools.partial(gradients, build_program(config, mesh_of()))
    return config, fast_jit(step)(initial_params(), batch(), jax.random.key(0))[0]


def test_a_router_that_learns_from_its_own_losses_alone_is_named():
    moe = dataclasses.replace(MODEL.moe, norm_topk_prob=True)
    (line,) = without_effect(config_of(dataclasses.replace(MODEL, moe=moe)))
    assert "learns from aux_loss_weight and z_loss_weight alone" in line


def test_a_router_without_a_gradient_is_named():
    off = {"norm_topk_prob": True, "aux_loss_weight": 0.0, "z_loss_weight": 0.0}
    for moe, words in (
        (off, "gets no gradient"),
        (off | {"dispatch": "recycle", "capacity_factor": 0.5}, None),
    ):
        config, grads = router_gradient(**moe)
        lines = [line for line in without_effect(config) if "norm_topk_prob" in line]
        assert len(lines) == (words is not None) and all(words in line for line in lines), moe
        largest = max(
            float(np.abs(leaf).max())
            for path, leaf in jax.tree.leaves_with_path(grads)
            if "router" in jax.tree_util.keystr(path)
        )
        assert (largest < 1e-7) == (words == "gets no gradient"), (moe, largest)
