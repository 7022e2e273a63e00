"""Official folders to checkpoints, tensor by tensor: memory does not grow with the model, and a
killed import is continued.

A checkpoint folder holds conversion.json (what it was made from, and whether it is whole),
config.json, the tokenizer and other files of the source as they were, params/ (chunks.py; orbax
restores it onto any mesh) and source/ (headers and index, to write the same bytes).
"""

import dataclasses
import os
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.params.tree import path_of
from hunyuan_jax.progress import Meter, in_order
from hunyuan_jax.storage import Place
from hunyuan_jax.weights import chunks, hf_config, hf_spelling, names, shards
from hunyuan_jax.weights import folder as official
from hunyuan_jax.weights.gguf_file import model_place
from hunyuan_jax.weights.side_files import is_side_file
from hunyuan_jax.weights.write import Layout, as_json, new_layout, router_dtype_of

ABOUT = "conversion.json"
_FORMAT = 1
# Of conversion.json, those that are read.
_FIELDS = {"is_complete", "source", "fingerprint", "dtype", "is_exact", "router_dtype"}
_FIELDS |= {"index_name", "shards", "copied"}


class Converted(NamedTuple):
    """A finished checkpoint: its folder, conversion.json, config.json, ModelConfig, official
    tensors and parameters by path.
    """

    place: Place
    about: dict[str, Any]
    hf: dict[str, Any]
    cfg: ModelConfig
    entries: list[names.Entry]
    params: dict[str, chunks.Param]


def import_model(
    source: str | os.PathLike, output: str | os.PathLike, dtype: str | None = None
) -> int:
    """Converts a model folder; the same call again continues one that was killed.  Returns how
    many tensors this call converted.

    Args:
      source: a local folder, an fsspec URL or a hub id; output: a local folder or an fsspec URL.
      dtype: "float32" or "bfloat16" for the parameters; None keeps torch_dtype of config.json.
        The router is float32 always.

    Raises:
      ConfigError: what `OfficialFolder` and `plan` refuse, values that are not finite, an output
        made from something else, a full disk.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"dtype = {dtype!r}; use 'float32', 'bfloat16' or None.")
    opened, target = official.OfficialFolder(model_place(source)), Place(output, "--output")
    plan = official.plan(opened, dtype)
    if plan.rounded:
        print(
            f"note: config.json says torch_dtype {plan.cfg.dtype}, to which these tensors are "
            f"rounded: {shards.listed(plan.rounded)}; --dtype=float32 keeps them.",
            file=sys.stderr,
        )
    about = {
        "format": _FORMAT,
        "is_complete": False,
        "source": str(opened.place),
        "fingerprint": opened.fingerprint,
        "dtype": plan.cfg.dtype,
        "is_exact": plan.is_exact,
        "router_dtype": router_dtype_of(plan) if plan.cfg.is_moe else "",
        "num_mtp_layers": plan.cfg.num_mtp_layers,
        "index_name": opened.index_name,
        "shards": list(opened.headers),
        "copied": opened.others,
        "dropped": plan.dropped,
        "rounded": plan.rounded,
        "scales": plan.extra_scales,
    }
    params = chunks.params_of(plan.pieces, plan.cfg.dtype)
    old = _claim(target, about)
    if old["is_complete"]:
        _check_whole(target, params)
        return 0
    there = {path: target.sizes(f"params/{param.folder}") for path, param in params.items()}

    def left_of(entry: names.Entry) -> list[int]:
        param, sizes = params[entry.path], there[entry.path]
        return [
            i
            for i in range(param.num_chunks)
            if sizes.get(param.key(entry.index, i)) != param.chunk_bytes
        ]

    todo = [entry for entry in plan.pieces if left_of(entry)]
    # In the order of the files, each of which is then read from its beginning to its end.
    order = {name: i for i, name in enumerate(opened.tensors)}
    todo.sort(key=lambda e: (order[plan.pieces[e].stored.name], plan.pieces[e].first))
    target.check_space(sum(len(left_of(entry)) * params[entry.path].chunk_bytes for entry in todo))
    target.write(ABOUT, [as_json(about)])

    def convert(entry: names.Entry) -> int:
        param, piece = params[entry.path], plan.pieces[entry]
        tensor = opened.read(piece, param.dtype if piece.parts else None)
        for chunk in left_of(entry):
            block = chunks.encode(tensor, entry, param, chunk)
            data = block.reshape(-1).view(np.uint8).data
            target.write(f"params/{param.folder}/{param.key(entry.index, chunk)}", [data])
        return piece.num_bytes

    with Meter("import", sum(plan.pieces[entry].num_bytes for entry in todo)) as meter:
        for _, num_bytes in in_order(convert, todo):
            meter.add(num_bytes)
    for param in params.values():
        target.write(f"params/{param.folder}/.zarray", [param.zarr()])
    for name in opened.others:
        target.write(name, [opened.place.read(name)])
    for name, raw in opened.headers.items():
        target.write(f"source/{name}.header", [raw])
    if opened.index is not None:
        target.write(f"source/{opened.index_name}", [opened.index])
    target.write(
        "config.json", [opened.config_bytes if plan.hf == opened.config else as_json(plan.hf)]
    )
    target.write("params/_METADATA", [chunks.tree_metadata(params)])
    _check_whole(target, params)
    target.write(ABOUT, [as_json(about | {"is_complete": True})])
    return len(todo)


def open_converted(place: Place) -> Converted:
    """A finished checkpoint.

    Raises:
      ConfigError: it is none, is not finished, or lacks chunks.
    """
    if not place.is_file(ABOUT):
        raise ConfigError(
            f"{place} is not a converted checkpoint: it has no {ABOUT}. Make one with `python "
            "convert_torch.py import`."
        )
    about = _read_about(place)
    if not about["is_complete"]:
        raise ConfigError(
            f"{place} is an import that has not finished; run the same `convert_torch.py import` "
            "again to continue it."
        )
    hf = place.read_json("config.json")
    cfg = hf_config.from_hf(hf_spelling.with_dtype(hf, about["dtype"]))
    # config.json may name a layer that is not stored, or not name one that is.  Imports from
    # before there were any do not say.
    cfg = dataclasses.replace(cfg, num_mtp_layers=about.get("num_mtp_layers", 0))
    entries = names.entries(cfg)
    params = chunks.params_of(entries, cfg.dtype)
    _check_whole(place, params)
    return Converted(place, about, hf, cfg, entries, params)


def read_params(converted: Converted, dtype: str, shardings: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a checkpoint in a local folder, on the devices of `shardings`; the router
    in float32, all others in `dtype`.
    """
    import orbax.checkpoint as ocp

    routers = {entry.path for entry in converted.entries if names.is_router(entry)}

    def target(path, sharding):
        param = converted.params[path_of(path)]
        kept = "float32" if path_of(path) in routers else dtype
        return jax.ShapeDtypeStruct((*param.stacked, *param.piece), kept, sharding=sharding)

    folder = os.path.abspath(converted.place.path("params"))
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, jax.tree.map_with_path(target, shardings))


def layout_of(converted: Converted, cfg: ModelConfig) -> Layout:
    """The layout in which a checkpoint is written as an official folder: that of its source, if it
    can give the same bytes in the dtype of `cfg`.
    """
    about, place = converted.about, converted.place
    texts = {"config.json": place.read("config.json")}
    texts |= {name: place.read(name) for name in about["copied"] if is_side_file(name)}
    if cfg.dtype != converted.cfg.dtype:
        texts["config.json"] = as_json(hf_spelling.with_dtype(converted.hf, cfg.dtype))
        return new_layout(cfg, texts)
    if not about["is_exact"]:
        return new_layout(cfg, texts, about["router_dtype"] or "float32")
    if about["index_name"]:
        texts[about["index_name"]] = place.read(f"source/{about['index_name']}")
    return Layout({f: place.read(f"source/{f}.header") for f in about["shards"]}, texts)


def read_tensor(converted: Converted, entry: names.Entry) -> np.ndarray:
    """The official tensor of an entry, in the dtype of the checkpoint."""
    return chunks.decode(converted.place.inside("params"), entry, converted.params[entry.path])


def _claim(target: Place, about: dict[str, Any]) -> dict[str, Any]:
    """What conversion.json of the output says, which must belong to the same source.

    Raises:
      ConfigError: the output holds something else.
    """
    found = sorted(target.sizes())
    if ABOUT not in found:
        if found:
            raise ConfigError(
                f"{target} is not empty and not an import: it holds {shards.listed(found)}; use "
                "another --output."
            )
        return about
    old = _read_about(target)
    for name in ("fingerprint", "dtype"):
        if old.get(name) != about[name]:
            raise ConfigError(
                f"{target} holds an import of another source: {old.get('source')} with {name} "
                f"{old.get(name)}; this is {about['source']} "
                f"with {name} {about[name]}. Use another --output."
            )
    return old


def _read_about(place: Place) -> dict[str, Any]:
    """conversion.json of an import."""
    about = place.read_json(ABOUT)
    if about.get("format") != _FORMAT or _FIELDS - about.keys():
        raise ConfigError(
            f"{place}/{ABOUT}: format = {about.get('format')} with {len(about)} fields; this "
            f"version reads format {_FORMAT}. Import the model again, into another folder."
        )
    return about


def _check_whole(place: Place, params: dict[str, chunks.Param]) -> None:
    """Raises ConfigError unless every chunk is there with its size: zarr would read a missing one
    as zeros.
    """
    missing = []
    for param in params.values():
        sizes, keys = place.sizes(f"params/{param.folder}"), param.keys()
        missing += [f"{param.folder}/{key}" for key in keys if sizes.get(key) != param.chunk_bytes]
    if missing:
        raise ConfigError(
            f"{place}/params lacks chunks, or holds parts of them: {shards.listed(missing)}. "
            "Import into another folder."
        )
