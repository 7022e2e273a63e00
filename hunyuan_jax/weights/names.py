"""The one table between official tensor names and our parameter paths (docs/model.md, Tensor
names).

Only this file knows that torch linears are [out, in].
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.model.layout import locations
from hunyuan_jax.params.roles import KEPT_ROLES, Role
from hunyuan_jax.quant.array import dequantized, is_quantized


class Entry(NamedTuple):
    """One official tensor.

    name, shape: as in the checkpoint.
    path: '/'-joined path of our parameter; index: position of the tensor in its leading (stacked)
    dims.
    is_transposed: whether ours is [in, out] (with `in` or `out` split into heads); role: that of
    our parameter; our_shape: of the tensor in our layout, without the stacked dims; stacked: the
    sizes of those, groups and experts.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    index: tuple[int, ...]
    is_transposed: bool
    role: Role
    our_shape: tuple[int, ...]
    stacked: tuple[int, ...] = ()


def entries(cfg: ModelConfig) -> list[Entry]:
    """Every tensor of the official checkpoint, in the order the official module declares them."""
    D, V = cfg.hidden_size, cfg.vocab_size
    table = [
        Entry(
            "model.embed_tokens.weight",
            (V, D),
            "embed/embedding_VD",
            (),
            False,
            Role.EMBEDDING,
            (V, D),
        )
    ]
    for layer, at in enumerate(locations(cfg)):
        stacked = (at.stack.num_groups, at.stack.moe.num_experts)
        for tensor in at.facts.official_names(at.stack):
            index = (at.group,) if tensor.expert is None else (at.group, tensor.expert)
            table.append(
                Entry(
                    f"model.layers.{layer}.{tensor.name}",
                    tensor.shape,
                    f"{at.path}/{tensor.path}",
                    index,
                    tensor.is_transposed,
                    tensor.role,
                    tensor.our_shape,
                    stacked[: len(index)],
                )
            )
    if cfg.num_mtp_layers:
        table += _mtp(cfg)
    table.append(
        Entry("model.norm.weight", (D,), "final_norm/scale_D", (), False, Role.NORM, (D,))
    )
    if not cfg.tie_embeddings:
        table.append(
            Entry("lm_head.weight", (V, D), "lm_head/w_VD", (), False, Role.MATRIX, (V, D))
        )
    return table


def dtype_of(entry: Entry, dtype: str) -> np.dtype:
    """Of the parameter of an entry in a model of `dtype`: the router is float32 always."""
    return np.dtype(np.float32 if is_router(entry) else getattr(ml_dtypes, dtype, dtype))


def is_router(entry: Entry) -> bool:
    """Whether it is the router's matrix, or the bias on its choice."""
    return entry.role in KEPT_ROLES


def by_path(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The entries that each of our parameters consists of."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.path, []).append(entry)
    return found


def to_ours(tensor: np.ndarray, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
    """The official tensor in our layout; `shape` is that of our parameter without its stacked
    dims.
    """
    return (tensor.T if entry.is_transposed else tensor).reshape(shape)


def to_official(array: np.ndarray, entry: Entry) -> np.ndarray:
    """Returns our array (without stacked dims) as the official tensor, contiguous.

    Inverse of `to_ours`.
    """
    if not entry.is_transposed:
        return np.ascontiguousarray(array.reshape(entry.shape))
    return np.ascontiguousarray(array.reshape(entry.shape[::-1]).T)


def read_tensor(params: dict[str, Any], entry: Entry) -> np.ndarray:
    """The official tensor of an entry out of our parameters, a nested dict of arrays and
    QuantArrays, which are dequantised.
    """
    node: Any = params
    for name in entry.path.split("/"):
        node = node[name]
    if is_quantized(node):
        matrix = (node[entry.index] if entry.index else node).matrix()
        dense = np.asarray(dequantized(matrix, np.float32))
        return np.ascontiguousarray(dense if matrix.is_out_first else dense.T)
    return to_official(np.asarray(node[entry.index] if entry.index else node), entry)


def _mtp(cfg: ModelConfig) -> list[Entry]:
    """What stands around the layer of multi-token prediction, whose index is num_layers."""
    D, prefix = cfg.hidden_size, f"model.layers.{cfg.num_layers}"
    norms = [
        Entry(
            f"{prefix}.{official}.weight", (D,), f"mtp/{ours}/scale_D", (), False, Role.NORM, (D,)
        )
        for official, ours in (
            ("enorm", "embed_norm"),
            ("hnorm", "hidden_norm"),
            ("final_layernorm", "final_norm"),
        )
    ]
    name, shape = f"{prefix}.eh_proj.weight", (D, 2 * D)
    return [*norms, Entry(name, shape, "mtp/w_XD", (), True, Role.MATRIX, (2 * D, D))]
