"""Official folders to checkpoints and back, tensor by tensor: memory does not grow with the model,
and a killed run is continued.

A checkpoint folder holds conversion.json (what it was made from, and whether it is whole),
config.json, the tokenizer and other files of the source as they were, params/ (chunks.py; orbax
restores it onto any mesh) and source/ (headers and index, to write the same bytes).
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.params.roles import Role
from hunyuan_jax.progress import Meter, in_order
from hunyuan_jax.weights import chunks, hf_config, torch_io
from hunyuan_jax.weights import folder as weights
from hunyuan_jax.weights import names as table
from hunyuan_jax.weights.storage import Place

_ABOUT, _EXPORTING = "conversion.json", "export.json"
_FORMAT = 1


class Converted(NamedTuple):
    """A finished checkpoint: its folder, conversion.json, config.json, ModelConfig and parameters
    by path.
    """

    place: Place
    about: dict[str, Any]
    hf: dict[str, Any]
    cfg: ModelConfig
    params: dict[str, chunks.Param]


def import_model(
    source: str | os.PathLike, output: str | os.PathLike, dtype: str | None = None
) -> int:
    """Converts a model folder; the same call again continues one that was killed.  Returns how
    many tensors this call converted.

    Args:
      source, output: local folders or fsspec URLs.
      dtype: "float32" or "bfloat16" for the parameters; None keeps torch_dtype of config.json.
        The router is float32 always.

    Raises:
      ConfigError: what `Weights` and `plan` refuse, values that are not finite, an output made
        from something else, a full disk.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"dtype = {dtype!r}; use 'float32', 'bfloat16' or None.")
    opened, target = weights.Weights(Place(source)), Place(output)
    plan = weights.plan(opened, dtype)
    about = {
        "format": _FORMAT,
        "is_complete": False,
        "source": str(opened.place),
        "fingerprint": opened.fingerprint,
        "dtype": plan.cfg.dtype,
        "is_exact": plan.is_exact,
        "router_dtype": next(
            (s.dtype.name for e, s in plan.tensors.items() if e.role == Role.ROUTER), ""
        ),
        "index_name": opened.index_name,
        "shards": list(opened.headers),
        "copied": opened.others,
        "dropped": plan.dropped,
        "scales": plan.extra_scales,
    }
    old = _claim(target, about)
    if old["is_complete"]:
        _check_whole(target, chunks.params_of(plan.cfg))
        return 0
    params = chunks.params_of(plan.cfg)
    there = {path: target.sizes(f"params/{param.folder}") for path, param in params.items()}

    def left_of(entry: table.Entry) -> list[int]:
        param, sizes = params[entry.path], there[entry.path]
        return [
            i
            for i in range(param.num_chunks)
            if sizes.get(param.key(entry.index, i)) != param.chunk_bytes
        ]

    todo = [entry for entry in plan.tensors if left_of(entry)]
    # In the order of the files, each of which is then read from its beginning to its end.
    order = {name: i for i, name in enumerate(opened.tensors)}
    todo.sort(key=lambda entry: order[entry.name])
    target.check_space(sum(len(left_of(entry)) * params[entry.path].chunk_bytes for entry in todo))
    target.write(_ABOUT, [_json(about)])

    def convert(entry: table.Entry) -> int:
        param = params[entry.path]
        scale = (
            weights.read_scale(opened, plan.scales[entry.name])
            if entry.name in plan.scales
            else None
        )
        tensor = opened.read(entry.name)
        for chunk in left_of(entry):
            block = chunks.encode(tensor, entry, param, chunk, scale)
            target.write(f"params/{param.folder}/{param.key(entry.index, chunk)}", [_bytes(block)])
        return plan.tensors[entry].num_bytes

    with Meter("import", sum(plan.tensors[entry].num_bytes for entry in todo)) as meter:
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
        "config.json", [opened.config_bytes if plan.hf == opened.config else _json(plan.hf)]
    )
    target.write("params/_METADATA", [chunks.tree_metadata(params)])
    _check_whole(target, params)
    target.write(_ABOUT, [_json(about | {"is_complete": True})])
    return len(todo)


def open_converted(folder: str | os.PathLike) -> Converted:
    """A finished checkpoint.

    Raises:
      ConfigError: it is none, is not finished, or lacks chunks.
    """
    place = Place(folder)
    if not place.is_file(_ABOUT):
        raise ConfigError(
            f"{place} is no converted checkpoint: it has no {_ABOUT}. Make one with `python "
            "convert_torch.py import`."
        )
    about = json.loads(place.read(_ABOUT))
    if about["format"] != _FORMAT:
        raise ConfigError(
            f"{place}/{_ABOUT}: format = {about['format']}; this version reads format {_FORMAT}. "
            "Import the model again."
        )
    if not about["is_complete"]:
        raise ConfigError(
            f"{place} is an import that has not finished; run the same `convert_torch.py import` "
            "again to continue it."
        )
    hf = json.loads(place.read("config.json"))
    cfg = hf_config.from_hf(hf)
    params = chunks.params_of(cfg)
    _check_whole(place, params)
    return Converted(place, about, hf, cfg, params)


def is_converted(folder: str | os.PathLike) -> bool:
    """Whether a local folder is a checkpoint of `import_model`, finished or not."""
    return os.path.isfile(os.path.join(folder, _ABOUT))


def export_model(checkpoint: str | os.PathLike, output: str | os.PathLike) -> int:
    """Writes the official folder of a converted checkpoint, byte for byte that of the source if it
    was safetensors of the same dtype.

    The same call again continues one that was killed.  Returns how many files of weights this call
    wrote.

    Raises:
      ConfigError: no such checkpoint, an output that holds something else, a full disk.
    """
    converted, target = open_converted(checkpoint), Place(output)
    about, params = converted.about, converted.params
    entries = {entry.name: entry for entry in table.entries(converted.cfg)}
    if about["is_exact"]:
        headers = {name: converted.place.read(f"source/{name}.header") for name in about["shards"]}
        index_name = about["index_name"]
        index = converted.place.read(f"source/{index_name}") if index_name else None
    else:
        headers, index = _new_headers(converted, list(entries.values()))
        index_name = "model.safetensors.index.json"
    claim = {"fingerprint": about["fingerprint"], "dtype": about["dtype"]}
    names = set(target.sizes())
    if _EXPORTING in names:
        if json.loads(target.read(_EXPORTING)) != claim:
            raise ConfigError(
                f"{target} holds an unfinished export of another checkpoint; use another "
                "--output, or delete it."
            )
    elif names:
        raise ConfigError(
            f"{target} is not empty: it holds {weights.listed(sorted(names))}; use another "
            "--output."
        )
    layouts = {name: _layout(raw) for name, raw in headers.items()}
    sizes = {
        name: len(headers[name]) + sum(num_bytes for _, _, num_bytes in layout)
        for name, layout in layouts.items()
    }
    todo = [name for name in headers if name not in names]  # what has its name is whole
    target.check_space(sum(sizes[name] for name in todo))
    target.write(_EXPORTING, [_json(claim)])

    def build(item: tuple[str, str, np.dtype]) -> np.ndarray:
        # lm_head of a tied model, if the source had one, was the embedding.
        entry = entries.get(item[1]) or entries["model.embed_tokens.weight"]
        return _params_of(converted.place, entry, params).astype(item[2], copy=False)

    with Meter("export", sum(sizes[name] for name in todo)) as meter:
        for file in todo:
            items = [(file, name, dtype) for name, dtype, _ in layouts[file]]

            def pieces(file: str = file, items: list = items) -> Iterator[memoryview]:
                yield headers[file]
                meter.add(len(headers[file]))
                for _, tensor in in_order(build, items):
                    yield _bytes(tensor)
                    meter.add(tensor.nbytes)
                    del tensor  # or three would be in memory

            target.write(file, pieces())
    for name in about["copied"]:
        target.write(name, [converted.place.read(name)])
    if index is not None:
        target.write(index_name, [index])
    target.write("config.json", [converted.place.read("config.json")])
    target.remove(_EXPORTING)
    return len(todo)


def read_params(
    folder: str | os.PathLike, dtype: str | None = None
) -> tuple[ModelConfig, dict[str, Any], torch_io.Source]:
    """(config, params, source) of a converted checkpoint in a local folder, as
    `torch_io.read_model` gives them.

    Raises:
      ConfigError: no such checkpoint.
    """
    import orbax.checkpoint as ocp

    converted = open_converted(folder)
    abstract: dict[str, Any] = {}
    routers = {entry.path for entry in table.entries(converted.cfg) if entry.role == Role.ROUTER}
    for path, param in converted.params.items():
        *parents, leaf = path.split("/")
        node = abstract
        for parent in parents:
            node = node.setdefault(parent, {})
        kept = param.dtype if dtype is None or path in routers else dtype
        node[leaf] = jax.ShapeDtypeStruct((*param.stacked, *param.piece), kept)
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(os.path.abspath(converted.place.path("params")), abstract)
    about = converted.about
    texts, files = {"config.json": converted.place.read("config.json").decode()}, {}
    for file in about["shards"] if about["is_exact"] else ():
        layout = _layout(converted.place.read(f"source/{file}.header"))
        files |= {name: file for name, _, _ in layout}
    if about["is_exact"] and about["index_name"]:
        texts[about["index_name"]] = converted.place.read(f"source/{about['index_name']}").decode()
    cfg = (
        converted.cfg
        if dtype is None
        else hf_config.from_hf(hf_config.with_dtype(converted.hf, dtype))
    )
    cfg = dataclasses.replace(
        cfg, eos_token_ids=torch_io.generation_stop_ids(Path(folder)) or cfg.eos_token_ids
    )
    for name in set(about["copied"]) & set(torch_io.SIDE_FILES):
        texts[name] = converted.place.read(name).decode(errors="surrogateescape")
    files = files or {entry.name: "converted.bin" for entry in table.entries(cfg)}
    return cfg, params, torch_io.Source(texts, files, about["router_dtype"])


def _claim(target: Place, about: dict[str, Any]) -> dict[str, Any]:
    """What conversion.json of the output says, which must belong to the same source.

    Raises:
      ConfigError: the output holds something else.
    """
    names = sorted(target.sizes())
    if _ABOUT not in names:
        if names:
            raise ConfigError(
                f"{target} is not empty and no import: it holds {weights.listed(names)}; use "
                "another --output."
            )
        return about
    old = json.loads(target.read(_ABOUT))
    for name in ("format", "fingerprint", "dtype"):
        if old.get(name) != about[name]:
            raise ConfigError(
                f"{target} holds an import of another source: {old.get('source')} with {name} "
                f"{old.get(name)}; this is {about['source']} "
                f"with {name} {about[name]}. Use another --output."
            )
    return old


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
            f"{place}/params lacks chunks, or holds parts of them: {weights.listed(missing)}. "
            "Import into another folder."
        )


def _params_of(place: Place, entry: table.Entry, params: dict[str, chunks.Param]) -> np.ndarray:
    return chunks.decode(Place(f"{place}/params"), entry, params[entry.path])


def _layout(raw: bytes) -> list[tuple[str, np.dtype, int]]:
    """(name, dtype, bytes) of the tensors of a safetensors header, in the order of their data."""
    about = {name: value for name, value in json.loads(raw[8:]).items() if name != "__metadata__"}
    ordered = sorted(about.items(), key=lambda item: (*item[1]["data_offsets"], item[0]))
    return [
        (name, weights.DTYPES[v["dtype"]], v["data_offsets"][1] - v["data_offsets"][0])
        for name, v in ordered
    ]


def _new_headers(
    converted: Converted, entries: list[table.Entry]
) -> tuple[dict[str, bytes], bytes | None]:
    """(header by file name, index) for a folder whose dtypes or format the source did not have."""

    router = np.dtype(converted.about["router_dtype"] or np.float32)

    def dtype(entry: table.Entry) -> np.dtype:
        return router if entry.role == Role.ROUTER else converted.params[entry.path].dtype

    files = torch_io.shards(entries, dtype)
    by_file: dict[str, list] = {}
    for entry in entries:
        by_file.setdefault(files[entry.name], []).append((entry.name, dtype(entry), entry.shape))
    total = sum(int(np.prod(e.shape)) * dtype(e).itemsize for e in entries)
    index = (
        _json({"metadata": {"total_size": total}, "weight_map": files})
        if len(by_file) > 1
        else None
    )
    return {file: weights.header(tensors) for file, tensors in by_file.items()}, index


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
