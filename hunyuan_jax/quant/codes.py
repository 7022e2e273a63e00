"""`Codes`: one matrix of a model as a method stores it, in numpy, and the methods that make it.

Letters: O outputs and I inputs of the matrix, G groups of inputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.quant.easyquant import easyquant_int4

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_MAX_FP8 = 448.0
GROUP = 128
_FLOAT32 = np.dtype(np.float32)


class Codes(NamedTuple):
    """A matrix [O, I] as values * scale.

    values: int8 or float8_e4m3fn; scale: float32 [O, G], one for each output and each I / G
    inputs; bits: of a value.  position, value: flat positions (o * I + i) and bfloat16 values of
    the entries that are stored exactly, where values are zero; None without outliers.
    """

    values: np.ndarray
    scale: np.ndarray
    bits: int
    position: np.ndarray | None = None
    value: np.ndarray | None = None

    @property
    def kind(self) -> str:
        """What must be the same in all matrices of a stack."""
        name = "fp8" if self.values.dtype == FP8 else f"int{self.bits}"
        groups = "" if self.scale.shape[1] == 1 else f" in {self.scale.shape[1]} groups"
        return name + groups + (" with outliers" if self.position is not None else "")

    @property
    def num_bytes(self) -> int:
        """Bytes in a file."""
        outliers = 0 if self.position is None else self.position.nbytes + self.value.nbytes
        return self.values.size * self.bits // 8 + self.scale.nbytes + outliers


def int8(w_OI: np.ndarray, group: int) -> Codes:
    """Eight bits an entry, one scale for each output."""
    del group
    scale_O1 = _scale(np.abs(w_OI).max(axis=1, keepdims=True), 127)
    return Codes(_rounded(w_OI / scale_O1, 127), scale_O1, 8)


def int4(w_OI: np.ndarray, group: int) -> Codes:
    """Four bits an entry, one scale for each output and `group` inputs, round to nearest."""
    grouped = w_OI.reshape(len(w_OI), -1, group)
    scale_OG1 = _scale(np.abs(grouped).max(axis=2, keepdims=True), 7)
    return Codes(_rounded(grouped / scale_OG1, 7).reshape(w_OI.shape), scale_OG1[..., 0], 4)


def fp8(w_OI: np.ndarray, group: int) -> Codes:
    """float8_e4m3fn, one scale for each output."""
    del group
    scale_O1 = _scale(np.abs(w_OI).max(axis=1, keepdims=True), _MAX_FP8)
    return Codes((w_OI / scale_O1).astype(FP8), scale_O1, 8)


def easyquant(w_OI: np.ndarray, group: int) -> Codes:
    """EasyQuant's four bits (quant/easyquant.py), one scale for each output."""
    del group
    return Codes(*easyquant_int4(w_OI))


METHODS: dict[str, Callable[[np.ndarray, int], Codes]] = {
    "int8": int8,
    "int4": int4,
    "fp8": fp8,
    "easyquant": easyquant,
}


def quantize(name: str, w_OI: np.ndarray, method: str, group: int = GROUP) -> Codes:
    """A matrix in few bits.

    Args:
      name: for errors.
      w_OI: any floating dtype.
      method: one of METHODS.
      group: inputs of one scale of "int4".

    Raises:
      ConfigError: entries that are not finite.
    """
    w_OI = np.asarray(w_OI, np.float32)
    if not np.isfinite(w_OI.sum(dtype=np.float64)) and not np.isfinite(w_OI).all():
        raise ConfigError(f"{name} holds NaN or infinity; there is no scale for it.")
    return METHODS[method](w_OI, group)


def dequantized(codes: Codes, dtype: np.dtype = _FLOAT32) -> np.ndarray:
    """The matrix [O, I]; values * scale is computed in float32."""
    (num_out, num_in), num_groups = codes.values.shape, codes.scale.shape[1]
    grouped = codes.values.reshape(num_out, num_groups, num_in // num_groups).astype(np.float32)
    grouped *= codes.scale[:, :, None]
    dense = grouped.reshape(num_out, num_in).astype(dtype, copy=False)
    if codes.position is not None:
        dense.reshape(-1)[codes.position] = codes.value.astype(dtype)
    return dense


def _scale(largest: np.ndarray, most: float) -> np.ndarray:
    """Scale of entries up to `largest` in codes up to `most`; 1 for zeros."""
    return np.where(largest > 0, np.maximum(largest / most, 1e-30), 1.0).astype(np.float32)


def _rounded(x: np.ndarray, most: int) -> np.ndarray:
    return np.clip(np.rint(x), -most, most).astype(np.int8)
