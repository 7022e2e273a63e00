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

from hunyuan_jax import hub
from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.gguf import blocks, container, vocabulary
from hunyuan_jax.storage import HeldFiles, Place
from hunyuan_jax.weights import gguf_model, hf_config, names, write

SUFFIX = ".gguf"
# What an import and an export take along beside the weights.
_BESIDE_WEIGHTS = (*hub.TOKENIZER_FILES, "*.py", "*.txt", "LICENSE*", "License*", "NOTICE*")
_BESIDE_WEIGHTS += ("Notice*",)
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


def model_place(path: str | os.PathLike) -> Place:
    """The folder of a model, or its GGUF file seen as one.  Of a hub id the files beside the
    weights are fetched.

    Raises:
      ConfigError: as `Place` and `GgufFile`.
    """
    place = Place(path, patterns=_BESIDE_WEIGHTS)
    if not place.url.endswith(SUFFIX):
        return place
    folder, file = place.parent()
    folder.fetch(container.files_of(file))
    return GgufFile(place)


class GgufFile(HeldFiles):
    """A GGUF file as a `Place`, which can only be read."""

    def __init__(self, file: Place):
        """Reads the headers; `file` is the first one of a split model.

        Raises:
          ConfigError: as `container.read_model` and `gguf_model.config_of`.
        """
        found = container.read_model(file)
        cfg = gguf_model.config_of(file.url, found)
        parts = _parts(found, gguf_model.tensors_of(cfg), cfg)
        parts.sort(key=lambda part: -part.dtype.itemsize)  # as `write.header` says
        head = write.header([(part.name, part.dtype, part.shape) for part in parts])
        ends = np.cumsum([len(head), *(part.shape[0] * part.row_bytes for part in parts)])
        self._parts, self._head, self._ends = parts, head, ends.tolist()
        texts = {"config.json": write.as_json(hf_config.to_hf(cfg))}
        # Of another kind of tokenizer `load_tokenizer` says so; the weights can be used without.
        with contextlib.suppress(ConfigError):
            texts |= vocabulary.folder_files(file.url, found.fields)
        super().__init__(file, texts)

    def _listed(self, folder: str) -> dict[str, int]:
        return super()._listed(folder) | ({} if folder else {_WEIGHTS: self._ends[-1]})

    def read(self, name: str = "", start: int | None = None, end: int | None = None) -> bytes:
        """See `Place.read`."""
        if name != _WEIGHTS:
            return super().read(name, start, end)
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
        raw = part.tensor.file.read(start=begin + first * row_bytes, end=begin + last * row_bytes)
        where = f"{part.tensor.file}: {part.tensor.name}"
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
