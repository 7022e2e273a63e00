"""The tensors of an official model folder, found by their headers and read one at a time:
safetensors or .bin shards, BF16 or FP8.
"""

import hashlib
import json
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import json_object
from hunyuan_jax.params.roles import Role
from hunyuan_jax.weights import hf_config
from hunyuan_jax.weights import names as table
from hunyuan_jax.weights.storage import Place

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SCALE = re.compile(r"(.*)\.(weight_scale|input_scale|kv_scale|k_scale|v_scale)")
_SAMPLE = 65_536
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


class Weights:
    """A folder of weights.  Opening it reads headers only.

    config: config.json; tensors: by official name, in the order of the files; headers: raw header
    of each safetensors file by file name; index: bytes of the index, or None; others: names of the
    files beside the weights (tokenizer, code, generation config).
    """

    def __init__(self, place: Place):
        """Raises ConfigError: no config, no weights, missing or truncated shards, tensors twice,
        each by name.
        """
        self.place = place
        sizes = place.sizes()
        if "config.json" not in sizes:
            raise ConfigError(f"{place} is no model folder: it has no config.json.")
        self.config_bytes = place.read("config.json")
        self.config = json_object(f"{place}/config.json", self.config_bytes)
        self.index_name, files = self._files(sizes)
        self.index = place.read(self.index_name) if self.index_name else None
        self.headers: dict[str, bytes] = {}
        self.tensors: dict[str, Stored] = {}
        self._torch: tuple[str, dict[str, Any]] = ("", {})
        digest = hashlib.sha256(self.config_bytes)
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
            # The header tells the shapes, both ends of the data tell two trainings of one model
            # apart.
            ends = (
                place.read(file, 0, min(_SAMPLE, sizes[file])),
                place.read(file, max(0, sizes[file] - _SAMPLE), sizes[file]),
            )
            for part in (
                file.encode(),
                str(sizes[file]).encode(),
                self.headers.get(file, b""),
                *ends,
            ):
                digest.update(len(part).to_bytes(8, "little") + part)
        self.fingerprint = digest.hexdigest()
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

    def read(self, name: str) -> np.ndarray:
        """One tensor, read-only."""
        stored = self.tensors[name]
        if stored.start < 0:
            return _of_torch(self._load_bin(stored.file)[name])
        data = self.place.read(stored.file, stored.start, stored.start + stored.num_bytes)
        return np.frombuffer(data, stored.dtype).reshape(stored.shape)

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
                f"{where} is no safetensors file or is truncated; was it downloaded whole, and "
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
                f"{where} is no safetensors file: its header cannot be read ({e})."
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
        opened, tensors = self._torch
        if opened == file:
            return tensors
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
        self._torch = (file, tensors)
        return tensors


class Plan(NamedTuple):
    """Which source tensor is used for what.

    cfg: of the checkpoint to be made; hf: its config.json; tensors: entry -> source tensor;
    scales: entry name -> name of its factor;
    extra_scales: values of activation and cache scales, which the model does not use; dropped:
    tensors that are not kept;
    is_exact: whether an export can give the same bytes again.
    """

    cfg: ModelConfig
    hf: dict[str, Any]
    tensors: dict[table.Entry, Stored]
    scales: dict[str, str]
    extra_scales: dict[str, float]
    dropped: list[str]
    is_exact: bool


def plan(weights: Weights, dtype: str | None) -> Plan:
    """Gives every source tensor exactly one use and every target exactly one source.

    Args:
      dtype: of the parameters; None keeps torch_dtype of config.json.  The router is float32
        always.

    Raises:
      ConfigError: what `from_hf` refuses; tensors without a use, targets without a tensor, other
        shapes: all of them, by name.
    """
    hf = weights.config if dtype is None else hf_config.with_dtype(weights.config, dtype)
    quantization = hf.get("quantization_config")
    if quantization is not None:
        if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
            raise ConfigError(
                f"config.json: quantization_config = {quantization!r}; only quant_method 'fp8' "
                "can be read."
            )
        hf = {name: value for name, value in hf.items() if name != "quantization_config"}
    cfg = hf_config.from_hf(hf)
    unused, tensors, scales, extra = dict(weights.tensors), {}, {}, {}
    missing, wrong = [], []
    for entry in table.entries(cfg):
        stored = unused.pop(entry.name, None)
        if stored is None:
            missing.append(entry.name)
        elif stored.shape != entry.shape:
            wrong.append(f"{entry.name} {stored.shape}, not {entry.shape}")
        else:
            tensors[entry] = stored
        if stored is not None and stored.dtype == DTYPES["F8_E4M3"]:
            scale = entry.name.removesuffix("weight") + "weight_scale"
            if unused.pop(scale, None) is None:
                missing.append(scale)
            scales[entry.name] = scale
    dropped = [
        name for name in unused if name.endswith("rotary_emb.inv_freq")
    ]  # a buffer old saves hold; computed from the config
    tied_head = "lm_head.weight" if cfg.tie_embeddings and "lm_head.weight" in unused else None
    for name in dropped + [tied_head] * (tied_head is not None):
        del unused[name]
    for name in [
        name
        for name in unused
        if quantization and _SCALE.fullmatch(name) and not name.endswith("weight_scale")
    ]:
        extra[name] = read_scale(weights, name)
        del unused[name]
    problems = [
        f"{what}: {listed(names)}"
        for what, names in (
            ("tensors that its config.json asks for are missing", missing),
            ("tensors that such a model does not have", list(unused)),
            ("tensors of another shape", wrong),
        )
        if names
    ]
    if problems:
        raise ConfigError(f"{weights.place}: " + "; ".join(problems) + ".")
    target = DTYPES[{"float32": "F32", "bfloat16": "BF16"}[cfg.dtype]]
    other = [e.name for e, s in tensors.items() if s.dtype != target and e.role != Role.ROUTER]
    if other and dtype is None and not quantization:
        raise ConfigError(
            f"{weights.place}: config.json says torch_dtype {cfg.dtype}, but other dtypes are "
            f"stored in {listed(other)}; "
            f"say --dtype={cfg.dtype} to round them, or --dtype=float32."
        )
    if tied_head:
        head, embedding = weights.read(tied_head), weights.read("model.embed_tokens.weight")
        if (
            head.dtype != embedding.dtype
            or head.shape != embedding.shape
            or not np.array_equal(_bits(head), _bits(embedding))
        ):
            raise ConfigError(
                f"{weights.place}: lm_head.weight differs from model.embed_tokens.weight although "
                "config.json says tie_word_embeddings; "
                "set it to false to keep both."
            )
        dropped.append(tied_head)
    is_same_dtype = hf_config.dtype_of(hf) == hf_config.dtype_of(weights.config)
    is_exact = (
        bool(weights.headers)
        and is_same_dtype
        and not other
        and not quantization
        and set(dropped) <= {tied_head}
    )
    return Plan(cfg, hf, tensors, scales, extra, dropped, is_exact)


def read_scale(weights: Weights, name: str) -> float:
    """One per-tensor FP8 factor.

    Raises:
      ConfigError: not one positive finite number.
    """
    value = weights.read(name).astype(np.float32).reshape(-1)
    if value.size != 1 or not np.isfinite(value[0]) or value[0] <= 0:
        raise ConfigError(
            f"{weights.place}: {name} = {value[:4]} must be one positive number: only per-tensor "
            "FP8 scales can be read."
        )
    return float(value[0])


def header(tensors: list[tuple[str, np.dtype, tuple[int, ...]]]) -> bytes:
    """The first bytes of a safetensors file that holds these tensors in this order."""
    about: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        about[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(about, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def listed(names: list[str]) -> str:
    """Names for a message: all of them, up to a screenful."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{len(names)} ({', '.join(names[:_MAX_LISTED])}{more})" if len(names) > 1 else names[0]


def _numpy_dtype(place: Place, name: str, tensor: Any) -> np.dtype:
    names = {
        "torch.float32": "F32",
        "torch.bfloat16": "BF16",
        "torch.float16": "F16",
        "torch.float8_e4m3fn": "F8_E4M3",
    }
    if str(tensor.dtype) not in names:
        raise ConfigError(
            f"{place}: {name} has dtype {tensor.dtype}; only {', '.join(names)} can be read."
        )
    return DTYPES[names[str(tensor.dtype)]]


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
