"""LoRA adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from hunyuan_jax.config import LORA_TARGETS, LoraConfig, ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import user_path
from hunyuan_jax.layers import lora
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.weights import names as table

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What PEFT's target_modules call a projection: a suffix that is that of no other, but for the
# layer.
_MODULE = re.compile(r"(?:shared_mlp\.|experts\.\d+\.)?\w+_proj(?=\.weight$)")
_TARGETS = {lora.names(target)[0]: target for target in LORA_TARGETS}
# What else PEFT can do with an adapter: other values change the product, or add weights.
_FIXED = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "megatron_config": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "exclude_modules": None,
    "lora_bias": False,
}


def write_adapter(
    folder: str | os.PathLike, cfg: ModelConfig, params: dict[str, Any], base: str
) -> None:
    """Writes the adapters of a run.

    Args:
      folder: made if it is not there.
      cfg: with its lora section; params: nested dict that holds the adapters, float32.
      base: path or name of the model that they belong to, as PEFT notes it.
    """
    folder = Path(user_path(folder, "--output"))
    tensors = {}
    for entry, target in _projections(cfg):
        for name, part in zip(lora.names(target)[1:], "AB", strict=True):
            array = np.asarray(_leaf(params, entry, name))[entry.index].astype(np.float32)
            # Ours are [in, r] and [r, out], torch's [r, in] and [out, r].
            matrix = (
                array.reshape(-1, cfg.lora.rank)
                if part == "A"
                else array.reshape(cfg.lora.rank, -1)
            )
            tensors[_tensor_name(entry.name, part)] = np.ascontiguousarray(matrix.T)
    settings = _FIXED | {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "lora_alpha": cfg.lora.alpha,
        "lora_dropout": 0.0,
        "r": cfg.lora.rank,
        "target_modules": list(
            dict.fromkeys(_MODULE.search(entry.name)[0] for entry, _ in _projections(cfg))
        ),
        "task_type": "CAUSAL_LM",
    }
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(
        json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def peft_warning(cfg: ModelConfig) -> str | None:
    """What to tell a user whose adapter PEFT 0.21 on transformers 5 does not serve, or is not
    known to serve, as we do; else None.
    """
    experts = {"expert_gate", "expert_up"} & set(cfg.lora.targets)
    shared = {"gate", "up", "down"} & set(cfg.lora.targets) if cfg.is_moe else set()
    wrong = [
        *sorted(shared),
        *(sorted(experts) if "expert_down" not in cfg.lora.targets or len(experts) == 1 else []),
    ]
    if not wrong:
        return None
    return (
        f"warning: with adapters of {', '.join(wrong)} in a mixture of experts, PEFT on "
        "transformers 5 may compute other logits than this "
        "model, or fail; for use there, export the merged model (without --adapter)."
    )


def read_adapter(
    folder: str | os.PathLike, cfg: ModelConfig
) -> tuple[ModelConfig, dict[str, Any]]:
    """(config with the adapter's lora section, the adapters as a nested dict of numpy arrays) for
    a model of `cfg`.

    Raises:
      ConfigError: no adapter there, one that does more than LoRA on projections, or tensors that
        do not fit the model, by name.
    """
    folder = Path(user_path(folder, "adapter"))
    rank, alpha, modules = _settings(folder)
    tensors = _read_tensors(folder / _WEIGHTS)
    projections = {
        entry.name.removesuffix(".weight"): target
        for entry, target in _projections(cfg, LORA_TARGETS)
    }
    held = {target for name, target in projections.items() if _tensor_name(name, "A") in tensors}
    for module in modules:
        meant = {target for name, target in projections.items() if name.endswith(f".{module}")}
        if not meant:
            known = dict.fromkeys(name.rsplit(".", 1)[1] for name in projections)
            raise ConfigError(
                f"{folder / _CONFIG}: target_modules = {modules}; only {', '.join(known)} can "
                "have adapters in this model. Merge the adapter with PEFT itself."
            )
        if not meant & held:
            raise ConfigError(
                f"{folder / _WEIGHTS} has no tensor of {module}, which {_CONFIG} promises; save "
                "the adapter again."
            )
    cfg = dataclasses.replace(
        cfg, lora=LoraConfig(rank, alpha, tuple(t for t in LORA_TARGETS if t in held))
    )
    shapes = abstract_model(cfg, single_device_mesh())[1]
    wanted = {
        _tensor_name(entry.name, part): (entry, target, part)
        for entry, target in _projections(cfg)
        for part in "AB"
    }
    params: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name not in wanted:
            raise ConfigError(f"{folder / _WEIGHTS} holds {name!r}, {_why_not(name, cfg)}.")
        entry, target, part = wanted.pop(name)
        shape = (rank, entry.shape[1]) if part == "A" else (entry.shape[0], rank)
        if tensor.shape != shape:
            raise ConfigError(
                f"{folder / _WEIGHTS}: {name} has shape {tensor.shape}; this model and r = {rank} "
                f"ask for {shape}."
            )
        leaf = lora.names(target)["AB".index(part) + 1]
        whole = _leaf(shapes, entry, leaf).shape
        node = params
        for key in entry.path.split("/")[:-1]:
            node = node.setdefault(key, {})
        stacked = node.setdefault(leaf, np.empty(whole, np.float32))
        stacked[entry.index] = tensor.astype(np.float32).T.reshape(whole[len(entry.index) :])
    if wanted:
        raise ConfigError(
            f"{folder / _WEIGHTS} lacks {len(wanted)} tensors that {_CONFIG} promises, the first "
            f"one {next(iter(wanted))}."
        )
    return cfg, params


def _projections(
    cfg: ModelConfig, targets: tuple[str, ...] | None = None
) -> list[tuple[table.Entry, str]]:
    """The official weights that have an adapter, each with its target; `targets` other than those
    of `cfg`.
    """
    found = [(entry, _TARGETS.get(entry.path.rsplit("/", 1)[1])) for entry in table.entries(cfg)]
    return [(entry, target) for entry, target in found if target in (targets or cfg.lora.targets)]


def _tensor_name(name: str, part: str) -> str:
    return f"{_PREFIX}{name.removesuffix('.weight')}.lora_{part}.weight"


def _leaf(params: dict[str, Any], entry: table.Entry, name: str) -> Any:
    for key in entry.path.split("/")[:-1]:
        params = params[key]
    return params[name]


def _settings(folder: Path) -> tuple[int, float, list[str]]:
    """(rank, alpha, target_modules) of adapter_config.json."""
    path = folder / _CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder} is not a PEFT adapter: it has no {_CONFIG}.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha, modules = settings["r"], settings["lora_alpha"], settings["target_modules"]
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(
            f"{path} is not the JSON of a LoRA adapter: {type(e).__name__}: {e}."
        ) from e
    for name, value in _FIXED.items():
        if (
            name in settings and settings[name] != value and (settings[name] or value)
        ):  # all that is empty means the same
            raise ConfigError(
                f"{path}: {name} = {settings[name]!r}; only {value!r} is implemented. Merge the "
                "adapter with PEFT itself."
            )
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise ConfigError(
            f"{path}: r = {rank!r} and lora_alpha = {alpha!r} must be a positive integer and a "
            "number."
        )
    return rank, float(alpha), [modules] if isinstance(modules, str) else list(modules or [])


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ConfigError(
            f"{path.parent} holds no {path.name}; PEFT writes one unless it was asked for .bin. "
            "Save the adapter as safetensors."
        )
    try:
        return safetensors.numpy.load_file(path)
    except SafetensorError as e:
        raise ConfigError(
            f"{path} is not a safetensors file ({e}); was it downloaded whole, and not as a "
            "git-lfs pointer?"
        ) from e


def _why_not(name: str, cfg: ModelConfig) -> str:
    match = re.fullmatch(
        re.escape(_PREFIX) + r"model\.layers\.(\d+)\.self_attn\.([kv])_proj\.lora_[AB]\.weight",
        name,
    )
    if match and int(match[1]) < cfg.num_layers and int(match[1]) % cfg.cla_share_factor:
        producer = int(match[1]) - int(match[1]) % cfg.cla_share_factor
        return (
            f"but layer {match[1]} has no {match[2]}_proj: with cla_share_factor = "
            f"{cfg.cla_share_factor} it uses those of layer "
            f"{producer}. The adapter belongs to another model"
        )
    return "which an adapter of this model and these target_modules does not have"
