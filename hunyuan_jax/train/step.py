"""One training step and one evaluation step of any objective, compiled."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hunyuan_jax.layers import loss as loss_lib
from hunyuan_jax.layers.ffn.moe import routing
from hunyuan_jax.model.balance import bias_metrics, moved_biases
from hunyuan_jax.model.pattern import pattern
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.optim import guard as guard_lib
from hunyuan_jax.parallel import hosts, rules, xla_cpu
from hunyuan_jax.parallel.mesh import device_kind, first_device
from hunyuan_jax.params.declare import FewBits, Weight, in_use
from hunyuan_jax.params.tree import join, part_like, split
from hunyuan_jax.quant.array import is_quantized
from hunyuan_jax.train.objective import BatchSpec, LossMetrics
from hunyuan_jax.train.state import Program, TrainState, abstract_model
from pallas_kernels import tpu_compiler

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def batch_shardings(program: Program, spec: BatchSpec) -> dict[str, jax.sharding.NamedSharding]:
    """Returns the sharding of each array of a batch: examples are split over all data axes, and
    every chip has whole rows of them.

    Raises:
      ConfigError: a micro-batch does not divide over the mesh.
    """
    num_micro_batches = program.config.train.grad_accum_steps  # each is split over the mesh
    name = "a batch"
    if num_micro_batches > 1:
        name = f"a micro-batch (config.train.grad_accum_steps = {num_micro_batches})"
    return {
        field_name: rules.sharding(
            program.mesh,
            # Ids are small.  A process reads whole rows; the model gives each chip its tokens.
            rules.whole_rows(field.dims),
            (field.shape[0] // num_micro_batches, *field.shape[1:]),
            name,
        )
        for field_name, field in spec.items()
    }


def _input_shardings(program: Program, spec: BatchSpec) -> dict[str, Any]:
    """As `batch_shardings`, with the objective's constants."""
    constants = program.objective.constants(program.mesh)
    return batch_shardings(program, spec) | jax.tree.map(lambda a: a.sharding, constants)


def abstract_batch(program: Program) -> dict[str, Any]:
    """Returns the shapes, dtypes and shardings of a training batch and the objective's
    constants.
    """
    spec = program.objective.batch_spec
    return {
        name: jax.ShapeDtypeStruct(spec[name].shape, spec[name].dtype, sharding=sharding)
        for name, sharding in batch_shardings(program, spec).items()
    } | program.objective.constants(program.mesh)


def place_batch(program: Program, batch: Mapping[str, np.ndarray]) -> Batch:
    """Puts a training batch on the mesh, with the objective's constants; this process has the
    whole batch.
    """
    placed = jax.device_put(dict(batch), batch_shardings(program, program.objective.batch_spec))
    return placed | program.objective.read_constants(program.mesh)


def feed(program: Program) -> tuple[np.ndarray, Callable[[Mapping[str, np.ndarray]], Batch]]:
    """Returns (rows of a batch that this process reads, int64; what puts its part of a training or
    validation batch on the mesh).
    """
    spec = {**program.objective.eval_spec, **program.objective.batch_spec}
    shapes = {name: field.shape for name, field in spec.items()}
    shardings = batch_shardings(program, spec)
    name = next(iter(program.objective.batch_spec))  # all fields are split alike in dim 0
    return (
        hosts.process_rows(shardings[name], shapes[name]),
        functools.partial(hosts.global_batch, shardings=shardings, shapes=shapes),
    )


def make_train_step(program: Program) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns jitted (state, batch) -> (new state, metrics); the old state is donated.

    Metrics: float32 loss (as the objective defines it), grad_norm (before clipping) and
    objective/NAME for each of its sums, and those of the feed-forward layers; int32
    num_updates (steps before this one that were not skipped, which the schedule counts),
    num_skipped (so far) and skipped_in_row (0: this step was not skipped).
    """
    config = program.config

    def step(state, batch):
        # Routing draws and dropout depend on the seed and the step alone, so a resumed run repeats
        # them.
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        grads, loss, measured = gradients(program, state.params, batch, key)
        trained, frozen = split(state.params, program.specs)
        accept = functools.partial(guard_lib.accepts, config.optimizer, state.guard, loss)
        trained, opt_state, grad_norm = program.tx.step(grads, state.opt_state, trained, accept)
        is_accepted = accept(grad_norm)
        guard = guard_lib.after_step(state.guard, grad_norm, is_accepted)
        counts = {
            "num_updates": state.guard.num_accepted,
            "num_skipped": guard.num_skipped,
            "skipped_in_row": guard.num_in_row,
        }
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            **counts,
            **{f"objective/{name}": value for name, value in measured.sums.items()},
            **pattern(config.model.stacks["groups"])[0].ffn.metrics(measured.router),
            **bias_metrics(state.params, config.model),
        }
        frozen = moved_biases(frozen, measured.router, config.model, is_accepted)
        ema = jax.tree.map(
            lambda mean, new: jnp.where(
                is_accepted, mean + (1 - config.train.ema_decay) * (new - mean), mean
            ),
            state.ema,
            part_like(trained, state.ema),
        )
        params = join(frozen, trained)
        return TrainState(params, opt_state, state.step + 1, guard, ema), metrics

    return jax.jit(
        step,
        in_shardings=(program.shardings, _input_shardings(program, program.objective.batch_spec)),
        out_shardings=(program.shardings, rules.sharding(program.mesh, ())),
        donate_argnums=0,
        compiler_options=tpu_compiler.train_step_options(first_device(program.mesh))
        | xla_cpu.train_step_options(device_kind(program.mesh)),
    )


def gradients(
    program: Program, params: dict, batch: Batch, key: jax.Array
) -> tuple[dict, jax.Array, LossMetrics]:
    """Returns (gradients, loss, metrics) of one batch, in train.grad_accum_steps micro-batches.

    The loss and the metrics' sums are those of the whole batch.
    Router figures are [P, f, ...].

    A gradient has the dtype in which its parameter is used, so bfloat16 for the matrices of a
    bfloat16 model: it is reduced over the mesh in that dtype anyway.  Those of several
    micro-batches are added up in float32.
    """
    objective, num_micro_batches = program.objective, program.config.train.grad_accum_steps
    totals = objective.totals(batch)

    def loss_fn(taps, micro_batch, key):
        model: Transformer = nnx.merge(program.graph_def, _weights(program, params, taps))
        loss, metrics = objective.loss(model, micro_batch, totals, key)
        router_loss = loss_lib.router_loss(metrics.router, program.config.model.moe)
        return loss + router_loss / num_micro_batches, (loss, metrics)

    def micro_batch_gradients(micro_batch, key):
        grads, (loss, metrics) = jax.grad(loss_fn, has_aux=True)(_taps(program), micro_batch, key)
        return (
            jax.lax.with_sharding_constraint(
                grads, jax.tree.map(lambda tap: tap.sharding, program.taps)
            ),
            loss,
            metrics,
        )

    if num_micro_batches == 1:
        return micro_batch_gradients(batch, key)

    constants = _constants(objective.batch_spec, batch)

    def add(totals, xs):
        index, micro_batch = xs
        new = micro_batch_gradients(micro_batch | constants, jax.random.fold_in(key, index))
        return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), totals, new), None

    micro_batches = _micro_batches(program, objective.batch_spec, batch)
    first = jax.tree.map(lambda a: a[0], micro_batches) | constants
    zeros = _zeros_like(micro_batch_gradients, first, key)
    (grads, loss, metrics), _ = jax.lax.scan(
        add, zeros, (jnp.arange(num_micro_batches), micro_batches)
    )
    router = {
        name: total / num_micro_batches if name in routing.LOSSES else total
        for name, total in metrics.router.items()
    }
    return grads, loss, metrics._replace(router=router)


def _micro_batches(program: Program, spec: BatchSpec, batch: Batch) -> Batch:
    """Splits each field of a batch into n micro-batches, [n, B / n, ...].

    Micro-batch i takes examples i, i + n, ..., so that every chip splits its own examples.
    """
    num_micro_batches = program.config.train.grad_accum_steps
    split = {
        name: batch[name].reshape(-1, num_micro_batches, *batch[name].shape[1:]).swapaxes(0, 1)
        for name in spec
    }
    return {
        name: rules.constrain(a, program.mesh, ("layers", *rules.whole_rows(spec[name].dims)))
        for name, a in split.items()
    }


def _constants(spec: BatchSpec, batch: Batch) -> dict[str, Any]:
    """The objective's constants, which a batch has beside the fields of `spec`."""
    return {name: batch[name] for name in batch.keys() - spec.keys()}


def _zeros_like(fn: Callable, *args: Any) -> Any:
    """Returns float32 zeros of the shapes that `fn` returns."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), jax.eval_shape(fn, *args))


def _taps(program: Program) -> dict:
    return jax.tree.map(lambda tap: jnp.zeros(tap.shape, tap.dtype), program.taps)


def _weights(program: Program, params: dict, taps: dict) -> dict:
    """Returns the parameters in the form that the model takes.

    The weights of the layers are converted layer by layer, the others at once.  Frozen weights
    are converted if they are held in few bits only.
    """
    trained, frozen = split(params, program.specs)
    weights = join(frozen, jax.tree.map(lambda tap, stored: Weight(stored, tap), taps, trained))
    stacks = program.config.model.stacks
    weights = jax.tree.map(
        lambda leaf: FewBits(leaf, program.config.model.dtype) if is_quantized(leaf) else leaf,
        weights,
        is_leaf=is_quantized,
    )
    return {name: tree if name in stacks else in_use(tree) for name, tree in weights.items()}


def make_outputs_step(
    program: Program, fn: Callable[[Transformer, Batch], jax.Array]
) -> Callable[[dict, Batch], tuple[jax.Array, jax.Array]]:
    """Returns jitted (params, training batch) -> fn(model, micro-batch) of all micro-batches.

    The model is that of training, without dropout.  `fn` returns an array [examples, ...]; the
    result has those of the whole batch, on every device, and a scalar without a meaning.

    The scalar keeps a backward pass alive: a forward pass alone may be rounded otherwise, and the
    results are to be those of the train step.
    """
    spec = program.objective.batch_spec

    def outputs(params, batch):
        def of_micro_batch(micro_batch):
            def total(taps):
                model = nnx.merge(program.graph_def, _weights(program, params, taps))
                found = fn(model, micro_batch)
                return found.sum(), found

            grads, found = jax.grad(total, has_aux=True)(_taps(program))
            return found, optax.tree.norm(grads)

        found, norms = jax.lax.map(of_micro_batch, _micro_batches(program, spec, batch))
        return found.swapaxes(0, 1).reshape(-1, *found.shape[2:]), norms.sum()

    return jax.jit(
        outputs,
        in_shardings=(program.shardings.params, batch_shardings(program, spec)),
        out_shardings=rules.sharding(program.mesh, ()),
    )


def make_eval_step(program: Program) -> Callable[[dict, Batch], dict[str, jax.Array]]:
    """Returns jitted (params, batch) -> the sums of the objective's `evaluate`.

    Routes dropless, as inference does.  The batch goes through the model in
    train.grad_accum_steps micro-batches, as in training.
    """
    objective, spec = program.objective, program.objective.eval_spec
    moe = dataclasses.replace(program.config.model.moe, dispatch="dropless")
    graph_def = abstract_model(dataclasses.replace(program.config.model, moe=moe), program.mesh)[0]

    def step(params, batch):
        model: Transformer = nnx.merge(graph_def, _weights(program, params, _taps(program)))
        micro_batches = _micro_batches(program, spec, batch)

        constants = _constants(spec, batch)

        def add(totals, micro_batch):
            new = objective.evaluate(model, micro_batch | constants)
            return jax.tree.map(jnp.add, totals, new), None

        first = jax.tree.map(lambda a: a[0], micro_batches) | constants
        zeros = _zeros_like(functools.partial(objective.evaluate, model), first)
        return jax.lax.scan(add, zeros, micro_batches)[0]

    return jax.jit(step, in_shardings=(program.shardings.params, _input_shardings(program, spec)))
