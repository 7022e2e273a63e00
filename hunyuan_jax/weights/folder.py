"""An official model folder, the one reader of it: config.json, and the tensors one at a time
(shards.py finds them), float32, BF16, F16 or FP8, experts one by one or fused.
"""

import dataclasses
import functools
import hashlib
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import json_object
from hunyuan_jax.params.tree import path_of
from hunyuan_jax.quant.codes import Codes
from hunyuan_jax.storage import Place
from hunyuan_jax.tokenizer.files import stop_ids
from hunyuan_jax.weights import hf_config, hf_spelling, names, quantized, shards
from hunyuan_jax.weights.shards import DTYPES, Stored, listed

# Scales of activations and caches, which the model does not use.
_OTHER_SCALES = (".input_scale", ".kv_scale", ".k_scale", ".v_scale")
_OTHER_SCALES += (".k_cache.scale", ".v_cache.scale")
# Experts as transformers 5 has them in memory and can save them: gate_up_proj [E, 2 F, D] is gate
# above up, down_proj [E, D, F].
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
_FUSED = {
    "gate": ("gate_up_proj", 0, 2),
    "up": ("gate_up_proj", 1, 2),
    "down": ("down_proj", 0, 1),
}
# Other names of Hy3's tensors: those of transformers' modules, which some tools save.
_OUTER = {
    ".mlp.router.gate.weight": ".mlp.gate.weight",
    ".mlp.expert_bias": ".mlp.e_score_correction_bias",
    ".mlp.shared_mlp.": ".mlp.shared_experts.",
}
_SAMPLE = 65_536
# How the names of tensors end that are float32 in a folder of another dtype.
_ROUTERS = (".gate.wg.weight", ".router.gate.weight", ".mlp.gate.weight", ".mlp.expert_bias")
_ROUTERS += (".e_score_correction_bias",)


class Piece(NamedTuple):
    """Where the values of one entry lie: all of a tensor, or a part of a fused one.

    first: its first element in the tensor; shape: official; parts: names of the other tensors of
    a quantised one, by what they are (`quantized.parts`).
    """

    stored: Stored
    first: int
    shape: tuple[int, ...]
    parts: dict[str, str] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes in the file, without those of `parts`."""
        is_packed = self.stored.dtype == np.int32
        return self.stored.num_bytes if is_packed else self.size * self.stored.dtype.itemsize


class OfficialFolder:
    """A folder with official weights.  Opening it reads headers only.

    config: config.json; tensors: by official name, in the order of the files; headers: raw header
    of each safetensors file by file name; index: bytes of the index, or None; others: names of the
    files beside the weights (tokenizer, code, generation config).
    """

    def __init__(self, place: Place):
        """Reads the config and the list of tensors.

        Raises:
          ConfigError: no config, what `from_hf`, `quantized` and `shards.find` refuse.
        """
        self.place = place
        if not place.is_file("config.json"):
            nearest = place.nearest()
            raise ConfigError(
                f"{place} is not a model folder: it has no config.json. "
                + (f"Did you mean {nearest}? " if nearest else "")
                + "Give a folder with official weights, the --output of an import, the --workdir "
                "of a run that has a checkpoint, or hf://ORG/NAME for a model of the hub."
            )
        self.config_bytes = place.read("config.json")
        self.config = json_object(f"{place}/config.json", self.config_bytes)
        # What cannot be loaded is refused before headers are read.
        require_loadable(self.config)
        shards.fetch(place)
        sizes = place.sizes()
        self.scheme = quantized.scheme_of(self.config)
        found = shards.find(place, sizes, self.scheme.method)
        self.tensors, self.headers = found.tensors, found.headers
        self.index_name, self.index = found.index_name, found.index
        self._sizes, self._bins = found.sizes, found.bins
        self.others = [
            name for name in sorted(sizes) if name != "config.json" and not shards.is_weights(name)
        ]

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
        """Returns the values of an entry in the official layout, read-only, dequantised.

        Args:
          piece: of a `Plan`.
          dtype: None is that of the file.
        """
        stored = piece.stored
        is_packed = stored.dtype == np.int32
        end = piece.first + (math.prod(stored.shape) if is_packed else piece.size)
        if stored.start < 0:
            flat = shards.of_torch(self._bins[stored.file][stored.name]).reshape(-1)
            flat = flat[piece.first : end]
        else:
            begin, width = stored.start, stored.dtype.itemsize
            data = self.place.read(stored.file, begin + piece.first * width, begin + end * width)
            flat = np.frombuffer(data, stored.dtype)
        if piece.parts:
            dtype = np.dtype(np.float32) if dtype is None else dtype
            return quantized.dense_of(
                str(self.place), self.scheme, *self._arrays(piece, flat), dtype
            )
        flat = flat if dtype is None else flat.astype(dtype, copy=False)
        return flat.reshape(piece.shape)

    def codes(self, piece: Piece) -> Codes | None:
        """The codes of an entry, or None if they are not as `quantized.codes_of` gives them."""
        if not piece.parts:
            return None
        flat = self.read_tensor(piece.stored.name).reshape(-1)
        return quantized.codes_of(str(self.place), self.scheme, *self._arrays(piece, flat))

    def _arrays(self, piece: Piece, flat: np.ndarray) -> tuple[str, dict, dict[str, str]]:
        """(name of the main tensor, the tensors of a quantised entry, their names)."""
        arrays = {what: self.read_tensor(name) for what, name in piece.parts.items()}
        stored = piece.stored
        # A part of a fused tensor has the shape of the part.
        main = flat.reshape(stored.shape if stored.dtype == np.int32 else piece.shape)
        return stored.name, {"main": main} | arrays, {"main": stored.name} | piece.parts

    def read_tensor(self, name: str) -> np.ndarray:
        """A tensor of the files as it is."""
        stored = self.tensors[name]
        return self.read(Piece(stored, 0, stored.shape))

    def read_scale(self, name: str) -> float:
        """A scale of activations or of a cache.

        Raises:
          ConfigError: not one positive finite number.
        """
        value = self.read_tensor(name).astype(np.float32)
        if value.size != 1 or not (np.isfinite(value) & (value > 0)).all():
            raise ConfigError(
                f"{self.place}: {name} {value.shape} begins with {value.reshape(-1)[:4]}; the "
                "scale of activations or of a cache is one positive number."
            )
        return float(value.reshape(()))


class Plan(NamedTuple):
    """What is read for what.

    cfg: of the model; hf: its config.json; pieces: entry -> where its values lie; extra_scales:
    values of activation and cache scales, which the model does not use; dropped: tensors that are
    not kept; rounded: tensors of more precision than the dtype that config.json promises;
    is_exact: whether the same bytes can be written again.
    """

    cfg: ModelConfig
    hf: dict[str, Any]
    pieces: dict[names.Entry, Piece]
    extra_scales: dict[str, float]
    dropped: list[str]
    rounded: list[str]
    is_exact: bool


def require_loadable(config: dict[str, Any]) -> None:
    """Raises ConfigError if a model with this config.json cannot be loaded."""
    hf_config.from_hf(hf_spelling.with_dtype(quantized.plain_config(config), "float32"))


def plan(folder: OfficialFolder, dtype: str | None) -> Plan:
    """Gives every tensor exactly one use and every entry exactly one source.

    Args:
      folder: opened.
      dtype: of the parameters; None keeps torch_dtype of config.json, and without one that of the
        files.  The router is float32 always.

    Raises:
      ConfigError: what `from_hf` refuses; tensors without a use, entries without a tensor, other
        shapes: all of them, by name.
    """
    own_dtype = hf_spelling.stated_dtype(folder.config) or _unstated_dtype(folder)
    chosen = dtype or own_dtype
    is_own = chosen == own_dtype
    stated = folder.config if is_own else hf_spelling.with_dtype(folder.config, chosen)
    hf = quantized.plain_config(stated)
    cfg = hf_config.from_hf(hf_spelling.with_dtype(hf, chosen))
    cfg = with_stored_layers(cfg, folder)
    unused, pieces, missing, wrong = dict(folder.tensors), {}, [], []
    for entry in names.entries(cfg):
        piece = _piece(folder, entry, cfg)
        if piece is None:
            missing.append(entry.name)
            continue
        unused.pop(piece.stored.name, None)
        if piece.shape != entry.shape:
            wrong.append(f"{entry.name} {piece.shape}, not {entry.shape}")
        stored = piece.stored
        parts = quantized.parts(folder.scheme, stored.name, stored.dtype, folder.tensors)
        if parts:
            piece = piece._replace(parts=parts)
            missing += [name for name in parts.values() if name not in folder.tensors]
            for name in parts.values():
                unused.pop(name, None)
        pieces[entry] = piece
    # A buffer that old saves hold; it is computed from the config.
    dropped = [name for name in unused if name.endswith("rotary_emb.inv_freq")]
    head = "lm_head.weight" if cfg.tie_embeddings and "lm_head.weight" in unused else None
    is_fp8 = hf.keys() != stated.keys() or any(piece.parts for piece in pieces.values())
    extra = [name for name in unused if is_fp8 and name.endswith(_OTHER_SCALES)]
    for name in dropped + extra + [head] * (head is not None):
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
    if "lm_head.weight" in missing:
        problems.append(
            "if the head is the embedding, set tie_word_embeddings to true in config.json"
        )
    if problems:
        raise ConfigError(f"{folder.place}: " + "; ".join(problems) + ".")
    target = names.dtype_of(next(iter(pieces)), cfg.dtype)
    if head:
        _check_tied_head(folder, head)
        dropped.append(head)
    cast = [
        entry.name
        for entry, piece in pieces.items()
        if piece.stored.dtype != target and not names.is_router(entry)
    ]
    is_exact = (
        bool(folder.headers)
        and is_own
        and not cast
        and not is_fp8
        and set(dropped) <= {head}
        and (head is None or folder.tensors[head].dtype == target)
        and all(piece.shape == piece.stored.shape for piece in pieces.values())
    )
    is_told = dtype is not None or is_fp8 or target == np.float32
    extra_scales = {name: folder.read_scale(name) for name in extra}
    return Plan(cfg, hf, pieces, extra_scales, dropped, [] if is_told else cast, is_exact)


def read_params(folder: OfficialFolder, plan: Plan, shardings: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a folder, each in the memory of this process as a whole until it is on the
    devices of `shardings`.
    """
    by_path = names.by_path(plan.pieces)

    def read(path, sharding):
        found = by_path[path_of(path)]
        shape = found[0].our_shape
        dtype = names.dtype_of(found[0], plan.cfg.dtype)
        array = np.empty((*found[0].stacked, *shape), dtype)
        for entry in found:
            tensor = folder.read(plan.pieces[entry], dtype)
            array[entry.index] = names.to_ours(tensor, entry, shape)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map_with_path(read, shardings)


def with_stored_layers(cfg: ModelConfig, folder: OfficialFolder) -> ModelConfig:
    """`cfg` with a layer of multi-token prediction if the folder holds one.

    transformers neither loads nor saves it, whatever num_nextn_predict_layers of config.json says.
    """
    if not cfg.norm_before_rope:  # another class than Hy3's
        return cfg
    prefix = f"model.layers.{cfg.num_layers}."
    num_layers = int(any(name.startswith(prefix) for name in folder.tensors))
    return dataclasses.replace(cfg, num_mtp_layers=num_layers)


def with_stop_ids(cfg: ModelConfig, place: Place) -> ModelConfig:
    """`cfg` with the eos_token_id of a folder's generation_config.json, which is what `generate`
    of transformers stops at, if there is one.

    Raises:
      ConfigError: something else than an integer or a list of integers.
    """
    if not place.is_file("generation_config.json"):
        return cfg
    where = f"{place}/generation_config.json"
    fields = place.read_json("generation_config.json")
    found = stop_ids(where, fields.get("eos_token_id"))
    return dataclasses.replace(cfg, eos_token_ids=found or cfg.eos_token_ids)


def _piece(folder: OfficialFolder, entry: names.Entry, cfg: ModelConfig) -> Piece | None:
    """Finds an entry's values: a tensor of its name, packed codes, or a fused tensor of the right
    shape.
    """
    tensors = folder.tensors
    outer = [entry.name.replace(ours, theirs) for ours, theirs in _OUTER.items()]
    packed = quantized.main_names(folder.scheme, entry.name)
    for name in (*packed, *outer):
        if stored := tensors.get(name):
            return Piece(stored, 0, quantized.shape_of(folder.scheme, name, stored.shape))
    expert = _EXPERT.fullmatch(entry.name)
    if not expert:
        return None
    name, part, num_parts = _FUSED[expert[3]]
    stored, (rows, columns) = tensors.get(expert[1] + name), entry.shape
    if not stored or stored.shape != (cfg.moe.num_experts, num_parts * rows, columns):
        return None
    return Piece(stored, (int(expert[2]) * num_parts + part) * rows * columns, entry.shape)


def _check_tied_head(folder: OfficialFolder, name: str) -> None:
    """Raises ConfigError unless the head is the copy of the embedding that some saves hold: the
    same numbers in the narrower of their two dtypes.
    """
    head, embedding = (
        Piece(folder.tensors[n], 0, folder.tensors[n].shape)
        for n in (name, "model.embed_tokens.weight")
    )
    dtype = min((head.stored.dtype, embedding.stored.dtype), key=lambda d: d.itemsize)
    if head.shape != embedding.shape or not np.array_equal(
        _bits(folder.read(head, dtype)), _bits(folder.read(embedding, dtype))
    ):
        raise ConfigError(
            f"{folder.place}: {name} differs from model.embed_tokens.weight although config.json "
            "says tie_word_embeddings; set it to false to keep both."
        )


def _unstated_dtype(folder: OfficialFolder) -> str:
    """What "auto" means, where config.json states no dtype: bfloat16 if all but routers is."""
    found = {
        stored.dtype for name, stored in folder.tensors.items() if not name.endswith(_ROUTERS)
    }
    return "bfloat16" if found == {DTYPES["BF16"]} else "float32"


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)
