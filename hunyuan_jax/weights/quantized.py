"""Quantised official folders: FP8 with its scales is read, all else is refused by its name, so
that no code is ever taken for a value.
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from hunyuan_jax.errors import ConfigError

# Fields of config.json that say how weights are quantised: of transformers, of older
# compressed-tensors, of MLX.
_FIELDS = ("quantization_config", "compression_config", "quantization")
# How the names of other methods' tensors end.
_MARKS = {
    "GPTQ or AWQ": (".qweight", ".qzeros", ".g_idx"),
    "bitsandbytes": (".SCB", ".absmax", ".quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4"),
    "compressed-tensors": (".weight_packed", ".weight_zero_point", ".weight_shape"),
    "HQQ": (".W_q",),
    "MLX": (".scales", ".biases"),
}
_FP8_BLOCK = (128, 128)  # of transformers' FP8, where config.json does not say


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without what says how its weights are quantised; itself if they are not.

    Raises:
      ConfigError: a method that is not implemented.
    """
    stated = [name for name in _FIELDS if config.get(name) not in (None, {})]
    for name in stated:
        method = _method(config[name])
        if method not in ("", "fp8"):
            raise ConfigError(
                f"config.json: {name} says that the weights are quantised by {method}, which is "
                "not implemented; only FP8 (quant_method 'fp8') is read. Load the model that it "
                f"was made from; if its weights are plain numbers, delete {name}."
            )
    return {name: value for name, value in config.items() if name not in stated}


def fp8_block(config: dict[str, Any]) -> tuple[int, int]:
    """(rows, columns) that one entry of a two-dimensional FP8 scale is for.

    Raises:
      ConfigError: weight_block_size is something else than two positive integers.
    """
    about = config.get("quantization_config") or {}
    block = about.get("weight_block_size") or _FP8_BLOCK
    if [type(n) for n in np.ravel(block).tolist()] != [int, int] or min(block) < 1:
        raise ConfigError(
            f"config.json: quantization_config: weight_block_size = {block!r} must be two "
            "positive integers."
        )
    return tuple(block)


def refuse_codes(where: str, dtypes: dict[str, str], readable: Collection[str]) -> None:
    """Raises ConfigError if a file of weights holds something else than numbers.

    Args:
      where: the file.
      dtypes: by tensor name, as the file spells them.
      readable: the dtypes that are numbers.
    """
    for method, ends in _MARKS.items():
        if marks := [name for name in dtypes if name.endswith(ends)]:
            raise ConfigError(
                f"{where}: {marks[0]} is of weights quantised by {method}, which is not "
                "implemented. Load the model that it was made from."
            )
    for name, dtype in dtypes.items():
        if dtype not in readable:
            raise ConfigError(
                f"{where}: {name} has dtype {dtype}; only {', '.join(readable)} are read as "
                "numbers. Quantised weights are not implemented: load the model that they were "
                "made from, or save it in one of these dtypes."
            )


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
    return "fp8" if method == "fp8" else repr(method)
