"""How a parameter is declared: its shape, the name of each dim (mapped to mesh axes by
parallel/rules.py), its initialiser and its role.

The role says what a parameter is for.  Optimizer groups, the dtype in which it is used, which
parameters can be quantised and which are adapters follow from it, never from a name.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from hunyuan_jax.parallel import xla_workarounds
from hunyuan_jax.params.roles import Role
from hunyuan_jax.quant.array import QuantArray, dequantized
from hunyuan_jax.quant.scaled import Scaled, dequantize, is_scaled


def param(
    shape: tuple[int, ...],
    dims: tuple[str, ...],
    init: Callable[[tuple[int, ...]], jax.Array],
    role: Role,
) -> nnx.Param:
    """An nnx.Param that carries `dims` and `role` as metadata.

    Args:
      shape: one size for each of `dims`.
      dims: logical names of the dims, keys of `parallel.rules.RULES`.
      init: shape -> float32 array.
      role: see `Role`.
    """
    assert len(shape) == len(dims), (shape, dims)
    return nnx.Param(init(shape), dims=dims, role=role)


def normal(key: jax.Array, std: float) -> Callable[[tuple[int, ...]], jax.Array]:
    """Draws from N(0, std), as the official initialisation does for Linear and Embedding."""
    return lambda shape: jax.random.normal(key, shape, jnp.float32) * std


def ones(shape: tuple[int, ...]) -> jax.Array:
    """The initial norm scale."""
    return jnp.ones(shape, jnp.float32)


def zeros(shape: tuple[int, ...]) -> jax.Array:
    """The initial bias."""
    return jnp.zeros(shape, jnp.float32)


class Declared(NamedTuple):
    """A module's own parameters by attribute name: their arrays, and the names of their dims."""

    arrays: dict[str, jax.Array]
    dims: dict[str, tuple[str, ...]]


def declared(module: nnx.Module) -> Declared:
    """The parameters of `module` itself, without those of the modules in it: what it hands to its
    island.
    """
    own = {name: value for name, value in vars(module).items() if isinstance(value, nnx.Param)}
    return Declared(
        {name: param[...] for name, param in own.items()},
        {name: param.get_metadata("dims") for name, param in own.items()},
    )


class Weight(NamedTuple):
    """A parameter during training: what is stored, and the place where its gradient is collected.

    stored: the master weight, an array or a Scaled.
    tap: zeros of the parameter's shape in the dtype in which it is used.  Differentiating with
      respect to it gives the gradient in that dtype, whatever the dtype and the representation of
      `stored`.
    """

    stored: jax.Array | Scaled
    tap: jax.Array

    def use(self, group: jax.Array | None = None) -> jax.Array:
        """The parameter in the dtype of `tap`; `group` is the index of the CLA group it belongs
        to, inside the loop over them.
        """
        w = dequantize(self.stored, jnp.float32) if is_scaled(self.stored) else self.stored
        w = xla_workarounds.cast_inside_loop(w, self.tap.dtype, group)
        return _with_gradient_at(xla_workarounds.fusion_barrier(w), self.tap)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class FewBits:
    """A frozen parameter in few bits, and the dtype in which it is used."""

    codes: QuantArray
    dtype: str

    def __getitem__(self, index: Any) -> Self:
        """Itself for `...`, as a flax Variable asks."""
        assert index is Ellipsis
        return self

    def use(self, group: jax.Array | None = None) -> jax.Array:
        """The parameter as numbers; `group` as for `Weight.use`."""
        w = xla_workarounds.cast_inside_loop(
            dequantized(self.codes, jnp.float32), jnp.dtype(self.dtype), group
        )
        return xla_workarounds.fusion_barrier(w)


def in_use(tree: Any, group: jax.Array | None = None) -> Any:
    """`tree` with every Weight and FewBits replaced by its array; `group` as for `Weight.use`."""
    kinds = (Weight, FewBits)
    return jax.tree.map(
        lambda leaf: leaf.use(group) if isinstance(leaf, kinds) else leaf,
        tree,
        is_leaf=lambda x: isinstance(x, kinds),
    )


@jax.custom_vjp
def _with_gradient_at(w: jax.Array, tap: jax.Array) -> jax.Array:
    del tap
    return w


_with_gradient_at.defvjp(lambda w, tap: (w, None), lambda _, dw: (jnp.zeros_like(dw), dw))
