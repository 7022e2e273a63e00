"""One training step and one evaluation step, compiled.

A batch is a dict of [B, T] arrays: tokens, targets, segment_ids, positions (int32), loss_weights
(float32); see data/loader.py.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from hunyuan_jax.layers import lora
from hunyuan_jax.layers import loss as loss_lib
from hunyuan_jax.layers.ffn.moe import routing
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.optim import guard as guard_lib
from hunyuan_jax.parallel import rules
from hunyuan_jax.parallel.mesh import device_kind
from hunyuan_jax.params.declare import Weight, in_use
from hunyuan_jax.train.state import Program, TrainState, abstract_model
from pallas_kernels import tpu_compiler

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def batch_sharding(program: Program) -> jax.sharding.NamedSharding:
    """How each [B, T] array of a batch lies on the mesh."""
    train = program.config.train
    parts = train.grad_accum_steps  # each is split over the mesh like the whole
    name = (
        "a batch"
        if parts == 1
        else f"one of {parts} parts (config.train.grad_accum_steps) of a batch"
    )
    return rules.sharding(
        program.mesh, ("batch", "seq"), (train.batch_size // parts, train.seq_len), name
    )


def make_train_step(program: Program) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Jitted (state, batch) -> (new state, metrics); the old state is donated.

    Metrics: float32 loss (cross entropy in nats a token), grad_norm (before clipping), and for MoE
    models those of `router_metrics`; int32 num_updates (steps before this one that were not
    skipped, which the schedule counts), num_skipped (so far) and skipped_in_row (0: this step was
    not skipped).
    """
    config = program.config

    def step(state, batch):
        # Routing draws and dropout depend on the seed and the step alone, so a resumed run repeats
        # them.
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        grads, loss, stats = gradients(program, state.params, batch, key)
        trained, frozen = lora.split(state.params, config.model)
        accept = functools.partial(guard_lib.accepts, config.optimizer, state.guard, loss)
        trained, opt_state, grad_norm = program.tx.step(grads, state.opt_state, trained, accept)
        guard = guard_lib.after_step(state.guard, grad_norm, accept(grad_norm))
        counts = {
            "num_updates": state.guard.num_accepted,
            "num_skipped": guard.num_skipped,
            "skipped_in_row": guard.num_in_row,
        }
        metrics = {"loss": loss, "grad_norm": grad_norm, **counts, **router_metrics(stats)}
        return TrainState(lora.join(frozen, trained), opt_state, state.step + 1, guard), metrics

    return jax.jit(
        step,
        in_shardings=(program.shardings, batch_sharding(program)),
        out_shardings=(program.shardings, rules.sharding(program.mesh, ())),
        donate_argnums=0,
        compiler_options=tpu_compiler.train_step_options(device_kind(program.mesh)),
    )


def gradients(
    program: Program, params: dict, batch: Batch, key: jax.Array
) -> tuple[dict, jax.Array, dict[str, jax.Array]]:
    """(gradients, mean cross entropy, router figures [P, F, ...]) of one batch, in
    train.grad_accum_steps equal parts.

    A gradient has the dtype in which its parameter is used, so bfloat16 for the matrices of a
    bfloat16 model: it is reduced over the mesh in that dtype anyway.  Several parts are added up
    in float32.
    """
    num_parts = program.config.train.grad_accum_steps
    num_targets = jnp.maximum(batch["loss_weights"].sum(), 1.0)

    def loss_fn(taps, part, key):
        model: Transformer = nnx.merge(program.graph_def, _weights(program, params, taps))
        output = model(
            part["tokens"], part["positions"], part["segment_ids"], key=key, is_training=True
        )
        loss = (
            model.token_losses(output.hidden_BTD, part["targets"]) * part["loss_weights"]
        ).sum() / num_targets
        return loss + loss_lib.router_loss(output.stats, program.config.model.moe) / num_parts, (
            loss,
            output.stats,
        )

    def part_gradients(part, key):
        grads, (loss, stats) = jax.grad(loss_fn, has_aux=True)(_taps(program), part, key)
        return (
            jax.lax.with_sharding_constraint(
                grads, jax.tree.map(lambda tap: tap.sharding, program.taps)
            ),
            loss,
            stats,
        )

    if num_parts == 1:
        return part_gradients(batch, key)

    def add_part(sums, xs):
        index, part = xs
        new = part_gradients(part, jax.random.fold_in(key, index))
        return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), sums, new), None

    parts = _split(program, batch)
    first = jax.eval_shape(part_gradients, jax.tree.map(lambda a: a[0], parts), key)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), first)
    (grads, loss, stats), _ = jax.lax.scan(add_part, zeros, (jnp.arange(num_parts), parts))
    return (
        grads,
        loss,
        {
            name: total / num_parts if name in routing.LOSSES else total
            for name, total in stats.items()
        },
    )


def _split(program: Program, batch: Batch) -> Batch:
    """[parts, B / parts, T]: part i takes rows i, i + parts, ..., so that every chip splits its
    own rows.
    """
    num_parts = program.config.train.grad_accum_steps
    parts = {
        name: a.reshape(-1, num_parts, a.shape[-1]).swapaxes(0, 1) for name, a in batch.items()
    }
    return {
        name: rules.constrain(a, program.mesh, ("layers", "batch", "seq"))
        for name, a in parts.items()
    }


def _taps(program: Program) -> dict:
    return jax.tree.map(lambda tap: jnp.zeros(tap.shape, tap.dtype), program.taps)


def _weights(program: Program, params: dict, taps: dict) -> dict:
    """The parameters for the model: those of the layers become arrays layer by layer, the others
    at once; frozen ones already are.
    """
    trained, frozen = lora.split(params, program.config.model)
    weights = lora.join(
        frozen, jax.tree.map(lambda tap, stored: Weight(stored, tap), taps, trained)
    )
    return {name: tree if name == "groups" else in_use(tree) for name, tree in weights.items()}


def make_eval_step(
    program: Program,
) -> Callable[[dict, Batch], tuple[jax.Array, jax.Array, jax.Array]]:
    """Jitted (params, batch) -> (sum of the cross entropy, number of targets, bytes of text);
    routes dropless, as inference does.

    The batch has one more array, target_bytes (see evaluate.py).  It goes through the model in
    train.grad_accum_steps equal parts, as in training.
    """
    moe = dataclasses.replace(program.config.model.moe, dispatch="dropless")
    graph_def = abstract_model(dataclasses.replace(program.config.model, moe=moe), program.mesh)[0]

    def step(params, batch):
        model: Transformer = nnx.merge(graph_def, _weights(program, params, _taps(program)))

        def add_part(total, part):
            output = model(part["tokens"], part["positions"], part["segment_ids"])
            return total + (
                model.token_losses(output.hidden_BTD, part["targets"]) * part["loss_weights"]
            ).sum(), None

        total, _ = jax.lax.scan(add_part, jnp.zeros((), jnp.float32), _split(program, batch))
        return total, batch["loss_weights"].sum(), batch["target_bytes"].sum()

    return jax.jit(step, in_shardings=(program.shardings.params, batch_sharding(program)))


def router_metrics(stats: dict[str, jax.Array]) -> Metrics:
    """Health of the mixtures of one step from router figures [P, F, ...], {} for a dense model.

    demand_LE: share of a layer's choices that name the expert, before any capacity; load_LE: share
    of the served choices that it serves;
    recycled_L, dropped_L: shares of the choices; entropy_L: mean of the router in nats; aux_loss,
    z_loss: means over layers.
    """
    if not stats:
        return {}
    layers = {name: a.reshape(-1, *a.shape[2:]) for name, a in stats.items()}
    choices_L, served_L = layers["wished_E"].sum(-1), layers["served_E"].sum(-1)

    def share(part, whole):
        return part / jnp.maximum(whole, 1.0)

    return {
        "demand_LE": share(layers["wished_E"], choices_L[:, None]),
        "load_LE": share(layers["served_E"], served_L[:, None]),
        "recycled_L": share(layers["recycled"], choices_L),
        "dropped_L": share(choices_L - served_L, choices_L),
        "entropy_L": share(layers["entropy"], layers["tokens"]),
        **{name: layers[name].mean() for name in routing.LOSSES},
    }
