"""A module's parameters without their numbers: shapes, dtypes, dims, roles and where they lie.

Initialisation, restoring, sharding and the optimizer read this one tree.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding

from hunyuan_jax.parallel import rules
from hunyuan_jax.params.roles import LOW_PRECISION_ROLES, Role
from hunyuan_jax.params.tree import path_of

# Dims along which a stored array stacks matrices of their own.
_STACKING_DIMS = ("layers", "experts")


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter as declared and, where its module is stacked, with the dim "layers" in front.

    shape, dtype: of the float32 master; dims: logical names; role: see `declare.Role`; sharding:
    in storage; is_trained: whether a run changes it by its gradient.  A leaf of a jax tree.
    """

    shape: tuple[int, ...]
    dtype: Any
    dims: tuple[str, ...]
    role: Role
    sharding: NamedSharding
    is_trained: bool = True

    @property
    def num_stacked(self) -> int:
        """Number of leading dims that stack whole matrices: layers, then experts."""
        return next(i for i, dim in enumerate((*self.dims, "")) if dim not in _STACKING_DIMS)

    @property
    def num_scale_dims(self) -> int | None:
        """Number of leading dims that have a scale each when it is quantised; None if it is not
        quantisable.
        """
        return self.num_stacked if self.role in LOW_PRECISION_ROLES else None

    def dtype_in_use(self, compute_dtype: str) -> str:
        """The dtype in which the model uses it: norms, biases and the router stay float32."""
        return compute_dtype if self.role in LOW_PRECISION_ROLES else "float32"

    def struct(self, dtype: Any = None) -> jax.ShapeDtypeStruct:
        """Shape, dtype (or another one) and sharding, as jax and orbax take them."""
        return jax.ShapeDtypeStruct(self.shape, dtype or self.dtype, sharding=self.sharding)


def abstract_module(
    new_module: Callable[[], nnx.Module], mesh: Mesh
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """(graph_def, nested dict of `ParamSpec`s) of a module; nothing is allocated.

    Raises:
      ConfigError: a dim that does not divide over the mesh.
    """
    graph_def, state = nnx.split(nnx.eval_shape(new_module))
    declared = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    shapes, treedef = jax.tree.flatten_with_path(nnx.to_pure_dict(state))

    def spec(path, shape, param):
        dims = param.get_metadata("dims")
        dims = ("layers",) * (len(shape.shape) - len(dims)) + dims
        sharding = rules.stored_sharding(mesh, dims, shape.shape, path_of(path))
        return ParamSpec(shape.shape, shape.dtype, dims, param.get_metadata("role"), sharding)

    specs = [spec(*leaf, param) for leaf, param in zip(shapes, declared, strict=True)]
    return graph_def, jax.tree.unflatten(treedef, specs)


def structs(specs: dict[str, Any]) -> dict[str, Any]:
    """The tree of `ParamSpec.struct`."""
    return jax.tree.map(ParamSpec.struct, specs)


def shardings(specs: dict[str, Any]) -> dict[str, Any]:
    """The tree of the parameters' shardings in storage."""
    return jax.tree.map(lambda spec: spec.sharding, specs)


def row_major(leaf: Any, spec: ParamSpec) -> Any:
    """The same, with an expert's matrices in memory row by row, as the kernels read them.

    A TPU lays them out otherwise by itself where a device's share of a row is not whole tiles;
    every call of a program then begins with a copy of all experts.

    Args:
      leaf: an array, a QuantArray of arrays, or their shapes with shardings.
    """
    if spec.role is not Role.EXPERT:
        return leaf

    def placed(x):
        where = Format(Layout(tuple(range(len(x.shape)))), x.sharding)
        return jax.device_put(x, where) if isinstance(x, jax.Array) else x.update(sharding=where)

    return jax.tree.map(placed, leaf)
