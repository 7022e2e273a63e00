"""Weight inheritance (TinyCLIP, arXiv 2309.12314): a smaller model's parameters are cut out of a
larger one's.

What can be cut are whole CLA groups, K/V heads with their query heads, query heads of each K/V
head, experts, columns of MLPs and experts, and entries of the residual stream.  Everything follows
from the parameters' dims; the layers of a stack keep heads, experts and columns of their own.

Those with the highest scores are kept.  A score is the magnitude of a unit's weights; or what the
loss loses without them to first order, the squares of weight times gradient, as in Fisher pruning
(arXiv 1801.05787); or a mask that was learned (post/masks.py).

Letters: P groups, K kv heads, G query heads of a K/V head, E experts, F columns, D entries of the
stream, n entries of a dim, l leading dims.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hunyuan_jax.config import DistillConfig, ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.params.abstract import ParamSpec
from hunyuan_jax.params.roles import Role
from hunyuan_jax.train.start import require_same_model

# Fields that may be smaller in the student.
_SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_dense_layers", "num_heads")
_SIZES += ("num_kv_heads",)
_MOE_SIZES = ("num_experts", "top_k", "intermediate_size", "num_shared_experts")

STREAM = ("embed", "wide_embed")
_HEADS, _KV_HEADS = ("heads",), ("kv_heads",)
# Other units of a layer: their dims, and the leading dims whose entries have units of their own.
IN_LAYERS = {
    "experts": (("experts", "router_experts"), 1),
    "columns": (("ffn",), 1),
    "expert_columns": (("expert_ffn",), 2),
}


def require_fits(
    path: str, theirs: ModelConfig, ours: ModelConfig, cfg: DistillConfig, name: str
) -> None:
    """Raises ConfigError at the first field of `ours` that cannot be cut out of `theirs`.

    Args:
      path: of the larger model, which the field `name` has.
      theirs: the larger model.
      ours: the student.
      cfg: of the run.
    """
    sizes = [(field, getattr(theirs, field), getattr(ours, field)) for field in _SIZES]
    sizes += [(f"moe.{f}", getattr(theirs.moe, f), getattr(ours.moe, f)) for f in _MOE_SIZES]
    sizes.append(("moe.intermediate_size", theirs.expert_size, ours.expert_size))
    sizes += [
        ("num_layers", theirs.stacks[stack].num_layers, small.num_layers)
        for stack, small in ours.stacks.items()
        if stack in theirs.stacks
    ]
    queries = [model.num_heads // model.num_kv_heads for model in (theirs, ours)]
    for field, there, here in [*sizes, ("num_heads / num_kv_heads", *queries)]:
        if here > there:
            raise ConfigError(
                f"config.model.{field} = {here} is above the {there} of {name} = {path!r}, so a "
                "student cannot inherit its weights from there; set it to at most that, or "
                "config.objective.distill.inherit to 'none'."
            )
    moe = dataclasses.replace(
        ours.moe, **{field: getattr(theirs.moe, field) for field in _MOE_SIZES}
    )
    if ours.is_moe != theirs.is_moe:
        moe = ours.moe
    same = {field: getattr(theirs, field) for field in _SIZES}
    require_same_model(path, theirs, dataclasses.replace(ours, moe=moe, **same), name)
    if ours.hidden_size < theirs.hidden_size and (
        ours.latent.width or ours.spark.neuron_share or ours.num_mtp_layers
    ):
        raise ConfigError(
            f"config.model.hidden_size = {ours.hidden_size} is below the {theirs.hidden_size} of "
            f"{name} = {path!r}, which is not implemented for latent attention, Spark layers and "
            "multi-token prediction; leave it as it is."
        )
    if cfg.groups and (
        len(cfg.groups) != ours.num_groups
        or cfg.groups[-1] >= theirs.num_groups
        or len(ours.stacks) > 1
    ):
        raise ConfigError(
            f"config.objective.distill.groups = {cfg.groups} must name {ours.num_groups} of the "
            f"{theirs.num_groups} groups of {name} = {path!r}, a model whose layers are of one "
            "kind; leave it empty otherwise."
        )


Units = dict[str, Any]
"""A number for each unit of a model: "stream" [D], and for each stack of layers "kv_heads" [P, K],
which all layers of a group share, and by place "heads" [P, K, G], "experts" [P, E], "columns"
[P, F] of its MLP and "expert_columns" [P, E, F].  Masks have "groups" [P] too, and some of the
units only.
"""


def scores(importance: dict[str, Any], specs: dict[str, Any]) -> Units:
    """Returns the score of every unit, float32; can be traced.

    Args:
      importance: of each weight, such as the weight itself: a nested dict of arrays.
      specs: their `ParamSpec`s.
    """
    units = {"stream": _scores(_leaves(importance, specs), STREAM, 0)}
    for name in stacks(specs):
        parts = importance[name], specs[name]
        leaves = {place: _leaves(*(part[place] for part in parts)) for place in specs[name]}
        num_groups, num_kv = num_groups_of(specs[name]), _num_kv(specs[name])
        units[name], kv_PK = {}, 0.0
        for place, own in leaves.items():
            score_PKG = _scores(own, _HEADS, 1).reshape(num_groups, num_kv, -1)
            kv_PK += score_PKG.sum(-1) + _scores(own, _KV_HEADS, 1, 0.0)
            found = {"heads": score_PKG} | {
                kind: _scores(own, dims, num_leading)
                for kind, (dims, num_leading) in IN_LAYERS.items()
            }
            units[name][place] = {k: score for k, score in found.items() if score is not None}
        units[name]["kv_heads"] = kv_PK
    return units


def stacks(specs: dict[str, Any]) -> list[str]:
    """The names of a model's stacks of layers; `specs`: its `ParamSpec`s."""
    return [name for name in specs if jax.tree.leaves(specs[name])[0].dims[0] == "layers"]


def num_groups_of(specs: dict[str, Any]) -> int:
    """The number of CLA groups of a stack."""
    return jax.tree.leaves(specs)[0].shape[0]


def _num_kv(specs: dict[str, Any]) -> int:
    return _size(specs, _KV_HEADS) or _size(specs, _HEADS)


def kept_groups(
    cfg: DistillConfig, num_groups: int, num_kept: int, score_P: Any = None
) -> jax.Array | np.ndarray:
    """Returns the CLA groups that a student keeps, ascending: those that are named, or have the
    highest score, or are evenly spread.
    """
    if cfg.groups:
        return np.array(cfg.groups)
    if cfg.inherit == "first":
        return np.arange(num_kept)
    if score_P is not None:
        return _kept(False, score_P, num_kept)
    return np.round(np.linspace(0, num_groups - 1, num_kept)).astype(int)


def kept_layers(
    theirs: ModelConfig, ours: ModelConfig, cfg: DistillConfig, units: Units
) -> np.ndarray:
    """Returns the larger model's layer that each of the student's was, int [L], counted from 0;
    arguments as for `require_fits` and `inherit`.
    """
    found, first = [], 0
    for name, stack in theirs.stacks.items():
        small = ours.stacks.get(name)
        if small and not name.startswith("mtp"):
            score_P = units.get(name, {}).get("groups")
            groups = np.asarray(kept_groups(cfg, stack.num_groups, small.num_groups, score_P))
            size = stack.cla_share_factor
            found += [first + size * group + place for group in groups for place in range(size)]
        first += stack.num_layers
    return np.array(found, int)


def inherit(
    params: dict[str, Any],
    units: Units,
    theirs: dict[str, Any],
    ours: dict[str, Any],
    cfg: DistillConfig,
) -> dict[str, Any]:
    """Returns the student's parameters, cut out of those of a larger model; can be traced.

    A student of the larger model's shape gets its parameters as they are.

    Args:
      params: nested dict of arrays, of the larger model.
      units: the scores of its units, as those of `scores`; those of groups may be absent.
      theirs: their `ParamSpec`s.
      ours: those of the student, for which `require_fits` has passed.
      cfg: says what is kept.
    """
    kept = functools.partial(_kept, cfg.inherit == "first")
    stream = kept(units["stream"], _size(ours, STREAM))
    found = {name: params[name] for name in ours}
    for name in stacks(ours):
        part = params[name], units[name], theirs[name], ours[name]
        found[name] = _stack(*part, cfg, kept)
    return jax.tree.map(functools.partial(_cut, dims=STREAM, index=stream), found, ours)


def _stack(params, units, theirs, ours, cfg, kept):
    """The layers of one stack; the entries of the stream are all there still."""
    groups = kept_groups(cfg, num_groups_of(theirs), num_groups_of(ours), units.get("groups"))
    layers = {place: jax.tree.map(lambda a: a[groups], params[place]) for place in ours}

    def cut(place, dims, index):
        layers[place] = jax.tree.map(
            functools.partial(_cut, dims=dims, index=index), layers[place], ours[place]
        )

    num_kv = _num_kv(ours)
    kv_PK = kept(units["kv_heads"][groups], num_kv)  # those of a group serve all of its layers
    for place in ours:
        own = {kind: score[groups] for kind, score in units[place].items()}
        score_PKG = jnp.take_along_axis(own["heads"], kv_PK[..., None], axis=1)
        query_PKG = kept(score_PKG, _size(ours, _HEADS) // num_kv)
        index_PKG = kv_PK[..., None] * score_PKG.shape[-1] + query_PKG
        cut(place, _HEADS, index_PKG.reshape(len(groups), -1))
        cut(place, _KV_HEADS, kv_PK)
        experts_PE = None
        for kind, (dims, num_leading) in IN_LAYERS.items():
            if kind not in own:
                continue
            score = own[kind]
            if num_leading == 2:
                score = jnp.take_along_axis(score, experts_PE[..., None], axis=1)
            index = kept(score, _size(ours[place], dims))
            cut(place, dims, index)
            if kind == "experts":
                experts_PE = index
    return layers


def _leaves(params, specs) -> list[tuple[jax.Array, ParamSpec]]:
    return list(zip(jax.tree.leaves(params), jax.tree.leaves(specs), strict=True))


def _size(specs: dict[str, Any], dims: tuple[str, ...]) -> int:
    """The size of the first dim of that kind; 0 if no parameter has one."""
    return next(
        (
            size
            for spec in jax.tree.leaves(specs)
            for dim, size in zip(spec.dims, spec.shape, strict=True)
            if dim in dims
        ),
        0,
    )


def _scores(
    leaves: Iterable[tuple[jax.Array, ParamSpec]],
    dims: tuple[str, ...],
    num_leading: int,
    none: Any = None,
) -> Any:
    """The importance of each entry of a dim, float32 [*l, n]: the sum over the matrices that have
    it of the squares of its weights' importances, each as a multiple of the mean entry's.  `none`
    if no matrix has the dim.

    num_leading: leading dims (layers, experts) whose entries are scored apart.
    """
    total = none
    for array, spec in leaves:
        axis = next((i for i, dim in enumerate(spec.dims) if dim in dims), None)
        if axis is None or axis < num_leading or spec.role in (Role.NORM, Role.BALANCE):
            continue
        others = tuple(i for i in range(num_leading, len(spec.dims)) if i != axis)
        squares = jnp.square(array.astype(jnp.float32)).sum(others)
        score = squares / jnp.maximum(squares.mean(-1, keepdims=True), 1e-30)
        total = score if total is None else total + score
    return total


def _kept(is_first: bool, score: jax.Array, size: int) -> jax.Array:
    """Which entries of the last dim are kept, int32 [*l, size], ascending."""
    if is_first or size == score.shape[-1]:
        return jnp.broadcast_to(jnp.arange(size), (*score.shape[:-1], size))
    return jnp.sort(jax.lax.top_k(score, size)[1])


def _cut(array: jax.Array, spec: ParamSpec, dims: tuple[str, ...], index: jax.Array) -> jax.Array:
    """Returns the entries `index`, [*l, size], of each dim of an array that is one of `dims`.

    Scales and biases of the stream and of the experts have the dim "norm", as others do that are
    never cut: one whose size differs from the student's, `spec`, is of these.
    """
    kind = "experts" if spec.role == Role.BALANCE else "embed"
    for axis, (dim, size) in enumerate(zip(spec.dims, spec.shape, strict=True)):
        if dim == "norm":
            dim = kind if array.shape[axis] != size else dim
        if dim in dims:
            array = jnp.take_along_axis(array, along(index, axis, array.ndim), axis=axis)
    return array


def along(units: jax.Array, axis: int, ndim: int) -> jax.Array:
    """Returns [*l, n] with dims of 1 between and behind, so that n is dim `axis` of `ndim`."""
    shape = (*units.shape[:-1], *(1,) * (axis - units.ndim + 1), units.shape[-1])
    return units.reshape(*shape, *(1,) * (ndim - axis - 1))
