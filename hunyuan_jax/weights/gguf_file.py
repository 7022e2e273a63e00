"""A GGUF file, with the others of a split one, seen as a model folder: its metadata as config.json
and the files of a tokenizer, its tensors as one file of safetensors with official names, whose
numbers are made when they are read.

So every reader of folders reads GGUF files.  Memory is that of the rows that are read.
"""

import bisect
import contextlib
import os
from typing import NamedTuple

import numpy as np

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import AnyPath, filesystem, user_path
from hunyuan_jax.gguf import blocks, container, vocabulary
from hunyuan_jax.weights import gguf_model, hf_config, names, write
from hunyuan_jax.weights.storage import Place

SUFFIX = ".gguf"
_WEIGHTS = "model.safetensors"


class _Part(NamedTuple):
    """One official tensor: its name and shape, the tensor that it lies in, its first byte there,
    and the heads that its rows are to be sorted by, 0 for none.
    """

    name: str
    shape: tuple[int, ...]
    tensor: container.Tensor
    start: int
    num_heads: int

    @property
    def dtype(self) -> np.dtype:
        """Of its numbers."""
        return blocks.number_dtype(self.tensor.kind)

    @property
    def row_bytes(self) -> int:
        """Bytes of the numbers of a row."""
        return int(np.prod(self.shape[1:])) * self.dtype.itemsize


class GgufFile(Place):
    """A GGUF file as a `Place`, which can only be read."""

    def __init__(self, path: str | os.PathLike):
        """Reads the headers; `path` is the first file of a split model.

        Raises:
          ConfigError: as `container.read_model` and `gguf_model.config_of`.
        """
        super().__init__(user_path(path, "the model", AnyPath))
        found = container.read_model(self.url)
        cfg = gguf_model.config_of(self.url, found)
        parts = _parts(found, gguf_model.tensors_of(cfg), cfg)
        parts.sort(key=lambda part: -part.dtype.itemsize)  # as `write.header` says
        head = write.header([(part.name, part.dtype, part.shape) for part in parts])
        ends = np.cumsum([len(head), *(part.shape[0] * part.row_bytes for part in parts)])
        self._parts, self._head, self._ends = parts, head, ends.tolist()
        self._files = {"config.json": write.as_json(hf_config.to_hf(cfg))}
        # Of another kind of tokenizer `load_tokenizer` says so; the weights can be used without.
        with contextlib.suppress(ConfigError):
            self._files |= vocabulary.folder_files(self.url, found.fields)

    def is_file(self, name: str) -> bool:
        """See `Place.is_file`."""
        return name in self.sizes()

    def sizes(self, folder: str = "") -> dict[str, int]:
        """See `Place.sizes`."""
        if folder:
            return {}
        return {name: len(text) for name, text in self._files.items()} | {_WEIGHTS: self._ends[-1]}

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """See `Place.read`."""
        if name in self._files:
            return self._files[name][start:end]
        if name != _WEIGHTS:
            raise FileNotFoundError(f"{self}/{name}")
        start, end = start or 0, self._ends[-1] if end is None else min(end, self._ends[-1])
        pieces = [self._head[start:end]] if start < len(self._head) else []
        at = max(start, len(self._head))
        while at < end:
            i = bisect.bisect_right(self._ends, at) - 1
            upto = min(end, self._ends[i + 1])
            pieces.append(self._numbers(self._parts[i], at - self._ends[i], upto - self._ends[i]))
            at = upto
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _numbers(self, part: _Part, start: int, end: int) -> memoryview:
        """The bytes [start, end) of a part's numbers, of which whole rows are made."""
        first, last = start // part.row_bytes, -(-end // part.row_bytes)
        if part.num_heads:  # rows of a head are all over it
            first, last = 0, part.shape[0]
        row_bytes = blocks.num_bytes(part.tensor.kind, part.shape) // part.shape[0]
        begin = part.tensor.start + part.start
        _, file = filesystem(part.tensor.path, "the model")
        raw = self._fs.cat_file(
            file, start=begin + first * row_bytes, end=begin + last * row_bytes
        )
        where = f"{part.tensor.path}: {part.tensor.name}"
        numbers = blocks.numbers_of(where, part.tensor.kind, raw)
        if part.num_heads:
            numbers = gguf_model.halves(numbers.reshape(part.shape), part.num_heads).reshape(-1)
        offset = first * part.row_bytes
        return numbers.view(np.uint8).data[start - offset : end - offset]


def _parts(
    found: container.Header, official: dict[str, list[names.Entry]], cfg: ModelConfig
) -> list[_Part]:
    """The official tensors of a file, in its order.  One that the model does not have keeps its
    name, and is refused by it.
    """
    architecture = found.fields["general.architecture"]
    parts = []
    for name, tensor in found.tensors.items():
        entries = official.get(name, [])
        is_stacked = len(tensor.shape) == 3 and len(entries) == tensor.shape[0]
        if not is_stacked:
            is_rotated = bool(entries) and gguf_model.is_rotated(architecture, name)
            heads = gguf_model.num_heads_of(cfg, name) if is_rotated else 0
            heads = heads if heads and tensor.shape[0] % (2 * heads) == 0 else 0
            known = entries[0].name if len(entries) == 1 else name
            parts.append(_Part(known, tensor.shape, tensor, 0, heads))
            continue
        size = tensor.num_bytes // len(entries)
        for i, entry in enumerate(entries):
            parts.append(_Part(entry.name, tensor.shape[1:], tensor, i * size, 0))
    return parts
