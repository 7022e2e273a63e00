"""The tensors of an official model folder, found by their headers and read one at a time:
safetensors or .bin shards, float32, BF16 or FP8, experts one by one or fused.
"""

import functools
import hashlib
import json
import math
import re
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import json_object
from hunyuan_jax.params.roles import Role
from hunyuan_jax.params.tree import path_of
from hunyuan_jax.tokenizer.files import stop_ids
from hunyuan_jax.weights import hf_config, names
from hunyuan_jax.weights.storage import Place

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_SCALE = re.compile(r"(.*)\.(weight_scale|input_scale|kv_scale|k_scale|v_scale)")
# Experts as transformers 5 has them in memory and can save them: gate_up_proj [E, 2 F, D] is gate
# above up, down_proj [E, D, F].
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
_FUSED = {
    "gate": ("gate_up_proj", 0, 2),
    "up": ("gate_up_proj", 1, 2),
    "down": ("down_proj", 0, 1),
}
_SAMPLE = 65_536
_BLOCK = 1 << 20
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


class Piece(NamedTuple):
    """Where the values of one entry lie: all of a tensor, or a part of a fused one.

    first: its first element in the tensor; shape: official; scale: name of its FP8 factor, or "".
    """

    stored: Stored
    first: int
    shape: tuple[int, ...]
    scale: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.size * self.stored.dtype.itemsize


class OfficialFolder:
    """A folder with official weights.  Opening it reads headers only.

    config: config.json; tensors: by official name, in the order of the files; headers: raw header
    of each safetensors file by file name; index: bytes of the index, or None; others: names of the
    files beside the weights (tokenizer, code, generation config).
    """

    def __init__(self, place: Place):
        """Reads the config and the list of tensors.

        Raises:
          ConfigError: no config, what `from_hf` refuses, no weights, missing or truncated shards,
            or duplicate tensors; the message lists them.
        """
        self.place = place
        sizes = place.sizes()
        if "config.json" not in sizes:
            raise ConfigError(
                f"{place} is not a model folder: it has no config.json. Give a folder with "
                "official weights, the --output of an import, or the --workdir of a run that has "
                "a checkpoint."
            )
        self.config_bytes = place.read("config.json")
        self.config = json_object(f"{place}/config.json", self.config_bytes)
        # An architecture that cannot be loaded is refused before its headers are read.
        hf_config.from_hf(hf_config.with_dtype(self.config, "float32"))
        self.index_name, files = self._files(sizes)
        self.index = place.read(self.index_name) if self.index_name else None
        self.headers: dict[str, bytes] = {}
        self.tensors: dict[str, Stored] = {}
        self._bins: dict[str, dict[str, Any]] = {}
        self._sizes = {file: sizes[file] for file in files}
        for file in files:
            found = (
                self._headers_of_bin(file)
                if file.endswith(".bin")
                else self._header(file, sizes[file])
            )
            for stored in found:
                if stored.name in self.tensors:
                    raise ConfigError(
                        f"{place}: {stored.name} is in both {self.tensors[stored.name].file} and "
                        f"{file}."
                    )
                self.tensors[stored.name] = stored
        is_weight = re.compile(r".*\.(safetensors|bin)(\.index\.json)?")
        self.others = [
            name
            for name in sorted(sizes)
            if name != "config.json" and not is_weight.fullmatch(name)
        ]
        if self.index is not None:
            promised = json.loads(self.index)["weight_map"]
            wrong = [
                name
                for name, file in promised.items()
                if name not in self.tensors or self.tensors[name].file != file
            ]
            wrong += [name for name in self.tensors if name not in promised]
            if wrong:
                raise ConfigError(
                    f"{place}/{self.index_name} and the shards disagree about {listed(wrong)}."
                )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells folders apart: config, headers, sizes, and both ends of each file, which differ
        for two trainings of one model.
        """
        digest = hashlib.sha256(self.config_bytes)
        for file, size in self._sizes.items():
            ends = (
                self.place.read(file, 0, min(_SAMPLE, size)),
                self.place.read(file, max(0, size - _SAMPLE), size),
            )
            for part in (file.encode(), str(size).encode(), self.headers.get(file, b""), *ends):
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def read(self, piece: Piece, dtype: np.dtype | None = None) -> np.ndarray:
        """Returns the values of an entry in the official layout, read-only; FP8 is dequantized.

        Args:
          piece: of a `Plan`.
          dtype: None is that of the file.
        """
        stored, end = piece.stored, piece.first + piece.size
        if stored.start < 0:
            flat = _of_torch(self._load_bin(stored.file)[stored.name]).reshape(-1)
            flat = flat[piece.first : end]
        else:
            begin, width = stored.start, stored.dtype.itemsize
            data = self.place.read(stored.file, begin + piece.first * width, begin + end * width)
            flat = np.frombuffer(data, stored.dtype)
        if piece.scale:
            factor = np.float32(self.read_scale(piece.scale))
            scaled = np.empty(flat.shape, np.dtype(np.float32) if dtype is None else dtype)
            for i in range(0, flat.size, _BLOCK):
                scaled[i : i + _BLOCK] = flat[i : i + _BLOCK].astype(np.float32) * factor
            flat = scaled
        flat = flat if dtype is None else flat.astype(dtype, copy=False)
        return flat.reshape(piece.shape)

    def read_tensor(self, name: str) -> np.ndarray:
        """A tensor of the files as it is."""
        stored = self.tensors[name]
        return self.read(Piece(stored, 0, stored.shape))

    def read_scale(self, name: str) -> float:
        """One per-tensor FP8 factor.

        Raises:
          ConfigError: not one positive finite number.
        """
        value = self.read_tensor(name).astype(np.float32).reshape(-1)
        if value.size != 1 or not np.isfinite(value[0]) or value[0] <= 0:
            raise ConfigError(
                f"{self.place}: {name} = {value[:4]} must be one positive number: only per-tensor "
                "FP8 scales can be read."
            )
        return float(value[0])

    def _files(self, sizes: dict[str, int]) -> tuple[str, list[str]]:
        """(index name or "", weight files)."""
        for single in ("model.safetensors", "pytorch_model.bin"):
            index = f"{single}.index.json"
            if index in sizes:
                promised = json_object(f"{self.place}/{index}", self.place.read(index)).get(
                    "weight_map"
                )
                if not isinstance(promised, dict) or not promised:
                    raise ConfigError(f"{self.place}/{index} has no weight_map.")
                files = sorted(set(promised.values()))
                missing = [file for file in files if file not in sizes]
                if missing:
                    raise ConfigError(
                        f"{self.place}/{index} names {len(files)} shards, but {listed(missing)} "
                        "is not there; copy the whole folder."
                    )
                return index, files
            if single in sizes:
                return "", [single]
        raise ConfigError(
            f"{self.place} holds no weights: neither model.safetensors nor pytorch_model.bin, nor "
            "an index of shards."
        )

    def _header(self, file: str, size: int) -> list[Stored]:
        """The tensors of a safetensors file in the order of their bytes."""
        where = f"{self.place}/{file}"
        length = int.from_bytes(self.place.read(file, 0, 8), "little") if size >= 8 else size
        if length + 8 > size:
            raise ConfigError(
                f"{where} is not a safetensors file or is truncated; was it downloaded whole, and "
                "not as a git-lfs pointer?"
            )
        raw = self.place.read(file, 0, 8 + length)
        try:
            header = json.loads(raw[8:])
            found = sorted(
                (tuple(about["data_offsets"]), name, about)
                for name, about in header.items()
                if name != "__metadata__"
            )
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ConfigError(
                f"{where} is not a safetensors file: its header cannot be read ({e})."
            ) from e
        self.headers[file] = raw
        tensors, position = [], 0
        for (begin, end), name, about in found:
            if about["dtype"] not in DTYPES:
                raise ConfigError(
                    f"{where}: {name} has dtype {about['dtype']}; only {', '.join(DTYPES)} can be "
                    "read."
                )
            stored = Stored(
                name, file, DTYPES[about["dtype"]], tuple(about["shape"]), 8 + length + begin
            )
            if begin != position or end - begin != stored.num_bytes:
                raise ConfigError(
                    f"{where}: {name} lies at bytes {begin} to {end}, which does not fit its "
                    "shape and its neighbours."
                )
            tensors.append(stored)
            position = end
        if size != 8 + length + position:
            raise ConfigError(
                f"{where} is truncated or damaged: it has {size} bytes, its header asks for "
                f"{8 + length + position}."
            )
        return tensors

    def _headers_of_bin(self, file: str) -> list[Stored]:
        return [
            Stored(name, file, _numpy_dtype(self.place, name, tensor), tuple(tensor.shape), -1)
            for name, tensor in self._load_bin(file).items()
        ]

    def _load_bin(self, file: str) -> dict[str, Any]:
        if file in self._bins:
            return self._bins[file]
        if not self.place.is_local:
            raise ConfigError(
                f"{self.place}/{file} is a PyTorch pickle, which is mapped from a local disk "
                "only; copy the folder first."
            )
        try:
            import torch
        except ModuleNotFoundError as e:
            raise ConfigError(
                f"{self.place}/{file} is a PyTorch pickle; reading it needs torch: pip install "
                "'hunyuan_jax[torch]'."
            ) from e
        try:
            tensors = torch.load(
                self.place.path(file), map_location="cpu", weights_only=True, mmap=True
            )
        except (
            Exception
        ) as e:  # torch raises RuntimeError, UnpicklingError and more for a damaged file
            raise ConfigError(
                f"{self.place}/{file} cannot be read by torch.load(weights_only=True): "
                f"{str(e).splitlines()[0]}"
            ) from e
        self._bins[file] = tensors
        return tensors


class Plan(NamedTuple):
    """What is read for what.

    cfg: of the model; hf: its config.json; pieces: entry -> where its values lie; extra_scales:
    values of activation and cache scales, which the model does not use; dropped: tensors that are
    not kept; rounded: tensors in another dtype than the one that config.json promises; is_exact:
    whether the same bytes can be written again.
    """

    cfg: ModelConfig
    hf: dict[str, Any]
    pieces: dict[names.Entry, Piece]
    extra_scales: dict[str, float]
    dropped: list[str]
    rounded: list[str]
    is_exact: bool


def plan(folder: OfficialFolder, dtype: str | None) -> Plan:
    """Gives every tensor exactly one use and every entry exactly one source.

    Args:
      folder: opened.
      dtype: of the parameters; None keeps torch_dtype of config.json.  The router is float32
        always.

    Raises:
      ConfigError: what `from_hf` refuses; tensors without a use, entries without a tensor, other
        shapes: all of them, by name.
    """
    hf = folder.config if dtype is None else hf_config.with_dtype(folder.config, dtype)
    quantization = hf.get("quantization_config")
    if quantization is not None:
        if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
            raise ConfigError(
                f"config.json: quantization_config = {quantization!r}; only quant_method 'fp8' "
                "can be read."
            )
        hf = {name: value for name, value in hf.items() if name != "quantization_config"}
    cfg = hf_config.from_hf(hf)
    unused, pieces, missing, wrong = dict(folder.tensors), {}, [], []
    for entry in names.entries(cfg):
        piece = _piece(folder.tensors, entry, cfg)
        if piece is None:
            missing.append(entry.name)
            continue
        unused.pop(piece.stored.name, None)
        if piece.shape != entry.shape:
            wrong.append(f"{entry.name} {piece.shape}, not {entry.shape}")
        if piece.stored.dtype == DTYPES["F8_E4M3"]:
            piece = piece._replace(
                scale=piece.stored.name.removesuffix(".weight") + ".weight_scale"
            )
            unused.pop(piece.scale, None)
            if piece.scale not in folder.tensors:
                missing.append(piece.scale)
        pieces[entry] = piece
    # A buffer that old saves hold; it is computed from the config.
    dropped = [name for name in unused if name.endswith("rotary_emb.inv_freq")]
    tied_head = "lm_head.weight" if cfg.tie_embeddings and "lm_head.weight" in unused else None
    extra = [
        name
        for name in unused
        if quantization and _SCALE.fullmatch(name) and not name.endswith("weight_scale")
    ]
    for name in dropped + extra + [tied_head] * (tied_head is not None):
        del unused[name]
    problems = [
        f"{what}: {listed(found)}"
        for what, found in (
            ("tensors that its config.json asks for are missing", missing),
            ("tensors that such a model does not have", list(unused)),
            ("tensors of another shape", wrong),
        )
        if found
    ]
    if problems:
        raise ConfigError(f"{folder.place}: " + "; ".join(problems) + ".")
    if tied_head:
        _check_tied_head(folder, tied_head)
        dropped.append(tied_head)
    target = DTYPES[{"float32": "F32", "bfloat16": "BF16"}[cfg.dtype]]
    rounded = [
        entry.name
        for entry, piece in pieces.items()
        if piece.stored.dtype != target and not is_router(entry)
    ]
    is_same_dtype = hf_config.dtype_of(hf) == hf_config.dtype_of(folder.config)
    is_exact = (
        bool(folder.headers)
        and is_same_dtype
        and not rounded
        and not quantization
        and set(dropped) <= {tied_head}
        and all(piece.shape == piece.stored.shape for piece in pieces.values())
    )
    rounded = rounded if dtype is None and not quantization else []
    extra_scales = {name: folder.read_scale(name) for name in extra}
    return Plan(cfg, hf, pieces, extra_scales, dropped, rounded, is_exact)


def read_params(folder: OfficialFolder, plan: Plan, shardings: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a folder, each in the memory of this process as a whole until it is on the
    devices of `shardings`.
    """
    entries: dict[str, list[names.Entry]] = {}
    for entry in plan.pieces:
        entries.setdefault(entry.path, []).append(entry)

    def read(path, sharding):
        found = entries[path_of(path)]
        shape = found[0].our_shape
        dtype = dtype_of(found[0], plan.cfg.dtype)
        array = np.empty((*names.stacked_shape(found[0], plan.cfg), *shape), dtype)
        for entry in found:
            tensor = folder.read(plan.pieces[entry], dtype)
            array[entry.index] = names.to_ours(tensor, entry, shape)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map_with_path(read, shardings)


def dtype_of(entry: names.Entry, dtype: str) -> np.dtype:
    """Of the parameter of an entry in a model of `dtype`: the router is float32 always."""
    return np.dtype(np.float32 if is_router(entry) else getattr(ml_dtypes, dtype, dtype))


def is_router(entry: names.Entry) -> bool:
    """Whether it is the router's matrix."""
    return entry.role == Role.ROUTER


def generation_stop_ids(place: Place) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, which is what `generate` of transformers stops at;
    () if there is none.

    Raises:
      ConfigError: something else than an integer or a list of integers.
    """
    if not place.is_file("generation_config.json"):
        return ()
    where = f"{place}/generation_config.json"
    fields = json_object(where, place.read("generation_config.json"))
    return stop_ids(where, fields.get("eos_token_id"))


def _piece(tensors: dict[str, Stored], entry: names.Entry, cfg: ModelConfig) -> Piece | None:
    """Finds an entry's values: a tensor of its name, or a fused one of the right shape."""
    if stored := tensors.get(entry.name):
        return Piece(stored, 0, stored.shape)
    expert = _EXPERT.fullmatch(entry.name)
    if not expert:
        return None
    name, part, num_parts = _FUSED[expert[3]]
    stored, (rows, columns) = tensors.get(expert[1] + name), entry.shape
    if not stored or stored.shape != (cfg.moe.num_experts, num_parts * rows, columns):
        return None
    return Piece(stored, (int(expert[2]) * num_parts + part) * rows * columns, entry.shape)


def _check_tied_head(folder: OfficialFolder, name: str) -> None:
    """Raises ConfigError unless the head is the copy of the embedding that .bin saves hold."""
    head, embedding = (folder.read_tensor(n) for n in (name, "model.embed_tokens.weight"))
    if (
        head.dtype != embedding.dtype
        or head.shape != embedding.shape
        or not np.array_equal(_bits(head), _bits(embedding))
    ):
        raise ConfigError(
            f"{folder.place}: {name} differs from model.embed_tokens.weight although config.json "
            "says tie_word_embeddings; set it to false to keep both."
        )


def listed(found: list[str]) -> str:
    """Names for a message: all of them, up to a screenful."""
    more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
    return f"{len(found)} ({', '.join(found[:_MAX_LISTED])}{more})" if len(found) > 1 else found[0]


def _numpy_dtype(place: Place, name: str, tensor: Any) -> np.dtype:
    dtypes = {
        "torch.float32": "F32",
        "torch.bfloat16": "BF16",
        "torch.float16": "F16",
        "torch.float8_e4m3fn": "F8_E4M3",
    }
    if str(tensor.dtype) not in dtypes:
        raise ConfigError(
            f"{place}: {name} has dtype {tensor.dtype}; only {', '.join(dtypes)} can be read."
        )
    return DTYPES[dtypes[str(tensor.dtype)]]


def _of_torch(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()  # some saves hold nn.Parameters
    plain = {
        torch.bfloat16: (torch.int16, "BF16"),
        torch.float8_e4m3fn: (torch.uint8, "F8_E4M3"),
    }.get(tensor.dtype)
    return (
        tensor.numpy() if plain is None else tensor.view(plain[0]).numpy().view(DTYPES[plain[1]])
    )


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)
