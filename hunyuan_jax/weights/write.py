"""Official model folders written: safetensors tensor by tensor, and the files beside them."""

import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.progress import Meter, in_order
from hunyuan_jax.storage import Place
from hunyuan_jax.weights import hf_config, names, shards
from hunyuan_jax.weights.folder import OfficialFolder, Plan
from hunyuan_jax.weights.shards import DTYPES, INTEGERS
from hunyuan_jax.weights.side_files import is_side_file

INDEX = "model.safetensors.index.json"
_MAX_SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {dtype: name for name, dtype in (DTYPES | INTEGERS).items()}


class Layout(NamedTuple):
    """A model folder without the values of its tensors.

    headers: first bytes of each safetensors file, by file name; texts: content of the other files
    by name, config.json and a sharded folder's index among them.
    """

    headers: dict[str, bytes]
    texts: dict[str, bytes]

    def num_bytes(self, file: str) -> int:
        """Bytes of a file of weights."""
        return len(self.headers[file]) + sum(num for _, _, num in tensors_of(self.headers[file]))


def new_layout(
    cfg: ModelConfig, texts: dict[str, bytes] | None = None, router_dtype: str = "float32"
) -> Layout:
    """A layout in the hub's names, as many files as needed to stay below 5 GB each.

    Args:
      cfg: of the model.
      texts: what is to be written beside the weights; without config.json one is made.
      router_dtype: of mlp.gate.wg.weight in the files.

    Raises:
      ConfigError: no official model type can express the architecture.
    """
    texts = {"config.json": as_json(hf_config.to_hf(cfg))} | (texts or {})
    texts.pop(INDEX, None)

    def dtype(entry: names.Entry) -> np.dtype:
        is_router = names.is_router(entry)
        return np.dtype(router_dtype) if is_router else names.dtype_of(entry, cfg.dtype)

    entries = names.entries(cfg)
    files = _shards([(e.name, int(np.prod(e.shape)) * dtype(e).itemsize) for e in entries])
    by_file: dict[str, list] = {}
    for entry in entries:
        by_file.setdefault(files[entry.name], []).append((entry.name, dtype(entry), entry.shape))
    if len(by_file) > 1:
        total = sum(int(np.prod(e.shape)) * dtype(e).itemsize for e in entries)
        about = {"metadata": {"total_size": total}, "weight_map": files}
        texts[INDEX] = as_json(about)
    # Wide dtypes first, so that each tensor is aligned.
    for tensors in by_file.values():
        tensors.sort(key=lambda tensor: (-tensor[1].itemsize, tensor[0]))
    return Layout({file: header(tensors) for file, tensors in by_file.items()}, texts)


def layout_of(folder: OfficialFolder, plan: Plan) -> Layout:
    """The layout in which a folder's model is written again: its own, if that is exact."""
    is_same = plan.hf == folder.config
    texts = {"config.json": folder.config_bytes if is_same else as_json(plan.hf)}
    texts |= {name: folder.place.read(name) for name in folder.others if is_side_file(name)}
    if plan.is_exact:
        index = {} if folder.index is None else {folder.index_name: folder.index}
        return Layout(folder.headers, texts | index)
    return new_layout(plan.cfg, texts, router_dtype_of(plan) if is_same else "float32")


def router_dtype_of(plan: Plan) -> str:
    """The dtype of the router in a folder's files, "float32" without one."""
    found = (piece.stored.dtype for entry, piece in plan.pieces.items() if names.is_router(entry))
    return next(found, np.dtype(np.float32)).name


def check_claim(target: Place, name: str, claim: dict[str, Any], what: str) -> dict[str, int]:
    """Refuses an output that holds something else than an unfinished call of the same.

    Args:
      target: the output.
      name: of the file there that says what a call writes until it is done.
      claim: what this call writes.
      what: name of such a call with another claim, for errors.

    Returns:
      Bytes of each file that is there.

    Raises:
      ConfigError: something else is there.
    """
    found = target.sizes()
    if name in found:
        if target.read_json(name) != claim:
            raise ConfigError(
                f"{target} holds an unfinished {what}; use another --output, or delete it."
            )
    elif found:
        raise ConfigError(
            f"{target} is not empty: it holds {shards.listed(sorted(found))}; use another "
            "--output."
        )
    return found


def write_folder(
    target: Place,
    layout: Layout,
    cfg: ModelConfig,
    read: Callable[[names.Entry], np.ndarray],
    written: Collection[str] = (),
) -> int:
    """Writes a model folder, one tensor or two in memory at a time; config.json last.

    Args:
      target: where.
      layout: what the folder consists of.
      cfg: of the model.
      read: values of an entry in the official layout, in any dtype.
      written: files of weights that are there already.

    Returns:
      How many files of weights were written.
    """
    entries = {entry.name: entry for entry in names.entries(cfg)}
    # A copy of a tied head, which a source may hold, is the embedding.
    entries.setdefault("lm_head.weight", entries["model.embed_tokens.weight"])

    def build(item: tuple[str, np.dtype]) -> np.ndarray:
        return read(entries[item[0]]).astype(item[1], copy=False)

    todo = [file for file in layout.headers if file not in written]
    with Meter("export", sum(map(layout.num_bytes, todo))) as meter:
        for file in todo:
            items = [(name, dtype) for name, dtype, _ in tensors_of(layout.headers[file])]

            def pieces(file: str = file, items: list = items) -> Iterator[memoryview]:
                yield layout.headers[file]
                meter.add(len(layout.headers[file]))
                for _, tensor in in_order(build, items):
                    yield np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
                    meter.add(tensor.nbytes)
                    del tensor  # or three would be in memory

            target.write(file, pieces())
    for name in sorted(layout.texts, key=lambda name: name == "config.json"):
        target.write(name, [layout.texts[name]])
    return len(todo)


def remove_stale(target: Place, layout: Layout) -> None:
    """Removes what an earlier save left: it would be read first (an index), or with this one (a
    shard).
    """
    pattern = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    for name in target.sizes():
        if pattern.fullmatch(name) and name not in {*layout.headers, *layout.texts}:
            target.remove(name)


def header(tensors: list[tuple[str, np.dtype, tuple[int, ...]]]) -> bytes:
    """The first bytes of a safetensors file that holds these tensors in this order."""
    about: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        about[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(about, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensors_of(raw: bytes) -> list[tuple[str, np.dtype, int]]:
    """(name, dtype, bytes) of the tensors of a safetensors header, in the order of their data."""
    about = {name: value for name, value in json.loads(raw[8:]).items() if name != "__metadata__"}
    ordered = sorted(about.items(), key=lambda item: (*item[1]["data_offsets"], item[0]))
    return [
        (name, DTYPES[v["dtype"]], v["data_offsets"][1] - v["data_offsets"][0])
        for name, v in ordered
    ]


def as_json(value: dict[str, Any]) -> bytes:
    """A JSON file as we write it."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _shards(sizes: list[tuple[str, int]]) -> dict[str, str]:
    """Tensor name -> file: as many files as needed to stay below _MAX_SHARD_BYTES each, tensors in
    order.
    """
    numbers, number, size = {}, 1, 0
    for name, num_bytes in sizes:
        if size and size + num_bytes > _MAX_SHARD_BYTES:
            number, size = number + 1, 0
        numbers[name] = number
        size += num_bytes
    if number == 1:
        return dict.fromkeys(numbers, "model.safetensors")
    return {name: f"model-{n:05d}-of-{number:05d}.safetensors" for name, n in numbers.items()}
