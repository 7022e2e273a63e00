"""Models written as GGUF files, for llama.cpp and what is built on it; one matrix at a time."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import AnyPath, user_path
from hunyuan_jax.gguf import blocks, container, vocabulary
from hunyuan_jax.params.roles import Role
from hunyuan_jax.progress import Meter, in_order
from hunyuan_jax.storage import Place
from hunyuan_jax.tokenizer.hy_json import json_files
from hunyuan_jax.weights import gguf_model, names
from hunyuan_jax.weights.gguf_file import SUFFIX
from hunyuan_jax.weights.open import Model, open_model

# Number of general.file_type, and the kind of embedding and head, by the kind of matrices.
KINDS = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}
_OF_TABLES = {"Q4_0": "Q8_0"}


def export_gguf(checkpoint: str | os.PathLike, output: str | os.PathLike, kind: str) -> int:
    """Writes a model as one GGUF file; returns its bytes.

    Norms, biases and routers are float32.  Matrices whose rows blocks of 32 do not divide are F16.

    Args:
      checkpoint: as for `open_model`.
      output: a path or fsspec URL that ends in .gguf, where nothing is yet.
      kind: of the matrices, one of KINDS.

    Raises:
      ConfigError: no such model, one that llama.cpp cannot compute, a tokenizer that it has no
        name for, an output that is there already, a full disk, weights that are not finite.
    """
    if kind not in KINDS:
        raise ConfigError(f"--gguf={kind}; use {', '.join(KINDS)}.")
    output = user_path(output, "--output", AnyPath)
    folder, file = os.path.split(output)
    if not file.endswith(SUFFIX):
        raise ConfigError(f"--output={output}: a GGUF file needs a name that ends in {SUFFIX}.")
    model, target = open_model(checkpoint), Place(folder or ".", "--output")
    if target.is_file(file):
        raise ConfigError(f"--output={output} is there already; use another name, or delete it.")
    cfg = model.cfg
    architecture = gguf_model.architecture_of(cfg)
    fields = {"general.architecture": architecture, "general.name": file.removesuffix(SUFFIX)}
    fields |= {"general.file_type": KINDS[kind], "general.quantization_version": 2}
    fields |= gguf_model.fields_of(cfg, architecture) | _tokenizer(model)
    held = gguf_model.tensors_of(cfg)
    kinds = {name: _kind(entries[0], kind.upper()) for name, entries in held.items()}
    about = [(name, kinds[name], _shape(entries)) for name, entries in held.items()]
    head = container.header(fields, about)
    sizes = [blocks.num_bytes(tensor_kind, shape) for _, tensor_kind, shape in about]
    target.check_space(len(head) + sum(sizes))

    def build(item: tuple[str, names.Entry]) -> np.ndarray:
        name, entry = item
        tensor = np.asarray(model.tensor(entry), np.float32)
        if gguf_model.is_rotated(architecture, name):
            tensor = gguf_model.neighbours(tensor, gguf_model.num_heads_of(cfg, name))
        return blocks.encoded(entry.name, kinds[name], tensor)

    items = [(name, entry) for name, entries in held.items() for entry in entries]
    with Meter("export", len(head) + sum(sizes)) as meter:

        def pieces() -> Iterator[bytes | memoryview]:
            yield head
            last = {entries[-1]: size for entries, size in zip(held.values(), sizes, strict=True)}
            for (_, entry), encoded in in_order(build, items):
                yield encoded.data
                meter.add(encoded.nbytes)
                del encoded  # or three would be in memory
                if entry in last:
                    yield container.padding(last[entry])

        target.write(file, pieces())
    return target.sizes()[file]


def _shape(entries: list[names.Entry]) -> tuple[int, ...]:
    shape = entries[0].shape
    return (len(entries), *shape) if ".experts." in entries[0].name else shape


def _kind(entry: names.Entry, kind: str) -> str:
    if len(entry.shape) == 1 or entry.role == Role.ROUTER:
        return "F32"
    if entry.role == Role.EMBEDDING or entry.path == "lm_head/w_VD":
        kind = _OF_TABLES.get(kind, kind)
    return kind if entry.shape[1] % blocks.KINDS[kind].size == 0 else "F16"


def _tokenizer(model: Model) -> dict[str, Any]:
    """The metadata of the tokenizer, and of the settings of sampling."""
    where, num_ids = str(model.place), model.cfg.vocab_size
    files = {name: model.place.read(name) for name in model.others}
    if "hy.tiktoken" in files and "tokenizer.json" not in files:
        files = json_files(where, files, num_ids)
    fields = vocabulary.fields_of(where, files, num_ids)
    if fields["tokenizer.ggml.model"] == "none":
        print(
            f"note: {where} has neither tokenizer.json nor hy.tiktoken; the file will have no "
            "tokenizer, and llama.cpp take and give ids.",
            file=sys.stderr,
        )
    return fields | vocabulary.sampling_fields(files)
