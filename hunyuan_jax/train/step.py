"""One training step and one evaluation step, compiled.

A batch is a dict of [B, T] arrays: tokens, targets, segment_ids, positions (int32), loss_weights (float32); see data/loader.py.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hunyuan_jax.model import loss as loss_lib
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel import rules
from hunyuan_jax.train.state import Program, TrainState, abstract_model

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def batch_sharding(program: Program) -> jax.sharding.NamedSharding:
    """How each [B, T] array of a batch lies on the mesh."""
    return rules.sharding(program.mesh, ("batch", "seq"), (program.config.train.batch_size, program.config.train.seq_len), "a batch")


def make_train_step(program: Program) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Jitted (state, batch) -> (new state, metrics); the old state is donated.

    Metrics, float32: loss (cross entropy in nats a token), grad_norm (before clipping), and for MoE models aux_loss, z_loss,
    recycled, dropped, entropy (means over layers) and load_LE (share of the served tokens per layer and expert).
    """
    config = program.config

    def loss_fn(params, batch, key):
        model: Transformer = nnx.merge(program.graph_def, params)
        output = model(batch["tokens"], batch["positions"], batch["segment_ids"], key=key, is_training=True)
        loss = loss_lib.cross_entropy(model.logits(output.hidden_BTD), batch["targets"], batch["loss_weights"])
        return loss + loss_lib.router_loss(output.stats, config.model.moe), (loss, output.stats)

    def step(state, batch):
        # Routing draws and dropout depend on the seed and the step alone, so a resumed run repeats them.
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        grads, (loss, stats) = jax.grad(loss_fn, has_aux=True)(state.params, batch, key)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = program.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": grad_norm, **_router_metrics(stats)}
        return TrainState(params, opt_state, state.step + 1), metrics

    return jax.jit(
        step,
        in_shardings=(program.shardings, batch_sharding(program)),
        out_shardings=(program.shardings, rules.sharding(program.mesh, ())),
        donate_argnums=0,
    )


def make_eval_step(program: Program) -> Callable[[dict, Batch], tuple[jax.Array, jax.Array]]:
    """Jitted (params, batch) -> (sum of the cross entropy, number of targets); routes dropless, as inference does."""
    moe = dataclasses.replace(program.config.model.moe, dispatch="dropless")
    graph_def = abstract_model(dataclasses.replace(program.config.model, moe=moe), program.mesh)[0]

    def step(params, batch):
        model: Transformer = nnx.merge(graph_def, params)
        output = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        num_targets = batch["loss_weights"].sum()
        return loss_lib.cross_entropy(model.logits(output.hidden_BTD), batch["targets"], batch["loss_weights"]) * num_targets, num_targets

    return jax.jit(step, in_shardings=(program.shardings.params, batch_sharding(program)))


def _router_metrics(stats: dict[str, jax.Array]) -> Metrics:
    """Router figures [P, F, ...] of every layer as means over layers, and the load [L, E] as it is."""
    if not stats:
        return {}
    means = {name: jnp.mean(value) for name, value in stats.items() if name != "load_E"}
    load_PFE = stats["load_E"]
    return {**means, "load_LE": load_PFE.reshape(-1, load_PFE.shape[-1])}
