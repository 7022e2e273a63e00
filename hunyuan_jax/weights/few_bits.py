"""Parameters read in few bits: codes that a folder holds, or made of its numbers while it is
read, one matrix at a time.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.params.abstract import ParamSpec
from hunyuan_jax.params.quantized import assembled, layout
from hunyuan_jax.params.roles import Role
from hunyuan_jax.params.tree import path_of
from hunyuan_jax.progress import in_order
from hunyuan_jax.quant.array import is_quantized
from hunyuan_jax.quant.codes import FP8, GROUP, METHODS, Codes, dequantized, quantize
from hunyuan_jax.weights import names
from pallas_kernels.chips import has_fp8_product, has_int8_product

# What --quantize takes: a method, one for embedding and head too, one that rounds activations too,
# or the numbers of a quantised folder.
NUMBERS = "none"
_HEAD = "+head"
_ROUNDS_INPUTS = {"w8a8": "int8", "w8a8-fp8": "fp8"}  # how the weights are stored
CHOICES = (*METHODS, f"int8{_HEAD}", f"fp8{_HEAD}", *_ROUNDS_INPUTS, NUMBERS)


def is_quantizable(entry: names.Entry, with_head: bool = False) -> bool:
    """Whether methods apply to a matrix: projections and experts, with_head embedding and head
    too.  Routers, norms and biases stay.
    """
    if entry.role in (Role.MATRIX, Role.EXPERT) and entry.is_transposed:
        return True
    return with_head and (entry.role == Role.EMBEDDING or entry.path == "lm_head/w_VD")


def group_of(entries: Iterable[names.Entry]) -> int:
    """Inputs of one scale of int4: 128, or less where that does not divide those of every matrix
    (transformers and vLLM know one size for a model).
    """
    widths = [entry.shape[1] for entry in entries if is_quantizable(entry)]
    return math.gcd(GROUP, *widths)


def check_method(cfg: ModelConfig, method: str | None, option: str) -> None:
    """Raises ConfigError if there is no such method, or not for this model."""
    if method is not None and method not in CHOICES:
        raise ConfigError(f"{option} = {method!r}; use {', '.join(CHOICES)}.")
    if method not in (None, NUMBERS) and (cfg.spark.neuron_share or cfg.latent.width):
        kind = "Spark" if cfg.spark.neuron_share else "latent attention"
        raise ConfigError(
            f"{option} = {method!r}: layers of {kind} are not quantised; leave it out."
        )


def check_product(method: str | None, device_kind: str, option: str) -> None:
    """Raises ConfigError if a method multiplies eight bits with eight bits and a device does not.

    Args:
      method: one of CHOICES or None.
      device_kind: jax's name of the devices.
      option: for errors.
    """
    needed = {"w8a8": has_int8_product, "w8a8-fp8": has_fp8_product}.get(method)
    if needed and not needed(device_kind):
        other = "w8a8-fp8" if has_fp8_product(device_kind) else "w8a8"
        raise ConfigError(
            f"{option} = {method!r}: {device_kind!r} has no such product of eight bits with eight "
            f"bits; use {other!r}, or {_ROUNDS_INPUTS[method]!r}, which keeps activations as "
            "numbers."
        )


def read(
    entries: Sequence[names.Entry],
    dtype: str,
    specs: dict[str, Any],
    method: str | None,
    tensor: Callable[[names.Entry], np.ndarray],
    codes: Callable[[names.Entry], Codes | None],
    *,
    is_frozen: bool = False,
) -> dict[str, Any]:
    """The parameters of a model, quantised ones as QuantArrays, on the devices of `specs`.

    Args:
      entries, dtype: of the model.
      specs: nested dict of their `ParamSpec`s.
      method: one of CHOICES; None keeps integer codes of a folder, and dequantises FP8.
      tensor: an official tensor as numbers.
      codes: its codes in the folder, or None.
      is_frozen: as for `params.quantized.assembled`.

    Raises:
      ConfigError: entries that are not finite, matrices of one parameter in different kinds.
    """
    by_path = names.by_path(entries)
    group = group_of(entries)
    with_head, method = (method or "").endswith(_HEAD), method and method.removesuffix(_HEAD)
    rounds_inputs, method = method in _ROUNDS_INPUTS, _ROUNDS_INPUTS.get(method, method)

    def few_bits(entry: names.Entry) -> Codes | None:
        if method == NUMBERS or not is_quantizable(entry, with_head):
            return None
        stored = codes(entry)
        if method is None:
            is_integers = stored is not None and np.issubdtype(stored.values.dtype, np.integer)
            return stored if is_integers else None
        if stored is not None and _is_of(stored, method):
            return stored
        dense = tensor(entry) if stored is None else dequantized(stored)
        return quantize(entry.name, dense, method, group)

    def one(path: tuple, spec: ParamSpec) -> Any:
        found = by_path[path_of(path)]
        made = {entry.index: value for entry, value in in_order(few_bits, found)}
        missing = [index for index, value in made.items() if value is None]
        if not missing:
            turned = found[0].is_transposed
            array = assembled(path_of(path), spec, made, is_transposed=turned, is_frozen=is_frozen)
            return array.replace(rounds_inputs=rounds_inputs)
        if len(missing) < len(made):
            raise ConfigError(
                f"{path_of(path)} is quantised in part: of its {len(made)} matrices "
                f"{len(missing)} are numbers, such as that at {missing[0]}. Layers and experts of "
                "one kind must have one method; use --quantize=none to compute with numbers."
            )
        array = np.empty(spec.shape, names.dtype_of(found[0], dtype))
        for entry in found:
            ours = names.to_ours(tensor(entry), entry, entry.our_shape)
            array[entry.index] = ours.astype(array.dtype, copy=False)
        return jax.make_array_from_callback(array.shape, spec.sharding, lambda i: array[i])

    return jax.tree.map_with_path(one, specs)


def abstract(
    cfg: ModelConfig, specs: dict[str, Any], method: str | None, *, is_frozen: bool = False
) -> dict[str, Any]:
    """What `read` gives for a method or None, as shapes, dtypes and shardings; adapters too.
    EasyQuant's outliers are left out.
    """
    entries = names.entries(cfg)
    by_path, group = names.by_path(entries), group_of(entries)
    rounds_inputs, method = method in _ROUNDS_INPUTS, _ROUNDS_INPUTS.get(method, method)

    def one(path: tuple, spec: ParamSpec) -> Any:
        if spec.role is Role.ADAPTER:
            return spec.struct()
        entry = by_path[path_of(path)][0]
        if method is None or not is_quantizable(entry):
            return spec.struct(names.dtype_of(entry, cfg.dtype))
        num_out, num_in = entry.shape
        num_groups = num_in // group if method == "int4" else 1
        codes = Codes(
            np.broadcast_to(np.zeros((), FP8 if method == "fp8" else np.int8), entry.shape),
            np.broadcast_to(np.float32(0), (num_out, num_groups)),
            4 if method in ("int4", "easyquant") else 8,
        )
        array = layout(spec, codes, is_transposed=entry.is_transposed, is_frozen=is_frozen)
        return array.replace(rounds_inputs=rounds_inputs)

    return jax.tree.map_with_path(one, specs)


def with_base(cfg: ModelConfig, specs: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """A tree of a run's parameters with what config.model.lora.quantize holds in few bits as
    QuantArrays of `ShapeDtypeStruct`s with shardings.
    """
    if cfg.lora.quantize == NUMBERS:
        return tree
    base = abstract(cfg, specs, cfg.lora.quantize, is_frozen=True)
    return jax.tree.map(
        lambda held, leaf: held if is_quantized(held) else leaf, base, tree, is_leaf=is_quantized
    )


def _is_of(codes: Codes, method: str) -> bool:
    kind = "easyquant" if codes.position is not None else codes.kind.split(" ")[0]
    return kind == method


def of_params(params: dict[str, Any]) -> Callable[[names.Entry], np.ndarray]:
    """The official tensors of parameters in memory, for `read`."""
    return functools.partial(names.read_tensor, params)
