"""The container: metadata and tensors of a GGUF file, read and written (versions 2 and 3, little
endian).

A file is: magic, version, number of tensors, number of fields, the fields, what the tensors are,
and from the next multiple of the alignment on their data.  A large model is split: file i of N is
NAME-0000i-of-0000N.gguf, has some of the tensors, and the first has the metadata.
"""

import re
import struct
from typing import Any, NamedTuple

import numpy as np

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.gguf import blocks
from hunyuan_jax.storage import Place

_MAGIC = b"GGUF"
_ALIGNMENT = 32
_FIRST_BYTES = 1 << 20  # of a header, fetched first; then twice as many
# Types of fields by number; 8 is a string, 9 an array.
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
_NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class Tensor(NamedTuple):
    """One tensor: shape as in torch, rows first; kind one of blocks.KINDS; start in `file`."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    file: Place

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return blocks.num_bytes(self.kind, self.shape)


class Header(NamedTuple):
    """fields: metadata by name, with lists for arrays; tensors: in the order of the file."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def files_of(path: str) -> list[str]:
    """The names of all files of the model that a GGUF file is the first of, by its name."""
    part = _PART.fullmatch(path)
    if not part or int(part[2]) != 1:
        return [path]
    return [f"{part[1]}-{i:05d}-of-{part[3]}.gguf" for i in range(1, int(part[3]) + 1)]


def read_model(file: Place) -> Header:
    """What is in a GGUF file, and in the others that it is the first of.

    Raises:
      ConfigError: as `read_header`; another file than the first, one that is missing or belongs
        to another model.
    """
    first = read_header(file)
    folder, name = file.parent()
    count, names = first.fields.get("split.count", 0), files_of(name)
    if count <= 1:
        return first
    if len(names) != count:
        raise ConfigError(
            f"{file} is part {first.fields.get('split.no', 0) + 1} of {count} of a model; give "
            f"the first, of the name NAME-00001-of-{count:05d}.gguf, with the others beside it."
        )
    tensors = {}
    for i, name in enumerate(names):
        part = read_header(folder.inside(name)) if i else first
        found = part.fields.get("split.no"), part.fields.get("split.count")
        twice = sorted(tensors.keys() & part.tensors.keys())
        if found != (i, count) or twice:
            raise ConfigError(
                f"{folder.inside(name)}: split.no and split.count are {found}"
                + (f", and {twice[0]} is in an earlier part too" if twice else "")
                + f"; part {i + 1} has {(i, count)}. Copy all parts of one model again."
            )
        tensors |= part.tensors
    stated = first.fields.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise ConfigError(
            f"{file}: the model has {stated} tensors, and its {count} files {len(tensors)}. Copy "
            "all parts of one model again."
        )
    return Header(first.fields, tensors)


def read_header(file: Place) -> Header:
    """What is in one GGUF file, without its tensors' values.

    Raises:
      ConfigError: no such file, another format, a truncated or damaged file, a kind of tensor that
        is not read.
    """
    if not file.is_file():
        raise ConfigError(
            f"{file} is not a file; give the path of a GGUF file, with all its parts beside it."
        )
    return _parse(_Bytes(file))


class _Bytes:
    """A cursor over the beginning of a file."""

    def __init__(self, file: Place):
        self.file, self.size, self.position = file, file.size(), 0
        self._held = b""

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > self.size:
            raise ConfigError(
                f"{self.file} is truncated or damaged: it has {self.size} bytes, and its header "
                f"goes on to byte {end}. Copy the file again."
            )
        if end > len(self._held):
            wanted = min(self.size, max(end, 2 * len(self._held), _FIRST_BYTES))
            self._held += self.file.read(start=len(self._held), end=wanted)
        taken = self._held[self.position : end]
        self.position = end
        return taken

    def number(self, kind: str) -> Any:
        dtype = np.dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def text(self) -> str:
        return self.take(self.number("<u8")).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ConfigError(
                f"{self.file} is damaged: a field has the type {kind}, which GGUF does not have. "
                "Copy the file again."
            )
        kind, count = self.number("<u4"), self.number("<u8")
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return [self.value(kind) for _ in range(count)]


def _parse(data: _Bytes) -> Header:
    where = data.file.url
    if data.size < len(_MAGIC) or data.take(4) != _MAGIC:
        raise ConfigError(
            f"{where} is not a GGUF file: it does not begin with GGUF. Was it downloaded whole, "
            "and not as a git-lfs pointer?"
        )
    version = data.number("<u4")
    if version not in (2, 3):
        raise ConfigError(
            f"{where}: GGUF version {version}; little-endian files of version 2 and 3 are read. "
            "Convert the model again with a current llama.cpp."
        )
    num_tensors, num_fields = data.number("<u8"), data.number("<u8")
    fields = {}
    for _ in range(num_fields):
        name = data.text()
        fields[name] = data.value(data.number("<u4"))
    found = []
    for _ in range(num_tensors):
        name, num_dims = data.text(), data.number("<u4")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise ConfigError(f"{where} is damaged: {name} has {num_dims} dims.")
        shape = tuple(data.number("<u8") for _ in range(num_dims))[::-1]
        found.append((name, shape, data.number("<u4"), data.number("<u8")))
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ConfigError(f"{where}: general.alignment = {alignment!r} is not a positive integer.")
    first = -(-data.position // alignment) * alignment
    tensors = {}
    for name, shape, number, offset in found:
        tensor = Tensor(name, _kind(where, name, number, shape), shape, first + offset, data.file)
        if name in tensors or tensor.start + tensor.num_bytes > data.size:
            raise ConfigError(
                f"{where} is truncated or damaged: {name} lies at bytes {tensor.start} to "
                f"{tensor.start + tensor.num_bytes} of {data.size}"
                + (", and is there twice" if name in tensors else "")
                + ". Copy the file again."
            )
        tensors[name] = tensor
    return Header(fields, tensors)


def _kind(where: str, name: str, number: int, shape: tuple[int, ...]) -> str:
    kind = next((kind for kind, about in blocks.KINDS.items() if about.number == number), None)
    if kind is None:
        other = blocks.OTHER_KINDS.get(number, "unknown")
        raise ConfigError(
            f"{where}: {name} has the type {other} ({number}), which is not implemented; "
            f"{', '.join(blocks.KINDS)} are read. Take another file of the model, such as Q8_0."
        )
    size = blocks.KINDS[kind].size
    if shape[-1] % size:
        raise ConfigError(
            f"{where} is damaged: {name} {shape} has rows that blocks of {size} do not divide."
        )
    return kind


# --- Writing


def header(fields: dict[str, Any], tensors: list[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The bytes of a file before its first tensor.

    Each tensor then begins at a multiple of 32 bytes: after each, `padding` follows.

    Args:
      fields: by name: str, bool, int (uint32, int32 if negative), float (float32), or a list of
        them (integers are int32 there).
      tensors: (name, kind, shape with rows first) in order.
    """
    parts = [_MAGIC, struct.pack("<IQQ", 3, len(tensors), len(fields))]
    for name, value in fields.items():
        parts += [_text(name), _field(value)]
    start = 0
    for name, kind, shape in tensors:
        parts += [_text(name), struct.pack("<I", len(shape))]
        parts += [struct.pack("<Q", size) for size in reversed(shape)]
        parts.append(struct.pack("<IQ", blocks.KINDS[kind].number, start))
        size = blocks.num_bytes(kind, shape)
        start += size + len(padding(size))
    raw = b"".join(parts)
    return raw + padding(len(raw))


def padding(num_bytes: int) -> bytes:
    """What follows data of so many bytes, up to the alignment."""
    return bytes(-num_bytes % _ALIGNMENT)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _field(value: Any) -> bytes:
    if isinstance(value, list):
        kind = _kind_of(value[0]) if value else _STRING
        kind = 5 if kind == 4 else kind  # as llama.cpp wants its one list of integers
        if kind == _STRING:
            items = b"".join(map(_text, value))
        else:
            items = np.array(value, _NUMBERS[kind]).tobytes()
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + items
    kind = _kind_of(value)
    raw = _text(value) if kind == _STRING else np.array(value, _NUMBERS[kind]).tobytes()
    return struct.pack("<I", kind) + raw


def _kind_of(value: Any) -> int:
    if isinstance(value, str):
        return _STRING
    if isinstance(value, bool):
        return 7
    if isinstance(value, float):
        return 6
    return 4 if value >= 0 else 5
