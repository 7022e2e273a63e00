"""Reading and writing official model folders: safetensors or .bin shards <-> a nested dict of
numpy arrays.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.params.roles import Role
from hunyuan_jax.weights import hf_config
from hunyuan_jax.weights import names as table

_MAX_SHARD_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"
# Kept and written again with a model, so that a saved folder can be used like the one it came
# from.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "hy.tiktoken",
)
_TEXTS = ("config.json", _INDEX, *SIDE_FILES)
_NUMPY_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Source(NamedTuple):
    """What a loaded folder must remember to be written again byte for byte.

    texts: config.json, a sharded folder's index, what generates and reads text beside them,
    verbatim by file name; files: official tensor name -> shard file, "" where the file has it as a
    part of a fused one; router_dtype: of mlp.gate.wg.weight in the files (it is float32 in memory
    whatever the files hold), or "" without experts.
    """

    texts: dict[str, str]
    files: dict[str, str]
    router_dtype: str

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return json.loads(self.texts["config.json"])


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
      ConfigError: no such file, or not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is no model folder: it has no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:  # not JSON, or not even UTF-8
        raise ConfigError(f"{path} is not valid JSON: {e}.") from e
    if not isinstance(config, dict):
        raise ConfigError(
            f"{path} holds a JSON {type(config).__name__}; a model's config.json is an object of "
            "fields."
        )
    return config


def read_model(
    folder: str | os.PathLike, dtype: str | None = None
) -> tuple[ModelConfig, dict[str, Any], Source]:
    """Loads a folder: (config, params as a nested dict of numpy arrays, source).

    Args:
      folder: config.json beside *.safetensors or pytorch_model*.bin.
      dtype: of parameters and activations; None keeps that of config.json.  The router is float32
        always.

    Raises:
      ConfigError: missing, unexpected or misshapen tensors, by name.
    """
    hf = read_config(folder)
    cfg = hf_config.from_hf(hf if dtype is None else hf_config.with_dtype(hf, dtype))
    cfg = dataclasses.replace(
        cfg, eos_token_ids=generation_stop_ids(Path(folder)) or cfg.eos_token_ids
    )
    wanted = {entry.name: entry for entry in table.entries(cfg)}
    params: dict[str, Any] = {}
    files, router_dtype = {}, ""
    tied_head = None
    for name, tensor, file in table.unfused(_tensors(Path(folder)), cfg):
        if name.endswith("rotary_emb.inv_freq"):
            continue  # a buffer old saves hold; it is computed from the config
        if name == "lm_head.weight" and cfg.tie_embeddings:
            tied_head = tensor  # .bin saves hold a copy of the embedding
            continue
        if name not in wanted:
            raise ConfigError(
                f"{Path(folder) / file} holds the tensor {name!r}, which a model of this "
                "config.json does not have."
            )
        entry = wanted.pop(name)
        if tensor.shape != entry.shape:
            raise ConfigError(
                f"{Path(folder) / file}: {name} has shape {tensor.shape}; config.json asks for "
                f"{entry.shape}."
            )
        files[name] = file
        if entry.role == Role.ROUTER:
            router_dtype = str(tensor.dtype)
        _store(params, entry, tensor, cfg)
    if wanted:
        raise ConfigError(
            f"{folder} lacks {len(wanted)} tensors that its config.json asks for, the first one "
            f"{next(iter(wanted))}."
        )
    if tied_head is not None and not np.array_equal(
        _bits(tied_head.astype(_NUMPY_DTYPES[cfg.dtype])), _bits(params["embed"]["embedding_VD"])
    ):
        raise ConfigError(
            f"{folder}: lm_head.weight differs from model.embed_tokens.weight although "
            "config.json says tie_word_embeddings; "
            "set it to false to keep both."
        )
    texts = {
        name: (Path(folder) / name)
        .read_bytes()
        .decode(errors="surrogateescape")  # read_text would change the ends of lines
        for name in _TEXTS
        if (Path(folder) / name).is_file()
    }
    return cfg, params, Source(texts, files, router_dtype)


def write_model(
    folder: str | os.PathLike, cfg: ModelConfig, params: dict[str, Any], source: Source | None
) -> None:
    """Writes config.json and safetensors shards under the official names; with `source`, in its
    files and dtypes.

    Args:
      params: nested dict of arrays, as `read_model` gives.
      source: of the folder the model came from; None for a model trained here.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    all_entries = table.entries(cfg)
    is_same_dtype = source is not None and hf_config.dtype_of(source.config) == cfg.dtype

    def tensor_dtype(entry):
        if entry.role != Role.ROUTER:
            return _NUMPY_DTYPES[cfg.dtype]
        return np.dtype(source.router_dtype) if is_same_dtype else np.dtype(np.float32)

    is_same_layout = is_same_dtype and all(
        file.endswith(".safetensors") for file in source.files.values()
    )
    files = source.files if is_same_layout else shards(all_entries, tensor_dtype)
    for file in dict.fromkeys(files.values()):
        tensors = {
            e.name: table.to_official(_lookup(params, e), e).astype(tensor_dtype(e))
            for e in all_entries
            if files[e.name] == file
        }
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})

    texts = dict(source.texts) if source else {}
    if not is_same_layout:
        texts.pop(_INDEX, None)
        texts["config.json"] = _json(
            hf_config.with_dtype(source.config, cfg.dtype) if source else hf_config.to_hf(cfg)
        )
        if len(set(files.values())) > 1:
            total_size = sum(int(np.prod(e.shape)) * tensor_dtype(e).itemsize for e in all_entries)
            texts[_INDEX] = _json({"metadata": {"total_size": total_size}, "weight_map": files})
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    # What an earlier save left here would be read first (an index), or with this one (a shard).
    for path in folder.iterdir():
        if re.fullmatch(
            r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", path.name
        ) and path.name not in {*files.values(), *texts}:
            path.unlink()


def generation_stop_ids(folder: Path) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, which is what `generate` of transformers stops at;
    () if there is none.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    try:
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as e:
        raise ConfigError(f"{path} is not a JSON object: {e}.") from e
    ids = hf_config.stop_ids(eos)
    if any(type(i) is not int for i in ids):
        raise ConfigError(
            f"{path}: eos_token_id = {eos!r} must be an integer or a list of integers."
        )
    return ids


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray, str]]:
    """(name, array, file name) of every tensor, one in memory at a time for safetensors."""
    shards = _shard_files(folder)
    for shard in shards:
        if shard.suffix == ".bin":
            yield from ((name, array, shard.name) for name, array in _read_bin(shard))
            continue
        try:
            handle = safe_open(shard, "np")
        except SafetensorError as e:
            raise ConfigError(
                f"{shard} is no safetensors file ({e}); was it downloaded whole, and not as a "
                "git-lfs pointer?"
            ) from e
        with handle as f:
            for name in f.keys():  # noqa: SIM118 - a safe_open handle is not iterable
                yield name, f.get_tensor(name), shard.name


def _shard_files(folder: Path) -> list[Path]:
    """The weight files of a folder: those its index names, or the single file; safetensors before
    .bin.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            shards = [
                folder / file
                for file in sorted(
                    set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                )
            ]
            missing = [shard.name for shard in shards if not shard.is_file()]
            if missing:
                raise ConfigError(
                    f"{index} names {len(shards)} shards, but {', '.join(missing)} is not there; "
                    "copy the whole folder."
                )
            return shards
        if (folder / single).is_file():
            return [folder / single]
    raise ConfigError(
        f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an "
        "index of shards."
    )


def _read_bin(shard: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        import torch
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"{shard} is a PyTorch pickle; reading it needs torch: pip install "
            "'hunyuan_jax[torch]'."
        ) from e
    for name, tensor in torch.load(
        shard, map_location="cpu", weights_only=True, mmap=True
    ).items():
        tensor = tensor.detach()  # some saves hold nn.Parameters
        if tensor.dtype == torch.bfloat16:
            yield name, tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            yield name, tensor.numpy()


def _store(
    params: dict[str, Any], entry: table.Entry, tensor: np.ndarray, cfg: ModelConfig
) -> None:
    """Puts one official tensor in its place, creating the (stacked) parameter when its first piece
    comes.
    """
    *parents, leaf = entry.path.split("/")
    node = params
    for parent in parents:
        node = node.setdefault(parent, {})
    stacked, shape = table.stacked_shape(entry, cfg), entry.our_shape
    if leaf not in node:
        dtype = np.dtype(np.float32) if entry.role == Role.ROUTER else _NUMPY_DTYPES[cfg.dtype]
        node[leaf] = np.empty((*stacked, *shape), dtype)
    node[leaf][entry.index] = table.to_ours(tensor, entry, shape)


def _lookup(params: dict[str, Any], entry: table.Entry) -> np.ndarray:
    for name in entry.path.split("/"):
        params = params[name]
    return np.asarray(params[entry.index] if entry.index else params)


def shards(all_entries: list[table.Entry], tensor_dtype: Any) -> dict[str, str]:
    """Tensor name -> file: as many files as needed to stay below _MAX_SHARD_BYTES each, tensors in
    order.
    """
    numbers, number, size = {}, 1, 0
    for entry in all_entries:
        num_bytes = int(np.prod(entry.shape)) * tensor_dtype(entry).itemsize
        if size and size + num_bytes > _MAX_SHARD_BYTES:
            number, size = number + 1, 0
        numbers[entry.name] = number
        size += num_bytes
    if number == 1:
        return dict.fromkeys(numbers, "model.safetensors")
    return {name: f"model-{n:05d}-of-{number:05d}.safetensors" for name, n in numbers.items()}


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint8)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
