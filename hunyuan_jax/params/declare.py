"""How a parameter is declared: shape, initialiser and the logical name of each dim (mapped to mesh
axes by parallel/rules.py).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hunyuan_jax.quant.scaled import Scaled, dequantize, is_scaled


def normal(
    key: jax.Array, shape: tuple[int, ...], logical: tuple[str, ...], std: float
) -> nnx.Param:
    """A float32 matrix drawn from N(0, std), as the official initialisation does for Linear and
    Embedding.
    """
    assert len(shape) == len(logical), (shape, logical)
    return nnx.Param(jax.random.normal(key, shape, jnp.float32) * std, logical=logical)


def ones(shape: tuple[int, ...], logical: tuple[str, ...]) -> nnx.Param:
    """A float32 norm scale."""
    assert len(shape) == len(logical), (shape, logical)
    return nnx.Param(jnp.ones(shape, jnp.float32), logical=logical)


def zeros(shape: tuple[int, ...], logical: tuple[str, ...]) -> nnx.Param:
    """A float32 bias."""
    assert len(shape) == len(logical), (shape, logical)
    return nnx.Param(jnp.zeros(shape, jnp.float32), logical=logical)


_MAX_GROUPS = 2**30


class Declared(NamedTuple):
    """A module's own parameters by attribute name: their arrays, and the logical names of their
    dims.
    """

    arrays: dict[str, jax.Array]
    logical: dict[str, tuple[str, ...]]


def declared(module: nnx.Module) -> Declared:
    """The parameters of `module` itself, without those of the modules in it: what it hands to its
    island.

    One that lies apart is a tuple of arrays; the names are those of the dims that each of them
    has.
    """
    own = {name: value for name, value in vars(module).items() if isinstance(value, nnx.Param)}
    arrays = {name: param[...] for name, param in own.items()}
    logical = {name: param.get_metadata("logical") for name, param in own.items()}
    return Declared(
        arrays,
        {
            name: names[1:] if isinstance(arrays[name], tuple) else names
            for name, names in logical.items()
        },
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
    """A parameter whose leading dim is a tuple: arrays of their own, or an Apart again.

    A loop over a leading dim takes each part out of the whole before it multiplies with it;
    XLA:CPU does that by a copy, which for a few tokens costs as much as the products.
    """

    parts: tuple[Any, ...]

    def __getitem__(self, index: Any) -> Any:
        return self.parts if index is ... else self.parts[index]


def is_apart(leaf: Any) -> bool:
    """Whether a leaf of a tree of parameters is an Apart."""
    return isinstance(leaf, Apart)


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
        if w.dtype != self.tap.dtype:
            if group is not None:
                # A factor of one that the compiler cannot know before the loop: it would convert
                # the weights of all layers there, a second copy of the model.  It moves a plain
                # conversion past barriers (libtpu 0.0.50).
                w = w * jnp.where(group < _MAX_GROUPS, 1.0, 0.0)
            w = w.astype(self.tap.dtype)
        return _with_gradient_at(jax.lax.optimization_barrier(w), self.tap)


def in_use(tree: Any, group: jax.Array | None = None) -> Any:
    """`tree` with every Weight replaced by its array; `group` as for `Weight.use`."""
    return jax.tree.map(
        lambda leaf: leaf.use(group) if isinstance(leaf, Weight) else leaf,
        tree,
        is_leaf=lambda x: isinstance(x, Weight),
    )


@jax.custom_vjp
def _with_gradient_at(w: jax.Array, tap: jax.Array) -> jax.Array:
    del tap
    return w


_with_gradient_at.defvjp(lambda w, tap: (w, None), lambda _, dw: (jnp.zeros_like(dw), dw))
