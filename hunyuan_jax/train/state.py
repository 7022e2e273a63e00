"""The train state: arrays only, every leaf sharded by the rules table."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import Config, ModelConfig
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.optim.build import build_optimizer
from hunyuan_jax.optim.schedule import build_schedule
from hunyuan_jax.parallel import rules


class TrainState(NamedTuple):
    """params: nested dict of float32 arrays; opt_state: of optax, its moments shaped like params; step: int32, steps done."""

    params: dict[str, Any]
    opt_state: Any
    step: jax.Array


class Program(NamedTuple):
    """What a run's functions are made from.

    graph_def: `nnx.merge(graph_def, params)` is the Transformer; tx: the optimizer; schedule: step -> learning rate;
    shardings: a NamedSharding for every leaf of the TrainState.
    """

    config: Config
    mesh: Mesh
    graph_def: nnx.GraphDef
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    shardings: TrainState


def abstract_model(cfg: ModelConfig, mesh: Mesh) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """(graph_def, shapes, shardings) of the model; nothing is allocated."""
    graph_def, state = nnx.split(nnx.eval_shape(lambda: Transformer(cfg, mesh, jax.random.key(0))))
    shapes = nnx.to_pure_dict(state)
    declared = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    shape_leaves, treedef = jax.tree.flatten_with_path(shapes)

    def sharding(path, shape, param):
        # Stacked parameters have one more dim, the CLA group, than their declaration named.
        logical = param.get_metadata("logical")
        logical = ("layers",) * (len(shape.shape) - len(logical)) + logical
        return rules.sharding(mesh, logical, shape.shape, _path(path))

    shardings = [sharding(path, shape, param) for (path, shape), param in zip(shape_leaves, declared, strict=True)]
    return graph_def, shapes, jax.tree.unflatten(treedef, shardings)


def build_program(config: Config, mesh: Mesh) -> Program:
    """Model, optimizer and shardings of a run.

    Raises:
      ConfigError: a dim that does not divide over the mesh, or parameter groups that do not fit the model.
    """
    graph_def, shapes, param_shardings = abstract_model(config.model, mesh)
    schedule = build_schedule(config.schedule, config.train.num_steps)
    tx = build_optimizer(config.optimizer, schedule, shapes, is_moe=config.model.is_moe)
    replicated = rules.sharding(mesh, ())
    by_path = {_path(path): s for path, s in jax.tree.leaves_with_path(param_shardings)}

    def opt_sharding(path, leaf):
        # A moment's path ends in its parameter's path; counts stand alone.
        owners = [name for name in by_path if _path(path).endswith("/" + name)]
        return by_path[max(owners, key=len)] if owners else replicated

    opt_shardings = jax.tree.map_with_path(opt_sharding, jax.eval_shape(tx.init, shapes))
    return Program(config, mesh, graph_def, tx, schedule, TrainState(param_shardings, opt_shardings, replicated))


def init_state(program: Program) -> TrainState:
    """A fresh state from train.seed, created in place on the mesh."""

    def init(key):
        model = Transformer(program.config.model, program.mesh, key)
        params = nnx.to_pure_dict(nnx.split(model)[1])
        return TrainState(params, program.tx.init(params), jnp.zeros((), jnp.int32))

    # Runs once: on a CPU, LLVM would spend seconds on optimising what takes 0.05 s.
    is_cpu = program.mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if is_cpu else None
    return jax.jit(init, out_shardings=program.shardings, compiler_options=options)(jax.random.key(program.config.train.seed))


def abstract_state(program: Program) -> TrainState:
    """Shapes, dtypes and shardings of the state: the target of a restore."""
    _, shapes, _ = abstract_model(program.config.model, program.mesh)
    state = TrainState(shapes, jax.eval_shape(program.tx.init, shapes), jax.ShapeDtypeStruct((), jnp.int32))
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, program.shardings)


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
