"""Learned masks (TinyCLIP, arXiv 2309.12314): which units of a larger model a student inherits.

Every unit that a student cannot keep whole has a mask, a factor of its output.  Masks are trained
to say what the teacher says with as few units as the student has; the units whose masks are the
largest are inherited.

A mask is drawn from a hard concrete distribution (Louizos et al., arXiv 1712.01312), which is
exactly 0 or 1 most of the time.  Its parameter is a logit.  A Lagrangian holds the share p of each
row of masks that is above 0 at the student's share q: the loss has n (lambda (p - q) +
beta (p - q)^2), the multiplier lambda grows with p - q, and q falls from 1 over the first half of
the steps.

Letters: P groups, K kv heads, G query heads of a K/V head, n units of a row, l leading dims.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hunyuan_jax.config import DistillConfig
from hunyuan_jax.params.abstract import ParamSpec
from hunyuan_jax.params.roles import Role
from hunyuan_jax.post import inherit
from hunyuan_jax.post.inherit import Units, along

# Of the hard concrete distribution, as its authors have them: the temperature, and the interval
# that the sigmoid is stretched to before it is clipped to [0, 1].
_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1
_FIRST_LOGIT = 2.2  # two masks in three are 1 at first, and one in fifty is 0
_ADAM = optax.adam(0.1, b1=0.5)
# Simulated with rows of 2 to 256 units that each cost up to 0.3 of the loss, p came within 0.03 of
# q in 100 steps (docs/log.md).
_MULTIPLIER_RATE, _BETA = 0.3, 10.0


@dataclasses.dataclass(frozen=True)
class Rows:
    """Masks [*l, n], and the share of each n that the student keeps."""

    shape: tuple[int, ...]
    share: float


class State(NamedTuple):
    """logits: one for each mask; multipliers: lambda of each row of them, [*l]."""

    logits: Units
    multipliers: Units
    opt_state: Any


def rows_of(theirs: dict[str, Any], ours: dict[str, Any], cfg: DistillConfig) -> dict[str, Any]:
    """Returns the masks that are learned: `Units` with `Rows` in place of arrays.

    Units that the student keeps whole have none, nor have groups that `cfg` names, nor the layers
    of multi-token prediction.

    Args:
      theirs: `ParamSpec`s of the larger model.
      ours: those of the student.
      cfg: says what is kept.
    """

    def shapes(specs):
        structs = jax.tree.map(ParamSpec.struct, specs)
        return jax.eval_shape(functools.partial(inherit.scores, specs=specs), structs)

    def rows(large, small):
        if not isinstance(small, dict):
            return Rows(large.shape, small.shape[-1] / large.shape[-1])
        found = {name: rows(large[name], value) for name, value in small.items()}
        return {name: value for name, value in found.items() if _is_cut(value)}

    found = rows(shapes(theirs), shapes(ours))
    for name in inherit.stacks(ours):
        if name.startswith("mtp"):
            found.pop(name, None)
            continue
        sizes = [inherit.num_groups_of(specs[name]) for specs in (ours, theirs)]
        if sizes[0] < sizes[1] and not cfg.groups:
            found.setdefault(name, {})["groups"] = Rows(sizes[1:], sizes[0] / sizes[1])
    return found


def _is_cut(value: dict[str, Any] | Rows) -> bool:
    return bool(value) if isinstance(value, dict) else value.share < 1


def fixed(theirs: dict[str, Any], cfg: DistillConfig) -> Units:
    """Returns the masks that are not learned: 1 for the groups that `cfg` names, 0 for others."""
    if not cfg.groups:
        return {}
    groups = np.arange(inherit.num_groups_of(theirs["groups"]))  # layers of one kind
    return {"groups": {"groups": np.isin(groups, cfg.groups).astype(np.float32)}}


def masked(params: dict[str, Any], specs: dict[str, Any], masks: Units) -> dict[str, Any]:
    """Returns the parameters of a model in which each unit's output is multiplied by its mask;
    masks of 1 change nothing.

    What is multiplied are the matrices that write to the residual stream: the rows of a head, a
    column or an expert, all that a group writes, and the stream's entries, in the table of tokens
    too.

    Args:
      params: nested dict of arrays.
      specs: their `ParamSpec`s.
      masks: of some units; the others are 1.
    """
    table = next(spec for spec in jax.tree.leaves(specs) if spec.role == Role.EMBEDDING)

    def times(array, spec, of_stack, own):
        if not (spec is table or _is_write(spec, table.shape[-1])):
            return array
        by_axis = _by_axis(spec, of_stack, own)
        if "stream" in masks:
            by_axis[array.ndim - 1] = masks["stream"]
        for axis, mask in by_axis.items():
            array = array * along(mask, axis, array.ndim).astype(array.dtype)
        return array

    found = {
        name: jax.tree.map(functools.partial(times, of_stack={}, own={}), part, specs[name])
        for name, part in params.items()
    }
    for name in inherit.stacks(specs):
        of_stack = masks.get(name, {})
        for place, layer in params[name].items():
            of_layer = functools.partial(times, of_stack=of_stack, own=of_stack.get(place, {}))
            found[name][place] = jax.tree.map(of_layer, layer, specs[name][place])
    return found


def _is_write(spec: ParamSpec, width: int) -> bool:
    """Whether a layer's parameter is the last one before the residual stream."""
    if spec.dims[0] != "layers":
        return False
    if spec.role == Role.BIAS:
        return spec.dims[-1] == "norm"  # of the output; others are of heads
    is_matrix = spec.role in (Role.MATRIX, Role.EXPERT)
    return is_matrix and spec.dims[-1] == "embed" and spec.shape[-1] == width


def _by_axis(spec: ParamSpec, of_stack: Units, own: Units) -> dict[int, jax.Array]:
    """The masks of a layer's parameter, by the dim that they belong to."""
    found = {0: of_stack["groups"]} if "groups" in of_stack else {}
    if "heads" in spec.dims and ("kv_heads" in of_stack or "heads" in own):
        axis = spec.dims.index("heads")
        kv_PK = of_stack.get("kv_heads")
        if kv_PK is None:
            kv_PK = jnp.ones(own["heads"].shape[:2])
        mask_PKG = kv_PK[..., None] * own.get("heads", 1.0)
        shape = (*kv_PK.shape, spec.shape[axis] // kv_PK.shape[1])
        found[axis] = jnp.broadcast_to(mask_PKG, shape).reshape(len(kv_PK), -1)
    for kind, (dims, _) in inherit.IN_LAYERS.items():
        if kind in own and dims[0] in spec.dims:
            found[spec.dims.index(dims[0])] = own[kind]
    return found


def sample(logits: Units, key: jax.Array) -> Units:
    """Draws masks in [0, 1] from hard concrete distributions with these logits."""
    leaves, treedef = jax.tree.flatten(logits)

    def draw(logit, key):
        noise = jax.random.logistic(key, logit.shape)
        soft = jax.nn.sigmoid((noise + logit) / _TEMPERATURE)
        return jnp.clip(soft * (_HIGH - _LOW) + _LOW, 0.0, 1.0)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(treedef, list(map(draw, leaves, keys)))


def kept_share(logit: jax.Array) -> jax.Array:
    """Returns the expected share of masks above 0 in each row of logits, [*l]."""
    return jax.nn.sigmoid(logit - _TEMPERATURE * np.log(-_LOW / _HIGH)).mean(-1)


def learn(
    loss: Callable[[Units, Any], jax.Array],
    rows: dict[str, Any],
    batches: Iterable[Any],
    num_steps: int,
    key: jax.Array,
) -> Units:
    """Trains masks and returns their logits, float32: the larger, the more a unit matters.

    Args:
      loss: (masks, batch) -> the loss that they are to keep low, float32 scalar; can be traced.
      rows: the masks, as `rows_of` returns them.
      batches: one for each step, nested dicts of arrays.
      num_steps: number of steps.
      key: of the draws.
    """
    state, step = first_state(rows), jax.jit(step_of(loss, rows, num_steps), donate_argnums=0)
    for number, batch in zip(range(num_steps), batches, strict=False):
        state = step(state, batch, np.int32(number), key)
    return state.logits


def first_state(rows: dict[str, Any]) -> State:
    """Returns the state in which almost all masks are above 0."""
    logits = jax.tree.map(lambda row: jnp.full(row.shape, _FIRST_LOGIT), rows)
    multipliers = jax.tree.map(lambda row: jnp.zeros(row.shape[:-1]), rows)
    return State(logits, multipliers, _ADAM.init(logits))


def step_of(
    loss: Callable[[Units, Any], jax.Array], rows: dict[str, Any], num_steps: int
) -> Callable[[State, Any, jax.Array, jax.Array], State]:
    """Returns (state, batch, number of the step, key) -> the next state; arguments as `learn`."""

    def excess(row, logit, number):
        progress = jnp.minimum(1.0, 2 * (number.astype(jnp.float32) + 1) / num_steps)
        return kept_share(logit) - (1 + progress * (row.share - 1))

    def penalty(row, logit, multiplier, number):
        over = excess(row, logit, number)
        return row.shape[-1] * (multiplier * over + _BETA * jnp.square(over)).sum()

    def step(state, batch, number, key):
        def whole(logits):
            of_rows = functools.partial(penalty, number=number)
            parts = jax.tree.map(of_rows, rows, logits, state.multipliers)
            drawn = sample(logits, jax.random.fold_in(key, number))
            return loss(drawn, batch) + sum(jax.tree.leaves(parts))

        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32
            updates, opt_state = _ADAM.update(jax.grad(whole)(state.logits), state.opt_state)
        multipliers = jax.tree.map(
            lambda row, logit, old: old + _MULTIPLIER_RATE * excess(row, logit, number),
            rows,
            state.logits,
            state.multipliers,
        )
        return State(optax.apply_updates(state.logits, updates), multipliers, opt_state)

    return step
