"""Which files of a folder hold its weights, and where each tensor lies in them.

transformers' order: model.safetensors, its index of shards, pytorch_model.bin, its index.  A
complete set of shards without an index is read too.
"""

import json
import re
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.storage import Place
from hunyuan_jax.weights import quantized

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
# Of codes.
INTEGERS = {name: np.dtype(f"int{name[1:]}") for name in ("I8", "I32", "I64")}
_OF_TORCH = {
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.float8_e4m3fn": "F8_E4M3",
}
_SINGLES = ("model.safetensors", "pytorch_model.bin")
# A layer of multi-token prediction that lies beside the other files, in the index or not.
_MTP = "model-mtp.safetensors"
_SHARD = re.compile(r"(model|pytorch_model)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
# Files of weights in any format, those that cannot be read among them.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|npz|onnx|index\.json)", re.IGNORECASE
)
_MAX_LISTED = 40


class Stored(NamedTuple):
    """Where one tensor lies: the file, the first byte in it (-1 in a .bin), and what it is."""

    name: str
    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Shards(NamedTuple):
    """The weights of a folder, of which headers were read.

    tensors: by name, in the order of the files; sizes: bytes of each file; headers: raw header of
    each safetensors file; index_name, index: "" and None for a single file; bins: tensors of torch
    by name, for each .bin file.
    """

    tensors: dict[str, Stored]
    sizes: dict[str, int]
    headers: dict[str, bytes]
    index_name: str
    index: bytes | None
    bins: dict[str, dict[str, Any]]


def fetch(place: Place) -> None:
    """Fetches the weights of a hub id, safetensors if there are any, from the commit of its other
    files.
    """
    if not place.is_on_hub:
        return
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = f"{stem}.{suffix}.index.json"
        stated = place.read_json(index).get("weight_map") if place.is_file(index) else None
        named = stated.values() if isinstance(stated, dict) else ()
        files = sorted({file for file in named if isinstance(file, str)})
        place.fetch(files or [f"{stem}.{suffix}", f"{stem}-*-of-*.{suffix}"])
        if any(name.endswith(f".{suffix}") for name in place.names()):
            return


def find(place: Place, sizes: dict[str, int], method: str = "") -> Shards:
    """Reads the headers of a folder's weights.

    Args:
      place: the folder.
      sizes: of its files.
      method: how its weights are quantised, of a `quantized.Scheme`.

    Raises:
      ConfigError: no weights, files that are missing, truncated, quantised or outside the folder,
        a tensor in two files, an index that does not fit them.
    """
    index_name, files = _files(place, sizes)
    headers: dict[str, bytes] = {}
    bins: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Stored] = {}
    for file in files:
        if file.endswith(".bin"):
            bins[file] = _load_bin(place, file)
            found = _tensors_of_bin(f"{place}/{file}", file, bins[file])
        else:
            headers[file] = _header(f"{place}/{file}", place, file, sizes[file])
            where = f"{place}/{file}"
            found = _tensors_of_header(where, file, sizes[file], headers[file], method)
        for stored in found:
            if stored.name in tensors:
                raise ConfigError(
                    f"{place}: {stored.name} is in both {tensors[stored.name].file} and {file}; "
                    "a tensor has one place. Save or copy the folder again."
                )
            tensors[stored.name] = stored
    index = place.read(index_name) if index_name in sizes else None
    if files[0] in _SINGLES:
        # transformers does not read its index, which is kept if it says what the file does.
        if index is not None and not _describes(index, tensors):
            index_name, index = "", None
    elif index is not None:
        _check_index(f"{place}/{index_name}", json.loads(index)["weight_map"], tensors)
    elif index_name:
        index = _new_index(tensors)
    return Shards(tensors, {f: sizes[f] for f in files}, headers, index_name, index, bins)


def read_file(place: Place, file: str, size: int) -> dict[str, np.ndarray]:
    """All tensors of one safetensors or .bin file, by name, in the dtypes of the file.

    Raises:
      ConfigError: as `find`.
    """
    where = f"{place}/{file}"
    if file.endswith(".bin"):
        tensors = _load_bin(place, file)
        _tensors_of_bin(where, file, tensors)
        return {name: of_torch(tensor) for name, tensor in tensors.items()}
    raw = _header(where, place, file, size)
    data = place.read(file)
    return {
        stored.name: np.frombuffer(
            data, stored.dtype, stored.num_bytes // stored.dtype.itemsize, stored.start
        ).reshape(stored.shape)
        for stored in _tensors_of_header(where, file, size, raw)
    }


def of_torch(tensor: Any) -> np.ndarray:
    """A tensor of torch as an array that shares its memory."""
    import torch

    tensor = tensor.detach().contiguous()  # some saves hold nn.Parameters
    plain = {
        torch.bfloat16: (torch.int16, "BF16"),
        torch.float8_e4m3fn: (torch.uint8, "F8_E4M3"),
    }.get(tensor.dtype)
    return (
        tensor.numpy() if plain is None else tensor.view(plain[0]).numpy().view(DTYPES[plain[1]])
    )


def is_weights(name: str) -> bool:
    """Whether a file's name is that of weights or their index, in any format."""
    return bool(_WEIGHTS.fullmatch(name))


def listed(found: list[str]) -> str:
    """Names for a message: all of them, up to a screenful."""
    more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
    return f"{len(found)} ({', '.join(found[:_MAX_LISTED])}{more})" if len(found) > 1 else found[0]


# --- Files and index


def _files(place: Place, sizes: dict[str, int]) -> tuple[str, list[str]]:
    """(name of the index or "", weight files)."""
    more = [_MTP] if _MTP in sizes else []
    for single in _SINGLES:
        index = f"{single}.index.json"
        if single in sizes:
            return index if index in sizes else "", [single, *more]
        if index in sizes:
            return index, _promised_files(place, index, sizes)
    for single in _SINGLES:
        if files := _shards_without_index(place, single, sizes):
            files += more
            return f"{single}.index.json" if len(files) > 1 else "", files
    others = sorted(name for name in sizes if is_weights(name))
    if "adapter_config.json" in sizes:
        raise ConfigError(
            f"{place} is a PEFT adapter, not a model; give the folder of its base model, and this "
            "one as the adapter."
        )
    raise ConfigError(
        f"{place} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index "
        "of shards." + (f" It has {listed(others)}; only those names are read." if others else "")
    )


def _promised_files(place: Place, index: str, sizes: dict[str, int]) -> list[str]:
    where = f"{place}/{index}"
    promised = place.read_json(index).get("weight_map")
    if not isinstance(promised, dict) or not promised:
        raise ConfigError(
            f"{where} has no weight_map, an object of tensor names and files; copy it again, or "
            "delete it: a complete set of shards is read without an index."
        )
    files = list(promised.values())
    for file in files:
        if not isinstance(file, str) or not file.endswith((".safetensors", ".bin")):
            raise ConfigError(
                f"{where} names {file!r} as a file of weights; it must be a *.safetensors or "
                "*.bin of this folder. Copy the index again."
            )
        if "/" in file or "\\" in file:
            raise ConfigError(
                f"{where} names {file!r}; shards lie in the folder itself, and nothing outside is "
                "read. Put the file there and its plain name into the index."
            )
    files = sorted(set(files))
    if missing := [file for file in files if file not in sizes]:
        raise ConfigError(
            f"{where} names {len(files)} shards, but {listed(missing)} is not there; copy the "
            "whole folder."
        )
    return files


def _shards_without_index(place: Place, single: str, sizes: dict[str, int]) -> list[str]:
    """The files of the one complete set 1 .. N of shards, [] without any."""
    stem, suffix = single.split(".")
    found: dict[int, dict[int, str]] = {}
    for name in sorted(sizes):
        match = _SHARD.fullmatch(name)
        if match and (match[1], match[4]) == (stem, suffix):
            found.setdefault(int(match[3]), {})[int(match[2])] = name
    if len(found) > 1:
        raise ConfigError(
            f"{place} has no {single}.index.json and shards of several sets, of "
            f"{' and of '.join(map(str, sorted(found)))} files; copy the index too, or remove the "
            "files of the other set."
        )
    for count, files in found.items():
        missing = [str(i) for i in range(1, count + 1) if i not in files]
        if missing or len(files) != count:
            raise ConfigError(
                f"{place} has no {single}.index.json, and of its {count} shards number "
                f"{', '.join(missing[:_MAX_LISTED])} is missing; copy the whole folder."
            )
        return list(files.values())
    return []


def _check_index(where: str, promised: dict[str, str], tensors: dict[str, Stored]) -> None:
    """Raises ConfigError unless the index says where each tensor is."""
    wrong = [
        f"{name} is in {tensors[name].file}, not in {file}"
        if name in tensors
        else f"{name} is not in {file}"
        for name, file in promised.items()
        if name not in tensors or tensors[name].file != file
    ]
    wrong += [f"{name} of {s.file} is not named" for name, s in tensors.items()
              if name not in promised]  # fmt: skip
    if wrong:
        raise ConfigError(
            f"{where} and the shards disagree about {listed(wrong)}. Copy the folder again; if "
            "the shards are right, delete the index: a complete set is read without one."
        )


def _describes(index: bytes, tensors: dict[str, Stored]) -> bool:
    try:
        return json.loads(index)["weight_map"] == {name: s.file for name, s in tensors.items()}
    except (ValueError, KeyError, TypeError):
        return False


def _new_index(tensors: dict[str, Stored]) -> bytes:
    total = sum(stored.num_bytes for stored in tensors.values())
    files = {name: stored.file for name, stored in tensors.items()}
    about = {"metadata": {"total_size": total}, "weight_map": files}
    return (json.dumps(about, indent=2, sort_keys=True) + "\n").encode()


# --- safetensors


def _header(where: str, place: Place, file: str, size: int) -> bytes:
    """The raw header with its length."""
    length = int.from_bytes(place.read(file, 0, 8), "little") if size >= 8 else size
    if length + 8 > size:
        raise ConfigError(
            f"{where} is not a safetensors file or is truncated; was it downloaded whole, and not "
            "as a git-lfs pointer?"
        )
    return place.read(file, 0, 8 + length)


def _tensors_of_header(
    where: str, file: str, size: int, raw: bytes, method: str = ""
) -> list[Stored]:
    """The tensors of a safetensors file in the order of their bytes."""
    try:
        found = sorted(
            (*map(int, about["data_offsets"]), name, str(about["dtype"]), tuple(about["shape"]))
            for name, about in json.loads(raw[8:]).items()
            if name != "__metadata__"
        )
        is_bad = any(
            len(row) != 5 or not all(type(n) is int and n >= 0 for n in row[4]) for row in found
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ConfigError(
            f"{where} is not a safetensors file: its header cannot be read ({e})."
        ) from e
    if is_bad:
        raise ConfigError(f"{where} is not a safetensors file: its header has another form.")
    quantized.refuse_codes(where, {name: dtype for _, _, name, dtype, _ in found}, DTYPES, method)
    tensors, position = [], 0
    for begin, end, name, dtype, shape in found:
        stored = Stored(name, file, (DTYPES | INTEGERS)[dtype], shape, len(raw) + begin)
        if begin != position or end - begin != stored.num_bytes:
            raise ConfigError(
                f"{where}: {name} lies at bytes {begin} to {end}, which does not fit its shape "
                "and its neighbours."
            )
        tensors.append(stored)
        position = end
    if size != len(raw) + position:
        raise ConfigError(
            f"{where} is truncated or damaged: it has {size} bytes, its header asks for "
            f"{len(raw) + position}."
        )
    return tensors


# --- PyTorch


def _tensors_of_bin(where: str, file: str, tensors: dict[str, Any]) -> list[Stored]:
    dtypes = {name: str(tensor.dtype) for name, tensor in tensors.items()}
    quantized.refuse_codes(where, dtypes, _OF_TORCH)
    return [
        Stored(name, file, DTYPES[_OF_TORCH[dtypes[name]]], tuple(tensor.shape), -1)
        for name, tensor in tensors.items()
    ]


def _load_bin(place: Place, file: str) -> dict[str, Any]:
    if not place.is_local:
        raise ConfigError(
            f"{place}/{file} is a PyTorch pickle, which is mapped from a local disk only; copy "
            "the folder first."
        )
    try:
        import torch
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"{place}/{file} is a PyTorch pickle; reading it needs torch: pip install "
            "-e '.[torch]'."
        ) from e
    path = place.path(file)
    try:
        # Files of PyTorch before 1.6 are not archives, and cannot be mapped.
        is_archive = zipfile.is_zipfile(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as e:  # torch raises RuntimeError, UnpicklingError and more
        raise ConfigError(
            f"{place}/{file} cannot be read by torch.load(weights_only=True): "
            f"{str(e).splitlines()[0]}"
        ) from e
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in tensors.items()
    ):
        raise ConfigError(
            f"{place}/{file} is not a dict of tensors by name, which model.state_dict() is; save "
            "that."
        )
    return tensors
