"""What a kind of layer tells about itself without being built.  Imports no jax.

Beside its module, a mixer or feed-forward network has a facts file with three functions, summed
over the layers by model/count.py, plan/memory.py and weights/names.py:

    count(cfg, seq_len, shares) -> Count
    activation_bytes(cfg, sizes, shares) -> Activations
    official_names(cfg, shares) -> list[Tensor]

`shares` says whether the layer uses the keys and values of an earlier one; a feed-forward network
has no such argument.
"""

import dataclasses
from typing import NamedTuple, Protocol

from hunyuan_jax.params.roles import Role

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Count:
    """Of one mixer or feed-forward network.

    parameters: number by part, a field of `model.count.Counts`.
    matmul_weights: weights of the matrix products that a token goes through.
    idle: parameters that a token does not meet.
    flops_per_token: training FLOPs of one token besides those of `matmul_weights`.
    cache_bytes_per_token: that decoding keeps.
    """

    parameters: dict[str, int]
    matmul_weights: int
    idle: int = 0
    flops_per_token: int = 0
    cache_bytes_per_token: int = 0


class Sizes(Protocol):
    """What activation_bytes reads of `plan.memory.Sizes`, all per device.

    tokens: of one pass through the model; rows: of the expert buffers; expert_ways, tensor_ways:
    sizes of those mesh axes; element: bytes of an activation's element.
    """

    tokens: int
    rows: int
    expert_ways: int
    tensor_ways: int
    element: int


@dataclasses.dataclass(frozen=True)
class Activations:
    """Memory of one mixer or feed-forward network at work on one device; means over shards, not
    rounded.

    products: bytes that remat "dots" keeps: results of the wide matmuls, and what attention and
      the exchange bring.
    elementwise: bytes of the rest of the forward pass.
    backward: bytes of the backward pass besides the forward pass's.
    weights: elements of the weights when gathered; only the expert and tensor axes split them.
    """

    products: float
    weights: float
    elementwise: float = 0
    backward: float = 0


class Tensor(NamedTuple):
    """One official tensor of a layer.

    name, shape: as in the checkpoint; the name without `model.layers.<i>.`.
    path: of our parameter within the layer, '/'-joined; our_shape: of the tensor in our layout,
    without stacked dims; role: of our parameter.
    is_transposed: whether ours is [in, out] (with `in` or `out` split into heads).
    expert: its number, if our parameter stacks experts.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    our_shape: tuple[int, ...]
    role: Role
    is_transposed: bool = False
    expert: int | None = None


def linear_tensor(name: str, num_out: int, num_in: int, path: str, **facts) -> Tensor:
    """A torch Linear's weight [out, in]; ours is its transpose unless `our_shape` splits heads."""
    settings = {"our_shape": (num_in, num_out), "role": Role.MATRIX} | facts
    return Tensor(f"{name}.weight", (num_out, num_in), path, is_transposed=True, **settings)
