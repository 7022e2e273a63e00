"""Weight inheritance (TinyCLIP, arXiv 2309.12314): a smaller model's parameters are cut out of a
larger one's.

What can be cut are whole CLA groups, K/V heads with their query heads, query heads of each K/V
head, experts, columns of MLPs and experts, and entries of the residual stream.  Everything follows
from the parameters' dims; the layers of a stack keep heads, experts and columns of their own.

Which are kept is decided by the magnitude of their weights, or by what the loss loses without them
to first order: the squares of weight times gradient, as in Fisher pruning (arXiv 1801.05787).

Letters: P groups, K kv heads, G query heads of a K/V head, n entries of a dim, l leading dims.
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

_STREAM = ("embed", "wide_embed")
_COLUMNS, _EXPERT_COLUMNS = ("ffn",), ("expert_ffn",)
_EXPERTS, _HEADS, _KV_HEADS = ("experts", "router_experts"), ("heads",), ("kv_heads",)


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


def inherit(
    params: dict[str, Any],
    theirs: dict[str, Any],
    ours: dict[str, Any],
    cfg: DistillConfig,
    importance: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the student's parameters, cut out of those of a larger model; can be traced.

    A student of the larger model's shape gets its parameters as they are.

    Args:
      params: nested dict of arrays, of the larger model.
      theirs: their `ParamSpec`s.
      ours: those of the student, for which `require_fits` has passed.
      cfg: says what is kept.
      importance: of each weight, as `params`; None: its absolute value.
    """
    # A weight and its importance are cut together: [..., 2].
    importance = params if importance is None else importance
    pairs = jax.tree.map(lambda *pair: jnp.stack(pair, axis=-1), params, importance)
    kept = functools.partial(_kept, cfg.inherit == "first")
    stream = kept(_scores(_leaves(pairs, theirs), _STREAM, 0), _size(ours, _STREAM))
    found = {}
    for name, specs in ours.items():
        part = pairs[name], theirs[name], specs
        is_stack = any(spec.dims[0] == "layers" for spec in jax.tree.leaves(specs))
        found[name] = _stack(*part, cfg, kept) if is_stack else part[0]
    cut = functools.partial(_cut, dims=_STREAM, index=stream)
    return jax.tree.map(lambda pair, spec: cut(pair, spec)[..., 0], found, ours)


def _stack(params, theirs, ours, cfg, kept):
    """The layers of one stack; the entries of the stream are all there still."""
    places = sorted(ours)
    num_groups, num_ours = (jax.tree.leaves(specs)[0].shape[0] for specs in (theirs, ours))
    if cfg.groups:
        groups = np.array(cfg.groups)
    elif cfg.inherit == "first":
        groups = np.arange(num_ours)
    else:
        groups = np.round(np.linspace(0, num_groups - 1, num_ours)).astype(int)
    layers = {place: jax.tree.map(lambda a: a[groups], params[place]) for place in places}

    def leaves(place):
        return _leaves(layers[place], theirs[place])

    def cut(place, dims, index):
        layers[place] = jax.tree.map(
            functools.partial(_cut, dims=dims, index=index), layers[place], ours[place]
        )

    # K/V heads: those of a group serve all of its layers.
    num_kv, num_ours_kv = (
        _size(specs, _KV_HEADS) or _size(specs, _HEADS) for specs in (theirs, ours)
    )
    by_kv = [
        _scores(leaves(place), _HEADS, 1).reshape(len(groups), num_kv, -1) for place in places
    ]
    score_PK = sum(score_PKG.sum(-1) for score_PKG in by_kv)
    score_PK += sum(_scores(leaves(place), _KV_HEADS, 1, 0.0) for place in places)
    kv_PK = kept(score_PK, num_ours_kv)
    for place, score_PKG in zip(places, by_kv, strict=True):
        score_PKG = jnp.take_along_axis(score_PKG, kv_PK[..., None], axis=1)
        query_PKG = kept(score_PKG, _size(ours, _HEADS) // num_ours_kv)
        index_PKG = kv_PK[..., None] * by_kv[0].shape[-1] + query_PKG
        cut(place, _HEADS, index_PKG.reshape(len(groups), -1))
        cut(place, _KV_HEADS, kv_PK)
    for place in places:
        for dims, num_leading in ((_EXPERTS, 1), (_COLUMNS, 1), (_EXPERT_COLUMNS, 2)):
            score = _scores(leaves(place), dims, num_leading)
            if score is not None:
                cut(place, dims, kept(score, _size(ours[place], dims)))
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
        squares = jnp.square(array[..., 1].astype(jnp.float32)).sum(others)
        score = squares / jnp.maximum(squares.mean(-1, keepdims=True), 1e-30)
        total = score if total is None else total + score
    return total


def _kept(is_first: bool, score: jax.Array, size: int) -> jax.Array:
    """Which entries of the last dim are kept, int32 [*l, size], ascending."""
    if is_first or size == score.shape[-1]:
        return jnp.broadcast_to(jnp.arange(size), (*score.shape[:-1], size))
    return jnp.sort(jax.lax.top_k(score, size)[1])


def _cut(array: jax.Array, spec: ParamSpec, dims: tuple[str, ...], index: jax.Array) -> jax.Array:
    """Returns the entries `index`, [*l, size], of each dim of a pair that is one of `dims`.

    Scales and biases of the stream and of the experts have the dim "norm", as others do that are
    never cut: one whose size differs from the student's, `spec`, is of these.
    """
    kind = "experts" if spec.role == Role.BALANCE else "embed"
    for axis, (dim, size) in enumerate(zip(spec.dims, spec.shape, strict=True)):
        if dim == "norm":
            dim = kind if array.shape[axis] != size else dim
        if dim in dims:
            num_between = axis - (index.ndim - 1)
            shape = (*index.shape[:-1], *(1,) * num_between, index.shape[-1])
            shape += (1,) * (array.ndim - axis - 1)
            array = jnp.take_along_axis(array, index.reshape(shape), axis=axis)
    return array
