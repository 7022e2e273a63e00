"""The train state: arrays only, every leaf sharded by the rules table."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import Config, ObjectiveConfig, OptimizerConfig, StateDtype
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.model.stored import stored_params
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.optim.build import Optimizer, build_optimizer
from hunyuan_jax.optim.guard import Guard, new_guard
from hunyuan_jax.optim.schedule import build_schedule
from hunyuan_jax.optim.state_dtype import convert_state
from hunyuan_jax.parallel import rules
from hunyuan_jax.params import abstract
from hunyuan_jax.params.tree import join, part_like, path_of, split
from hunyuan_jax.quant.array import is_quantized
from hunyuan_jax.train.objective import BuildObjective, Objective
from hunyuan_jax.train.pretrain import Pretrain
from hunyuan_jax.weights import few_bits


class TrainState(NamedTuple):
    """Everything that a train step updates.

    params: nested dict of master weights, see `model.stored.stored_params`.  Weights that LoRA
      freezes have the dtype in which they are used.
    opt_state: moments with the shapes of the trained parameters.
    step: int32, steps done, including skipped ones.
    guard: state of `optim.guard`.
    ema: moving average of the trained parameters, config.train.ema_decay; {} without.
    """

    params: dict[str, Any]
    opt_state: Any
    step: jax.Array
    guard: Guard
    ema: dict[str, Any]


class Program(NamedTuple):
    """Model, optimizer and shardings of a run; the steps are built from it.

    graph_def: `nnx.merge(graph_def, params)` is the Transformer.
    specs: a ParamSpec for every parameter.
    tx: the optimizer.
    schedule: step -> learning rate.
    objective: defines the loss.
    state: shape, dtype and sharding of every leaf of the TrainState, the target of a restore.
    taps: shape, dtype and sharding of the gradient of every trained parameter.
    """

    config: Config
    mesh: Mesh
    graph_def: nnx.GraphDef
    specs: dict[str, Any]
    tx: Optimizer
    schedule: optax.Schedule
    objective: Objective
    state: TrainState
    taps: dict[str, Any]

    @property
    def shardings(self) -> TrainState:
        """A NamedSharding for every leaf of the TrainState."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)


def build_program(
    config: Config, mesh: Mesh, build_objective: BuildObjective = Pretrain
) -> Program:
    """Builds model, optimizer, objective and shardings of a run.

    Raises:
      ConfigError: a dim does not divide over the mesh, or the parameter groups do not fit the
        model.
    """
    graph_def, specs = abstract_model(config.model, mesh)
    schedule = build_schedule(config.schedule, config.train.num_steps)
    trained, _ = split(specs, specs)
    tx = build_optimizer(
        config.optimizer,
        schedule,
        trained,
        is_moe=config.model.is_moe,
        is_lora=config.model.lora.rank > 0,
    )
    by_path = {path_of(path): spec.sharding for path, spec in jax.tree.leaves_with_path(specs)}

    def sharding(path):
        # A path ends in its parameter's, a moment's too; counts and scales stand alone.
        owners = [
            name
            for name in by_path
            if f"/{path_of(path).removesuffix('/value')}".endswith("/" + name)
        ]
        return by_path[max(owners, key=len)] if owners else rules.sharding(mesh, ())

    def placed(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(path))

    params = few_bits.with_base(config.model, specs, abstract.structs(specs))
    shapes = jax.eval_shape(lambda params: _new_state(config, tx, specs, params), params)
    state = jax.tree.map_with_path(placed, shapes)
    # What is in few bits says itself where it lies.
    held = jax.tree.map(
        lambda base, leaf: base if is_quantized(base) else leaf,
        params,
        state.params,
        is_leaf=is_quantized,
    )
    state = state._replace(params=held)
    taps = jax.tree.map(lambda spec: spec.struct(spec.dtype_in_use(config.model.dtype)), trained)
    objective = build_objective(config)
    return Program(config, mesh, graph_def, specs, tx, schedule, objective, state, taps)


def init_state(program: Program, weights: dict[str, Any] | None = None) -> TrainState:
    """Initialises a state on the mesh from train.seed; `weights` replace random parameters.

    Args:
      program: of the run.
      weights: a nested dict of arrays for some or all of the parameters, on the mesh or in numpy.
        Every process passes the same numpy arrays.
    """
    cfg, mesh = program.config.model, program.mesh

    def init(key, weights):
        drawn = nnx.to_pure_dict(nnx.split(Transformer(cfg, mesh, key))[1])
        params = join(drawn, weights)
        return _new_state(program.config, program.tx, program.specs, params)

    def place(path, array):
        if isinstance(array, jax.Array):
            return array
        # Each device takes its part: there is no whole copy on any.
        return jax.make_array_from_callback(
            array.shape, shardings[path_of(path)], lambda index: array[index]
        )

    shardings = {
        path_of(path): spec.sharding for path, spec in jax.tree.leaves_with_path(program.specs)
    }
    placed = jax.tree.map_with_path(place, weights or {})
    # Runs once: on a CPU, LLVM would spend seconds on optimising what takes 0.05 s.
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if is_cpu else None
    return jax.jit(init, out_shardings=program.shardings, compiler_options=options)(
        jax.random.key(program.config.train.seed), placed
    )


def not_finite(params: dict[str, Any]) -> list[str]:
    """Returns the names of the parameters that hold a NaN or an infinity."""
    leaves = jax.tree.leaves_with_path(params)
    # Runs once, as `init_state` does.
    found = jax.jit(
        lambda arrays: jnp.stack([jnp.isfinite(a.astype(jnp.float32)).all() for a in arrays])
    )([array for _, array in leaves])
    return [
        path_of(path)
        for (path, _), ok in zip(leaves, jax.device_get(found), strict=True)
        if not ok
    ]


def describe_base(program: Program, params: dict[str, Any]) -> str:
    """A line about the memory of adapters and of the base they are trained beside."""
    cfg = program.config.model
    adapters, base = split(params, program.specs)
    held, added = (sum(a.nbytes for a in jax.tree.leaves(t)) for t in (base, adapters))
    dense = sum(
        math.prod(spec.shape) * jnp.dtype(spec.dtype_in_use(cfg.dtype)).itemsize
        for spec in jax.tree.leaves(split(program.specs, program.specs)[1])
    )
    return (
        f"base in {cfg.lora.quantize}: {held / 2**20:,.1f} MiB held, {dense / 2**20:,.1f} MiB as "
        f"numbers in {cfg.dtype}; adapters {added / 2**20:,.1f} MiB."
    )


def to_items(state: TrainState) -> dict[str, Any]:
    """Splits a state, or its shapes, into a checkpoint's items (`checkpoint.store.ITEMS`).

    "params" is what a run is used and exported by: the moving average if there is one.
    """
    optimizer = _exchanged(state)._asdict()
    params = optimizer.pop("params")
    if not optimizer["ema"]:
        del optimizer["ema"]
    return {"params": params, "optimizer": optimizer}


def from_items(items: dict[str, Any]) -> TrainState:
    """Inverse of `to_items`."""
    return _exchanged(TrainState(**{"params": items["params"], "ema": {}, **items["optimizer"]}))


def used_params(state: TrainState) -> dict[str, Any]:
    """Returns the parameters that a run is judged by: the moving average if there is one."""
    return join(state.params, state.ema)


def _exchanged(state: TrainState) -> TrainState:
    """Returns the state with its moving average and what it averages in each other's place."""
    return state._replace(params=used_params(state), ema=part_like(state.params, state.ema))


def with_state_dtype(program: Program, state_dtype: StateDtype) -> Program:
    """Returns the program with another `state_dtype`.

    It restores a checkpoint from before config.optimizer.state_dtype was changed.
    """
    # The section's other fields may not be valid with that dtype.  They do not affect the layout.
    return build_program(
        dataclasses.replace(
            program.config,
            optimizer=OptimizerConfig(state_dtype=state_dtype),
            objective=ObjectiveConfig(),
        ),
        program.mesh,
    )._replace(config=program.config, objective=program.objective)


def convert(program: Program, state: TrainState) -> TrainState:
    """Converts a state to the state_dtype of `program`; both are in memory meanwhile."""

    def run(state):
        trained, frozen = split(state.params, program.specs)
        trained, opt_state = convert_state(
            trained,
            split(program.specs, program.specs)[0],
            state.opt_state,
            program.config.optimizer.state_dtype,
            program.tx,
        )
        return state._replace(params=join(frozen, trained), opt_state=opt_state)

    return jax.jit(run, out_shardings=program.shardings)(state)


def _new_state(
    config: Config, tx: Optimizer, specs: dict[str, Any], params: dict[str, Any]
) -> TrainState:
    params = stored_params(params, specs, config.model.dtype, config.optimizer.state_dtype)
    trained, _ = split(params, specs)
    ema = jax.tree.map(jnp.copy, trained) if config.train.ema_decay else {}
    return TrainState(params, tx.init(trained), jnp.zeros((), jnp.int32), new_guard(), ema)
