"""Larger models that students inherit from, with random parameters, and what they say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from hunyuan_jax.config import ModelConfig, MoeConfig
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel.mesh import single_device_mesh
from support.models import fast_jit, filled

LENGTH = 8
DENSE = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=12,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    max_position=LENGTH,
    cla_share_factor=2,
)
MIXTURE = dataclasses.replace(
    DENSE, moe=MoeConfig(num_experts=4, top_k=2, num_shared_experts=1, selection_bias=True)
)


def mesh():
    return single_device_mesh()


def params_of(cfg):
    model = filled(lambda: Transformer(cfg, mesh(), jax.random.key(0)))
    return nnx.to_pure_dict(nnx.split(model)[1])


def tokens():
    return jnp.arange(2 * LENGTH).reshape(2, LENGTH) % DENSE.vocab_size


@functools.cache
def logits_of(cfg):
    """Jitted params -> logits of `tokens`."""
    graph_def = abstract_model(cfg, mesh())[0]

    def run(params):
        model = nnx.merge(graph_def, params)
        output = model(tokens(), positions(), jnp.ones_like(positions()))
        return model.logits(output.hidden_BTD)

    return fast_jit(run)


def positions():
    return jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
