"""The parameters of a converted checkpoint on disk: zarr arrays that orbax restores, each chunk a
file of a few rows of one tensor.

A stacked parameter [groups, experts, rows, ...] has chunks [1, 1, some rows, ...], so it is filled
tensor by tensor.  A chunk file appears whole or not at all: those that are there are the journal
of a conversion.
"""

import json
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.storage import Place
from hunyuan_jax.weights import names as table

_MAX_CHUNK_BYTES = 16 << 20
_ZARR_DTYPES = {np.dtype(np.float32): "<f4", np.dtype(ml_dtypes.bfloat16): "bfloat16"}
# Exponent bits: a float whose exponent is all ones is infinite or not a number.
_EXPONENTS = {4: np.uint32(0x7F800000), 2: np.uint16(0x7F80)}


class Param(NamedTuple):
    """One parameter: shape = stacked + piece, where a piece is one official tensor; chunk_rows of
    a piece's first dim are a file.
    """

    folder: str
    stacked: tuple[int, ...]
    piece: tuple[int, ...]
    dtype: np.dtype

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk, spread evenly."""
        row_bytes = math.prod(self.piece[1:]) * self.dtype.itemsize
        num_chunks = math.ceil(self.piece[0] * row_bytes / max(_MAX_CHUNK_BYTES, row_bytes))
        return math.ceil(self.piece[0] / num_chunks)

    @property
    def num_chunks(self) -> int:
        """Chunks of a piece."""
        return math.ceil(self.piece[0] / self.chunk_rows)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of each chunk file; the last one of a piece is filled up with zeros."""
        return self.chunk_rows * math.prod(self.piece[1:]) * self.dtype.itemsize

    def key(self, index: tuple[int, ...], chunk: int) -> str:
        """File name of a chunk."""
        return ".".join(map(str, (*index, chunk, *[0] * (len(self.piece) - 1))))

    def keys(self) -> Iterator[str]:
        """File names of all chunks."""
        for index in np.ndindex(self.stacked):
            yield from (self.key(index, chunk) for chunk in range(self.num_chunks))

    def zarr(self) -> bytes:
        """Content of .zarray."""
        about = {
            "zarr_format": 2,
            "shape": [*self.stacked, *self.piece],
            "chunks": [*[1] * len(self.stacked), self.chunk_rows, *self.piece[1:]],
            "dtype": _ZARR_DTYPES[self.dtype],
            "compressor": None,
            "fill_value": None,
            "filters": None,
            "order": "C",
            "dimension_separator": ".",
        }
        return json.dumps(about).encode()


def params_of(entries: Iterable[table.Entry], dtype: str) -> dict[str, Param]:
    """Every parameter of a checkpoint of `dtype` by its path."""
    return {
        entry.path: Param(
            entry.path.replace("/", "."),
            entry.stacked,
            entry.our_shape,
            table.dtype_of(entry, dtype),
        )
        for entry in entries
    }


def tree_metadata(params: dict[str, Param]) -> bytes:
    """Content of orbax's _METADATA for nested dicts of arrays, one folder each."""
    tree = {}
    for path, param in params.items():
        names = path.split("/")
        tree[str(tuple(names))] = {
            "key_metadata": [{"key": name, "key_type": 2} for name in names],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": [*param.stacked, *param.piece],
            },
        }
    return json.dumps(
        {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, "custom_metadata": None}
    ).encode()


def encode(tensor: np.ndarray, entry: table.Entry, param: Param, chunk: int) -> np.ndarray:
    """One chunk of an official tensor in our layout and dtype.

    Raises:
      ConfigError: it holds a value that is not a finite number.
    """
    begin = chunk * param.chunk_rows
    end = min(begin + param.chunk_rows, param.piece[0])
    if entry.is_transposed:
        width = entry.shape[1] // param.piece[0]  # inputs of a row: 1, or those of a head
        columns = tensor[:, begin * width : end * width]
        rows = np.empty(columns.shape[::-1], tensor.dtype)
        transpose_into(rows, columns)
    else:
        rows = tensor.reshape(param.piece[0], -1)[begin:end]
    block = np.ascontiguousarray(rows, param.dtype).reshape(end - begin, -1)
    exponent = _EXPONENTS[param.dtype.itemsize]
    if ((block.view(exponent.dtype) & exponent) == exponent).any():
        raise ConfigError(
            f"{entry.name} holds NaN or infinity; the file is damaged, or the training diverged."
        )
    if end - begin < param.chunk_rows:
        block = np.concatenate(
            [block, np.zeros((param.chunk_rows - (end - begin), block.shape[1]), block.dtype)]
        )
    return block


def decode(place: Place, entry: table.Entry, param: Param) -> np.ndarray:
    """An official tensor from its chunks, in our dtype.

    Raises:
      ConfigError: a chunk that is not there or not whole.
    """
    tensor = np.empty(entry.shape, param.dtype)
    for chunk in range(param.num_chunks):
        rows = read_chunk(place, param, entry.index, chunk)
        begin = chunk * param.chunk_rows
        if entry.is_transposed:
            width = entry.shape[1] // param.piece[0]
            rows = rows.reshape(-1, entry.shape[0])
            transpose_into(tensor[:, begin * width : begin * width + len(rows)], rows)
        else:
            tensor.reshape(param.piece[0], -1)[begin : begin + len(rows)] = rows.reshape(
                len(rows), -1
            )
    return tensor


def read_piece(place: Place, param: Param, index: tuple[int, ...]) -> np.ndarray:
    """One piece in our layout.

    Raises:
      ConfigError: a chunk that is not there or not whole.
    """
    return np.concatenate(
        [read_chunk(place, param, index, chunk) for chunk in range(param.num_chunks)]
    )


def read_chunk(place: Place, param: Param, index: tuple[int, ...], chunk: int) -> np.ndarray:
    """The rows of one chunk, without what fills it up.

    Raises:
      ConfigError: it is not there or not whole.
    """
    name = f"{param.folder}/{param.key(index, chunk)}"
    try:
        data = place.read(name)
    except FileNotFoundError:
        data = b""
    if len(data) != param.chunk_bytes:
        raise ConfigError(
            f"{place}/{name} has {len(data)} bytes instead of {param.chunk_bytes}; import the "
            "checkpoint again."
        )
    rows = np.frombuffer(data, param.dtype).reshape(param.chunk_rows, *param.piece[1:])
    return rows[: param.piece[0] - chunk * param.chunk_rows]


def transpose_into(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source.T by tiles that stay in cache; several times quicker than numpy's own,
    which misses on every element.
    """
    height, width = 256, 64
    for i in range(0, source.shape[0], height):
        for j in range(0, source.shape[1], width):
            target[j : j + width, i : i + height] = source[i : i + height, j : j + width].T
