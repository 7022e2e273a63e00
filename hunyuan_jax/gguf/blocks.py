"""The kinds of GGUF's tensors: numbers, and blocks of few bits that become numbers and back.

A block is some entries of one row with their scales (llama.cpp, ggml/src/ggml-common.h and
ggml-quants.c).  Letters: B blocks, S entries of a block.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from hunyuan_jax.errors import ConfigError

_CHUNK = 1 << 20  # entries that become numbers at a time


class Kind(NamedTuple):
    """number: in files; size: entries of a block; dtype: of a block, or of a number; decode:
    blocks [B] -> float32 [B, S], None for numbers.
    """

    number: int
    size: int
    dtype: np.dtype
    decode: Callable[[np.ndarray], np.ndarray] | None = None


def _scale(blocks_B: np.ndarray, field: str) -> np.ndarray:
    return blocks_B[field].astype(np.float32)[:, None]


def _nibbles(bytes_BX: np.ndarray, width: int) -> np.ndarray:
    """uint8 [B, 2 X]: of each `width` bytes the low halves, then the high ones."""
    parts = bytes_BX.reshape(len(bytes_BX), -1, 1, width)
    return np.concatenate([parts & 15, parts >> 4], axis=2).reshape(len(bytes_BX), -1)


def _bits(bits_BX: np.ndarray, num_bits: int, width: int) -> np.ndarray:
    """uint8 [B, 8 / num_bits * X]: of each `width` bytes the lowest bits of all, then the next."""
    shift = np.arange(0, 8, num_bits, dtype=np.uint8)[:, None]
    parts = bits_BX.reshape(len(bits_BX), -1, 1, width) >> shift
    return (parts & (2**num_bits - 1)).reshape(len(bits_BX), -1)


def _q8_0(blocks_B):
    return blocks_B["q"].astype(np.float32) * _scale(blocks_B, "d")


def _q4_0(blocks_B):
    return (_nibbles(blocks_B["q"], 16).astype(np.float32) - 8) * _scale(blocks_B, "d")


def _q4_1(blocks_B):
    codes_BS = _nibbles(blocks_B["q"], 16).astype(np.float32)
    return codes_BS * _scale(blocks_B, "d") + _scale(blocks_B, "m")


def _fifth_bits(blocks_B):
    return np.unpackbits(blocks_B["high"], axis=1, bitorder="little") << 4


def _q5_0(blocks_B):
    codes_BS = _nibbles(blocks_B["q"], 16) | _fifth_bits(blocks_B)
    return (codes_BS.astype(np.float32) - 16) * _scale(blocks_B, "d")


def _q5_1(blocks_B):
    codes_BS = _nibbles(blocks_B["q"], 16) | _fifth_bits(blocks_B)
    return codes_BS.astype(np.float32) * _scale(blocks_B, "d") + _scale(blocks_B, "m")


def _of_eight_parts(codes_BS, blocks_B):
    """Codes times the scales of 32 entries each, minus their minima: of six bits, in 12 bytes."""
    a_B4, b_B4, c_B4 = np.split(blocks_B["scales"], 3, axis=1)
    scale_B8 = np.concatenate([a_B4 & 63, c_B4 & 15 | a_B4 >> 6 << 4], axis=1)
    least_B8 = np.concatenate([b_B4 & 63, c_B4 >> 4 | b_B4 >> 6 << 4], axis=1)
    scale_B8 = scale_B8.astype(np.float32) * _scale(blocks_B, "d")
    least_B8 = least_B8.astype(np.float32) * _scale(blocks_B, "m")
    numbers = codes_BS.astype(np.float32).reshape(len(codes_BS), 8, 32)
    return (numbers * scale_B8[..., None] - least_B8[..., None]).reshape(codes_BS.shape)


def _q4_k(blocks_B):
    return _of_eight_parts(_nibbles(blocks_B["q"], 32), blocks_B)


def _q5_k(blocks_B):
    codes_BS = _nibbles(blocks_B["q"], 32) | _bits(blocks_B["high"], 1, 32) << 4
    return _of_eight_parts(codes_BS, blocks_B)


def _q6_k(blocks_B):
    codes_BS = _nibbles(blocks_B["low"], 64) | _bits(blocks_B["high"], 2, 32) << 4
    numbers = (codes_BS.astype(np.float32) - 32).reshape(len(blocks_B), 16, 16)
    scale_B16 = blocks_B["scales"].astype(np.float32) * _scale(blocks_B, "d")
    return (numbers * scale_B16[..., None]).reshape(codes_BS.shape)


def _block(*fields: tuple[str, str, int]) -> np.dtype:
    return np.dtype([(name, kind) if n == 1 else (name, kind, (n,)) for name, kind, n in fields])


_D, _M = ("d", "<f2", 1), ("m", "<f2", 1)
_SCALES = ("scales", "u1", 12)
KINDS = {
    "F32": Kind(0, 1, np.dtype("<f4")),
    "F16": Kind(1, 1, np.dtype("<f2")),
    "BF16": Kind(30, 1, np.dtype(ml_dtypes.bfloat16)),
    "Q8_0": Kind(8, 32, _block(_D, ("q", "i1", 32)), _q8_0),
    "Q4_0": Kind(2, 32, _block(_D, ("q", "u1", 16)), _q4_0),
    "Q4_1": Kind(3, 32, _block(_D, _M, ("q", "u1", 16)), _q4_1),
    "Q5_0": Kind(6, 32, _block(_D, ("high", "u1", 4), ("q", "u1", 16)), _q5_0),
    "Q5_1": Kind(7, 32, _block(_D, _M, ("high", "u1", 4), ("q", "u1", 16)), _q5_1),
    "Q4_K": Kind(12, 256, _block(_D, _M, _SCALES, ("q", "u1", 128)), _q4_k),
    "Q5_K": Kind(13, 256, _block(_D, _M, _SCALES, ("high", "u1", 32), ("q", "u1", 128)), _q5_k),
    "Q6_K": Kind(
        14, 256, _block(("low", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), _D), _q6_k
    ),
}
# Names of those that are not read, for errors.
OTHER_KINDS = {9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS"}
OTHER_KINDS |= {18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"}
OTHER_KINDS |= {24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0"}
OTHER_KINDS |= {35: "TQ2_0", 39: "MXFP4"}


def num_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a file."""
    about = KINDS[kind]
    return math.prod(shape) // about.size * about.dtype.itemsize


def number_dtype(kind: str) -> np.dtype:
    """The dtype of a kind's numbers: float32 for blocks."""
    about = KINDS[kind]
    return about.dtype if about.decode is None else np.dtype(np.float32)


def numbers_of(where: str, kind: str, raw: bytes) -> np.ndarray:
    """The numbers of some blocks, flat, in `number_dtype`; a chunk at a time.

    Args:
      where: file and tensor, for errors.
      kind: one of KINDS.
      raw: whole blocks.

    Raises:
      ConfigError: a scale that is not finite.
    """
    about = KINDS[kind]
    blocks_B = np.frombuffer(raw, about.dtype)
    if about.decode is None:
        return blocks_B
    for field in {"d", "m"} & set(about.dtype.names):
        if not np.isfinite(blocks_B[field]).all():
            raise ConfigError(
                f"{where} ({kind}) has a block whose scale is not finite. The file is damaged; "
                "copy it again."
            )
    numbers_BS = np.empty((len(blocks_B), about.size), np.float32)
    step = _CHUNK // about.size
    for i in range(0, len(blocks_B), step):
        numbers_BS[i : i + step] = about.decode(blocks_B[i : i + step])
    return numbers_BS.reshape(-1)


def encoded(name: str, kind: str, tensor: np.ndarray) -> np.ndarray:
    """A tensor as uint8, in blocks of `kind`: F32, F16, BF16, Q8_0 or Q4_0, rounded as llama.cpp
    rounds.

    Raises:
      ConfigError: entries that are not finite, or too large for F16.
    """
    about, tensor = KINDS[kind], np.asarray(tensor, np.float32)
    largest = float(np.abs(tensor).max(initial=0))
    if not largest < (65_520 if kind == "F16" else np.inf):
        raise ConfigError(
            f"{name} holds {largest}, which {kind} does not have"
            + ("; use --gguf=bf16 or f32." if np.isfinite(largest) else "; the model is damaged.")
        )
    if about.decode is None:
        return np.ascontiguousarray(tensor, about.dtype).reshape(-1).view(np.uint8)
    x_BS = tensor.reshape(-1, about.size)
    blocks_B = np.empty(len(x_BS), about.dtype)
    if kind == "Q8_0":
        scale_B1 = np.abs(x_BS).max(axis=1, keepdims=True) / np.float32(127)
    else:  # of the entry that is furthest from zero, with its sign
        at_B1 = np.abs(x_BS).argmax(axis=1, keepdims=True)
        scale_B1 = np.take_along_axis(x_BS, at_B1, axis=1) / np.float32(-8)
    inverse_B1 = np.divide(1, scale_B1, out=np.zeros_like(scale_B1), where=scale_B1 != 0)
    scaled_BS = x_BS * inverse_B1
    if kind == "Q8_0":  # halves away from zero
        size_BS = np.abs(scaled_BS)
        whole_BS = np.floor(size_BS)
        blocks_B["q"] = np.copysign(whole_BS + np.floor(2 * (size_BS - whole_BS)), scaled_BS)
    else:
        codes_BS = np.clip(np.trunc(scaled_BS + np.float32(8.5)), 0, 15).astype(np.uint8)
        blocks_B["q"] = codes_BS[:, :16] | codes_BS[:, 16:] << 4
    blocks_B["d"] = scale_B1[:, 0]
    return blocks_B.view(np.uint8)
