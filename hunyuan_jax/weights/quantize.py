"""`quantize`: a model written as a folder in few bits, matrix by matrix.

int8, int4 and fp8 are formats of compressed-tensors.  EasyQuant is its packed int4, one scale for
each output, with `outlier_position` (int32, o * inputs + i) and `outlier_value` (bfloat16) beside
each matrix.

Files are made one after the other, each in memory as a whole: 1 GB of the model's numbers at most,
or one tensor.  One that has its name is whole, so a killed call continues.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.progress import Meter, in_order
from hunyuan_jax.quant.codes import METHODS, Codes, quantize
from hunyuan_jax.storage import Place
from hunyuan_jax.weights import few_bits, names, quantized, shards, write
from hunyuan_jax.weights.open import Model, open_model
from hunyuan_jax.weights.side_files import is_side_file

_CLAIM = "quantize.json"
_MAX_FILE_BYTES = 1_000_000_000  # of numbers in bfloat16


def quantize_model(
    checkpoint: str | os.PathLike, output: str | os.PathLike, method: str
) -> tuple[int, int]:
    """Writes a model as a folder in few bits; the same call again continues one that was killed.

    Args:
      checkpoint: as for `open_model`.
      output: a local folder or an fsspec URL.
      method: one of quant.codes.METHODS.

    Returns:
      (files that this call wrote, bytes of all files of weights).

    Raises:
      ConfigError: no such model, one that is quantised already, an output that holds something
        else, weights that are not finite.
    """
    if method not in METHODS:
        raise ConfigError(f"--method={method}; use {', '.join(METHODS)}.")
    model, target = open_model(checkpoint), Place(output, "--output")
    few_bits.check_method(model.cfg, method, "--method")
    if model.is_quantized:
        raise ConfigError(
            f"{checkpoint} is quantised already; quantise the model that it was made from."
        )
    group = few_bits.group_of(model.entries)
    entries = [e for e in model.entries if few_bits.is_quantizable(e)]
    size = {"int4": 8, "easyquant": 8, "int8": 4}.get(method, 1)
    if odd := [entry for entry in entries if entry.shape[1] % size]:
        raise ConfigError(
            f"{odd[0].name} has {odd[0].shape[1]} inputs; codes of --method={method} are packed "
            f"by {size}. Use --method=fp8."
        )
    texts = _texts(model)
    config = json.loads(texts["config.json"]) | {
        "quantization_config": _about(model.entries, method, group)
    }
    claim = {"fingerprint": model.fingerprint, "dtype": model.cfg.dtype, "method": method}
    other = "call of quantize with another checkpoint or --method"
    found = write.check_claim(target, _CLAIM, claim, other)
    target.write(_CLAIM, [write.as_json(claim)])
    files = _files(model.entries)
    todo = {name: entries for name, entries in files.items() if name not in found}
    with Meter("quantize", sum(_num_bytes(e) for of in todo.values() for e in of)) as meter:
        for file, of_file in todo.items():
            target.write(file, _file(model, of_file, method, group, meter))
    if len(files) > 1:
        texts[write.INDEX] = write.as_json(_index(target, list(files)))
    for name, text in texts.items():
        if name != "config.json":
            target.write(name, [text])
    target.write("config.json", [write.as_json(config)])
    target.remove(_CLAIM)
    sizes = target.sizes()
    return len(todo), sum(sizes[file] for file in files)


def _texts(model: Model) -> dict[str, bytes]:
    """config.json and the files beside the weights."""
    layout = model.layout or write.new_layout(model.cfg)
    copied = {name: model.place.read(name) for name in model.others if is_side_file(name)}
    return {n: t for n, t in (copied | layout.texts).items() if not shards.is_weights(n)}


def _files(entries: Sequence[names.Entry]) -> dict[str, list[names.Entry]]:
    """The entries of each file of weights."""
    groups, size = [[]], 0
    for entry in entries:
        if groups[-1] and size + _num_bytes(entry) > _MAX_FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += _num_bytes(entry)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, start=1)
    }


def _num_bytes(entry: names.Entry) -> int:
    return 2 * math.prod(entry.shape)


def _file(
    model: Model, entries: list[names.Entry], method: str, group: int, meter: Meter
) -> Iterator[bytes | memoryview]:
    """The bytes of one safetensors file."""

    def convert(entry: names.Entry) -> dict[str, np.ndarray]:
        tensor = model.tensor(entry)
        if not few_bits.is_quantizable(entry):
            return {entry.name: tensor}
        codes = quantize(entry.name, tensor, method, group)
        return _tensors(entry.name.removesuffix("weight"), codes)

    tensors = {}
    for entry, made in in_order(convert, entries):
        tensors |= made
        meter.add(_num_bytes(entry))
    # Wide dtypes first, so that each tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    yield write.header([(name, tensors[name].dtype, tensors[name].shape) for name in order])
    for name in order:
        yield np.ascontiguousarray(tensors.pop(name)).reshape(-1).view(np.uint8).data


def _tensors(stem: str, codes: Codes) -> dict[str, np.ndarray]:
    scale = {f"{stem}weight_scale": codes.scale}
    if codes.values.dtype != np.int8:
        return {f"{stem}weight": codes.values} | scale
    made = {
        f"{stem}weight_packed": quantized.packed(codes.values, codes.bits),
        f"{stem}weight_shape": np.array(codes.values.shape, np.int64),
    }
    if codes.position is not None:
        made |= {
            f"{stem}outlier_position": codes.position,
            f"{stem}outlier_value": codes.value.astype(ml_dtypes.bfloat16),
        }
    return made | scale


def _about(entries: Sequence[names.Entry], method: str, group: int) -> dict[str, Any]:
    """quantization_config of config.json."""
    if method == "easyquant":
        return {"quant_method": "easyquant", "bits": 4}
    is_grouped = method == "int4"
    weights = {
        "num_bits": 4 if is_grouped else 8,
        "type": "float" if method == "fp8" else "int",
        "strategy": "group" if is_grouped else "channel",
        "group_size": group if is_grouped else None,
        "symmetric": True,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }
    # Unpacked int8 means activations in int8 too.
    form = "float-quantized" if method == "fp8" else "pack-quantized"
    ignored = [
        entry.name.removesuffix(".weight")
        for entry in entries
        if len(entry.shape) == 2
        and not few_bits.is_quantizable(entry)
        and entry.name != "model.embed_tokens.weight"
    ]
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ignored or ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


def _index(target: Place, files: list[str]) -> dict[str, Any]:
    weight_map, total = {}, 0
    for file in files:
        length = int.from_bytes(target.read(file, 0, 8), "little")
        for name, about in json.loads(target.read(file, 8, 8 + length)).items():
            if name != "__metadata__":
                weight_map[name] = file
                total += about["data_offsets"][1] - about["data_offsets"][0]
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def num_bytes(cfg: ModelConfig, method: str, outlier_share: float = 0.005) -> int:
    """Bytes of a model's weights in few bits, numbers in bfloat16, without reading any.

    Args:
      cfg: of the model.
      method: one of METHODS.
      outlier_share: of the entries, for "easyquant".
    """
    entries, total = names.entries(cfg), 0
    group = few_bits.group_of(entries)
    for entry in entries:
        size = math.prod(entry.shape)
        if not few_bits.is_quantizable(entry):
            total += (4 if entry.role == few_bits.Role.ROUTER else 2) * size
            continue
        bits = 4 if method in ("int4", "easyquant") else 8
        scales = size // group if method == "int4" else entry.shape[0]
        total += size * bits // 8 + 4 * scales
        total += int(size * outlier_share) * 6 * (method == "easyquant")
    return total
