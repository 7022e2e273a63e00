"""Quantised official folders: which tensors hold a matrix, and its codes.  What is not
implemented is refused by its name, so that no code is ever taken for a value.

FP8 with scales of a tensor, an output or blocks; compressed-tensors in FP8, int8 and packed int4;
GPTQ in four bits; and EasyQuant, which is compressed-tensors' packed int4 with outliers beside it
(written by weights/quantize.py).  Letters: O outputs, I inputs, G groups of inputs.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.quant import codes as codes_lib
from hunyuan_jax.quant.codes import FP8, Codes

# Fields of config.json that say how weights are quantised: of transformers, of older
# compressed-tensors, of MLX.
_FIELDS = ("quantization_config", "compression_config", "quantization")
# How the names of methods' tensors end.
_MARKS = {
    "GPTQ or AWQ": (".qweight", ".qzeros", ".g_idx"),
    "bitsandbytes": (".SCB", ".absmax", ".quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4"),
    "compressed-tensors": (".weight_packed", ".weight_zero_point", ".weight_shape"),
    "HQQ": (".W_q",),
    "MLX": (".scales", ".biases"),
}
# Tensors of integers that a method has, by how their names end.
_GPTQ = {".qweight": "I32", ".qzeros": "I32", ".g_idx": "I32"}
_PACKED = {".weight_packed": "I32", ".weight_shape": "I64"}
_INTEGERS = {
    "gptq": _GPTQ,
    "int8": {".weight": "I8"},
    "packed": _PACKED,
    "easyquant": _PACKED | {".outlier_position": "I32"},
}
_OF_METHOD = {"gptq": ("GPTQ or AWQ",), "packed": ("compressed-tensors",)}
_OF_METHOD["easyquant"] = _OF_METHOD["packed"]
_FP8_BLOCK = (128, 128)  # of transformers' FP8, where config.json does not say


class Scheme(NamedTuple):
    """How a folder's weights are quantised.

    method: "" (not, or FP8 that config.json does not mention), "fp8", "int8", "packed" (int4 or
    int8 in int32), "easyquant" or "gptq"; bits: of a packed code; block: (rows, columns) of an
    entry of a two-dimensional FP8 scale; group: inputs of a scale, None where config.json does not
    say; zero_offset: what is added to GPTQ's stored zeros.
    """

    method: str = ""
    block: tuple[int, int] = _FP8_BLOCK
    group: int | None = None
    zero_offset: int = 1
    bits: int = 4


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without what says how its weights are quantised; itself if they are not.

    Raises:
      ConfigError: a method that is not implemented.
    """
    stated = [name for name in _FIELDS if config.get(name) not in (None, {})]
    scheme_of(config)
    return {name: value for name, value in config.items() if name not in stated}


def scheme_of(config: dict[str, Any]) -> Scheme:
    """How config.json says that the weights are quantised.

    Raises:
      ConfigError: a method that is not implemented, or fields that contradict it.
    """
    stated = [name for name in _FIELDS if config.get(name) not in (None, {})]
    schemes = [_scheme(name, config[name]) for name in stated]
    return next((scheme for scheme in schemes if scheme.method), Scheme())


def _scheme(field: str, about: Any) -> Scheme:
    method = _method(about)
    where = f"config.json: {field}"
    if method == "":
        return Scheme()
    if method == "fp8":
        return Scheme("fp8", _fp8_block(where, about))
    if method == "gptq":
        return _gptq_scheme(where, about)
    if method == "easyquant":
        return Scheme("easyquant")
    if method == "compressed-tensors" and (about.get("config_groups") or {}):
        return _compressed_scheme(where, about)
    raise ConfigError(
        f"{where} says that the weights are quantised by {_quoted(method)}, which is not "
        "implemented; FP8, compressed-tensors (FP8, int8, int4), GPTQ (int4) and EasyQuant are "
        f"read. Load the model that it was made from; if its weights are plain numbers, delete "
        f"{field}."
    )


def _gptq_scheme(where: str, about: dict[str, Any]) -> Scheme:
    bits, group = about.get("bits"), about.get("group_size", -1)
    form = about.get("checkpoint_format") or "gptq"
    is_group = type(group) is int and (group == -1 or group > 0)
    if bits != 4 or not is_group or form not in ("gptq", "gptq_v2"):
        raise ConfigError(
            f"{where}: GPTQ with bits = {bits!r}, group_size = {group!r}, checkpoint_format = "
            f"{form!r}; four bits in 'gptq' or 'gptq_v2' are read, in groups of so many inputs or "
            "-1 for all. Load the model that it was made from."
        )
    return Scheme("gptq", group=group if group > 0 else None, zero_offset=int(form == "gptq"))


def _compressed_scheme(where: str, about: dict[str, Any]) -> Scheme:
    groups = list(about["config_groups"].values())
    kinds = []
    for group in groups:
        weights = group.get("weights") or {}
        size = weights.get("group_size") if weights.get("strategy") == "group" else None
        kinds.append(
            (
                weights.get("type"),
                weights.get("num_bits"),
                weights.get("strategy"),
                size,
                weights.get("symmetric", True),
            )
        )
    if len(set(kinds)) > 1:
        raise ConfigError(
            f"{where}: config_groups name several methods ({len(kinds)}); a model has one. Load "
            "the model that it was made from."
        )
    kind, bits, strategy, size, is_symmetric = kinds[0]
    form = about.get("format")
    is_packed = form == "pack-quantized"
    found, strategies, formats = {
        ("float", 8): ("fp8", "tensor channel", ("float-quantized", "naive-quantized")),
        ("int", 8): ("int8", "tensor channel", ("int-quantized", "naive-quantized")),
    }.get((kind, bits), ("", "", ()))
    if is_packed and kind == "int" and bits in (4, 8):
        found, strategies, formats = "packed", "channel group", (form,)
    if strategy not in strategies.split() or not is_symmetric or form not in formats:
        raise ConfigError(
            f"{where}: weights of type {kind!r}, num_bits {bits!r}, strategy {strategy!r}, "
            f"symmetric {is_symmetric!r} in format {form!r} are not implemented; FP8 and int8 by "
            "tensor or channel and packed int4 and int8 by channel or group, symmetric, are read. "
            "Load the model that it was made from."
        )
    return Scheme(found, group=size, bits=bits)


def _fp8_block(where: str, about: dict[str, Any]) -> tuple[int, int]:
    block = about.get("weight_block_size") or _FP8_BLOCK
    if [type(n) for n in np.ravel(block).tolist()] != [int, int] or min(block) < 1:
        raise ConfigError(f"{where}: weight_block_size = {block!r} must be two positive integers.")
    return tuple(block)


def refuse_codes(
    where: str, dtypes: dict[str, str], readable: Collection[str], method: str = ""
) -> None:
    """Raises ConfigError if a file of weights holds something else than numbers, and codes of
    `method`.

    Args:
      where: the file.
      dtypes: by tensor name, as the file spells them.
      readable: the dtypes that are numbers.
      method: of a `Scheme`.
    """
    for other, ends in _MARKS.items():
        if other in _OF_METHOD.get(method, ()) or (method == "gptq" and other == "MLX"):
            continue
        if marks := [name for name in dtypes if name.endswith(ends)]:
            raise ConfigError(
                f"{where}: {marks[0]} is of weights quantised by {other}, which config.json does "
                "not say (quantization_config) or which is not implemented. Load the model that "
                "it was made from."
            )
    integers = _INTEGERS.get(method, {})
    for name, dtype in dtypes.items():
        if any(name.endswith(end) and dtype == its for end, its in integers.items()):
            continue
        if dtype not in readable:
            raise ConfigError(
                f"{where}: {name} has dtype {dtype}; only {', '.join(readable)} are read as "
                "numbers. Load the model that they were made from, or save it in one of these "
                "dtypes."
            )


def main_names(scheme: Scheme, name: str) -> tuple[str, ...]:
    """Names under which the codes of a weight may lie, its own first."""
    stem = name.removesuffix(".weight")
    ends = {"gptq": (".qweight",), "packed": (".weight_packed",)}
    ends["easyquant"] = ends["packed"]
    return (name, *(stem + end for end in ends.get(scheme.method, ())))


def parts(scheme: Scheme, main: str, dtype: np.dtype, names: Collection[str]) -> dict[str, str]:
    """The tensors that belong to a weight's main tensor, by what they are; {} for numbers.

    Args:
      scheme: of the folder.
      main: name of the tensor with the values, and its dtype.
      names: of the folder's tensors; one that is needed and not there is named all the same.
    """
    if main.endswith(".qweight"):
        stem = main.removesuffix("qweight")
        found = {"scale": stem + "scales", "zeros": stem + "qzeros", "group_of": stem + "g_idx"}
        if scheme.group and found["group_of"] not in names:
            del found["group_of"]
        return found
    if main.endswith(".weight_packed"):
        stem = main.removesuffix("weight_packed")
        found = {"scale": stem + "weight_scale"}
        if stem + "weight_shape" in names:
            found["shape"] = stem + "weight_shape"
        if scheme.method == "easyquant":
            found |= {
                "position": stem + "outlier_position",
                "value": stem + "outlier_value",
            }
        return found
    if dtype == FP8 or dtype == np.int8:
        stem = main.removesuffix(".weight")
        both = (f"{stem}.weight_scale", f"{stem}.weight_scale_inv")
        return {"scale": both[1] if both[1] in names else both[0]}
    return {}


def shape_of(scheme: Scheme, main: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape [O, I] of a weight from that of its main tensor; that itself if not packed."""
    if len(shape) == 2 and main.endswith(".qweight"):
        return shape[1], shape[0] * 8
    if len(shape) == 2 and main.endswith(".weight_packed"):
        return shape[0], shape[1] * (32 // scheme.bits)
    return shape


def codes_of(
    where: str, scheme: Scheme, main: str, arrays: Mapping[str, np.ndarray], names: dict[str, str]
) -> Codes | None:
    """A weight's codes; None if they are none of ours (scales of blocks, or by a permutation of
    the inputs, or with zero points), see `dense_of`.

    Args:
      where: the folder, for errors.
      scheme: of the folder.
      main: name of the tensor with the values.
      arrays: "main" and those of `parts`; names: their names.

    Raises:
      ConfigError: a scale that is zero, negative or not finite, groups of another size, outliers
        out of range: by name.
    """
    if main.endswith(".qweight"):
        codes_IO, zero_GO, scale_GO, group_I = _gptq(where, scheme, arrays, names)
        num_in, num_groups = len(codes_IO), len(scale_GO)
        is_ordered = num_in % num_groups == 0 and np.array_equal(
            group_I, np.arange(num_in) // (num_in // num_groups)
        )
        if not is_ordered or (zero_GO != 8).any():
            return None
        return Codes(np.ascontiguousarray((codes_IO - 8).astype(np.int8).T), scale_GO.T, 4)
    main_array = arrays["main"]
    bits = scheme.bits if main.endswith(".weight_packed") else 8
    if main.endswith(".weight_packed"):
        values_OI = (unpacked(main_array, 1, bits) - 2 ** (bits - 1)).astype(np.int8)
    else:
        values_OI = main_array
    if values_OI.ndim != 2:
        return None
    num_out, num_in = values_OI.shape
    stated = arrays.get("shape")
    if stated is not None and stated.tolist() != [num_out, num_in]:
        raise ConfigError(
            f"{where}: {names['shape']} holds {stated.tolist()}, but {main} has codes of a weight "
            f"{values_OI.shape}. The file is damaged; copy or quantise it again."
        )
    scale = _checked_scale(where, names["scale"], arrays["scale"])
    if scale.size == 1:
        scale_OG = np.full((num_out, 1), scale.reshape(()), np.float32)
    elif scale.shape in ((num_out,), (num_out, 1)):
        scale_OG = scale.reshape(num_out, 1)
    elif values_OI.dtype == FP8:
        return None
    elif scale.ndim == 2 and len(scale) == num_out and num_in % scale.shape[1] == 0:
        scale_OG = scale
    else:
        raise ConfigError(
            f"{where}: {names['scale']} {scale.shape} does not fit a weight {values_OI.shape}."
        )
    if scheme.group and scheme.group * scale_OG.shape[1] != num_in:
        raise ConfigError(
            f"{where}: {names['scale']} {scale.shape} has groups of {num_in // scale_OG.shape[1]} "
            f"inputs; config.json says group_size = {scheme.group}."
        )
    if scheme.method != "easyquant":
        return Codes(values_OI, scale_OG, bits)
    position, value = arrays["position"], arrays["value"]
    is_bad = position.shape != value.shape or position.ndim != 1
    is_bad = is_bad or (position < 0).any() or (position >= values_OI.size).any()
    is_bad = is_bad or (np.diff(position) <= 0).any()
    if is_bad or not np.isfinite(value.astype(np.float32)).all():
        raise ConfigError(
            f"{where}: {names['position']} {position.shape} with {names['value']} {value.shape} "
            f"are not outliers of a weight {values_OI.shape}: positions in it that rise, and "
            "finite numbers. The file is damaged; copy or quantise it again."
        )
    return Codes(values_OI, scale_OG, bits, position, value)


def dense_of(
    where: str,
    scheme: Scheme,
    main: str,
    arrays: Mapping[str, np.ndarray],
    names: dict[str, str],
    dtype: np.dtype,
) -> np.ndarray:
    """A quantised weight [O, I] as numbers; arguments and errors as `codes_of`."""
    if main.endswith(".qweight"):
        codes_IO, zero_GO, scale_GO, group_I = _gptq(where, scheme, arrays, names)
        dense_IO = scale_GO[group_I] * (codes_IO - zero_GO[group_I]).astype(np.float32)
        return np.ascontiguousarray(dense_IO.T).astype(dtype, copy=False)
    if arrays["main"].dtype == FP8:
        rows, columns = scheme.block
        values, scale = arrays["main"], _checked_scale(where, names["scale"], arrays["scale"])
        is_matrix = values.ndim == 2
        blocks = tuple(-(-n // m) for n, m in zip(values.shape, scheme.block, strict=False))
        if is_matrix and scale.size > 1 and scale.shape in ((len(values),), (len(values), 1)):
            return dequantized(values, scale.reshape(-1, 1), (1, values.shape[1]), dtype)
        if scale.size != 1 and not (is_matrix and scale.shape == blocks):
            raise ConfigError(
                f"{where}: {names['scale']} {scale.shape} does not fit {values.shape}; FP8 is "
                "read with scales that are positive numbers, one for a tensor, one for each "
                f"output or one for each block of {scheme.block} (weight_block_size)."
            )
        return dequantized(values, scale, (rows, columns), dtype)
    found = codes_of(where, scheme, main, arrays, names)
    assert found is not None
    return codes_lib.dequantized(found, dtype)


def _gptq(where, scheme, arrays, names):
    """(codes 0 to 15 [I, O], zeros [G, O], scales float32 [G, O], group of each input [I])."""
    codes_IO = unpacked(arrays["main"], axis=0)
    scale_GO = _checked_scale(where, names["scale"], arrays["scale"])
    zero_GO = unpacked(arrays["zeros"], axis=1) + scheme.zero_offset
    num_in, num_out = codes_IO.shape
    num_groups = len(scale_GO)
    if scale_GO.ndim != 2 or scale_GO.shape[1] != num_out or zero_GO.shape != scale_GO.shape:
        raise ConfigError(
            f"{where}: {names['scale']} {scale_GO.shape} and {names['zeros']} "
            f"{arrays['zeros'].shape} do not fit a weight of {num_out} outputs."
        )
    if scheme.group and num_groups != -(-num_in // scheme.group):
        raise ConfigError(
            f"{where}: {names['scale']} {scale_GO.shape} has {num_groups} groups; config.json "
            f"says group_size = {scheme.group}, of {num_in} inputs."
        )
    group_I = arrays.get("group_of")
    if group_I is None:
        group_I = np.arange(num_in) // scheme.group
    if group_I.shape != (num_in,) or (group_I < 0).any() or (group_I >= num_groups).any():
        raise ConfigError(
            f"{where}: {names['group_of']} {group_I.shape} must have a group from 0 to "
            f"{num_groups - 1} for each of {num_in} inputs; it holds {group_I.min()} to "
            f"{group_I.max()}."
        )
    return codes_IO, zero_GO, scale_GO, group_I


def _checked_scale(where: str, name: str, scale: np.ndarray) -> np.ndarray:
    """float32.

    Raises:
      ConfigError: an entry that is not a positive number.
    """
    scale = scale.astype(np.float32)
    is_good = np.isfinite(scale) & (scale > 0)
    if not is_good.all():
        raise ConfigError(
            f"{where}: {name} {scale.shape} holds {scale[~is_good].reshape(-1)[0]}; scales are "
            "positive numbers. The file is damaged; copy or quantise it again."
        )
    return scale


def unpacked(packed: np.ndarray, axis: int, bits: int = 4) -> np.ndarray:
    """Codes from 0 on, int32, as many of each int32 along `axis` as fit, lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    shifts = shifts if axis == 1 else shifts[:, None]
    codes = (np.expand_dims(packed.view(np.uint32), axis + 1) >> shifts) & (2**bits - 1)
    shape = (packed.shape[0], -1) if axis == 1 else (-1, packed.shape[1])
    return codes.astype(np.int32).reshape(shape)


def packed(values_OI: np.ndarray, bits: int = 4) -> np.ndarray:
    """int32 of codes int8 of 4 or 8 bits, as compressed-tensors packs them; I divides by as many
    as fit.
    """
    if bits == 8:
        return (values_OI.view(np.uint8) ^ 128).view(np.int32)
    nibbles = (values_OI + 8).astype(np.uint8).reshape(len(values_OI), -1, 2)
    return (nibbles[..., 0] | nibbles[..., 1] << 4).view(np.uint32).view(np.int32)


def dequantized(
    codes: np.ndarray, scale: np.ndarray, block: tuple[int, int], dtype: np.dtype
) -> np.ndarray:
    """FP8 codes [out, in] (or flat, with one scale) times their scale, in `dtype`; the product is
    float32.

    scale is float32: one number, or one for each `block` of rows and columns.
    """
    values = np.empty(codes.shape, dtype)
    if scale.size == 1:
        flat, factor = codes.reshape(-1), scale.reshape(())
        size = 1 << 20
        for i in range(0, flat.size, size):
            values.reshape(-1)[i : i + size] = flat[i : i + size].astype(np.float32) * factor
        return values
    rows, columns = block
    for i, scale_of_rows in enumerate(scale):
        factor = np.repeat(scale_of_rows, columns)[: codes.shape[1]]
        part = slice(i * rows, (i + 1) * rows)
        values[part] = codes[part].astype(np.float32) * factor
    return values


def _method(about: Any) -> str:
    """The method's name; "" if it says that nothing is quantised."""
    if not isinstance(about, dict):
        return repr(about)
    method = about.get("quant_method")
    if method in (None, "bitsandbytes"):
        bits = [about.get(f"load_in_{n}bit", about.get(f"_load_in_{n}bit")) for n in (4, 8)]
        if None not in bits and not any(bits):
            return ""
        return "bitsandbytes" if any(bits) else "MLX" if "bits" in about else repr(about)
    return str(method)


def _quoted(method: str) -> str:
    return method if method in ("bitsandbytes", "MLX") or "'" in method else repr(method)
