"""LoRA adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from hunyuan_jax import hub
from hunyuan_jax.config import LORA_TARGETS, LoraConfig, ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import user_path, write_whole
from hunyuan_jax.layers import lora
from hunyuan_jax.storage import Place
from hunyuan_jax.weights import names as table
from hunyuan_jax.weights import shards

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
# What PEFT's target_modules call a projection: a suffix that is that of no other, but for the
# layer.
_MODULE = re.compile(r"(?:shared_mlp\.|experts\.\d+\.)?\w+_proj(?=\.weight$)")
_TARGETS = {lora.names(target)[0]: target for target in LORA_TARGETS}
# Other fields of PEFT that say something when they are not empty; written as such.
_EMPTY = {
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
_FIXED = {"peft_type": "LORA", "bias": "none"}
# Fields that leave the product as it is, whatever they hold: how the adapter was made and trained.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "ephemeral_gpu_offload",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_READ = {"r", "lora_alpha", "target_modules", "use_rslora", "init_lora_weights"}
# Initialisations of A and B alone.  Others change the frozen weights when PEFT loads an adapter.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def write_adapter(
    folder: str | os.PathLike, cfg: ModelConfig, params: dict[str, Any], base: str
) -> None:
    """Writes the adapters of a run.

    Args:
      folder: made if it is not there.
      cfg: with its lora section; params: nested dict that holds the adapters, float32.
      base: path or hub id of the model that they belong to, as PEFT notes it.
    """
    folder = Path(user_path(folder, "--output"))
    tensors = {}
    projections = _projections(table.entries(cfg), cfg.lora.targets)
    for entry, target in projections:
        for name, part in zip(lora.names(target)[1:], "AB", strict=True):
            array = np.asarray(_leaf(params, entry, name))[entry.index].astype(np.float32)
            # Ours are [in, r] and [r, out], torch's [r, in] and [out, r].
            matrix = (
                array.reshape(-1, cfg.lora.rank)
                if part == "A"
                else array.reshape(cfg.lora.rank, -1)
            )
            tensors[_tensor_name(entry.name, part)] = np.ascontiguousarray(matrix.T)
    base_id = hub.hub_id(base)
    settings = (
        _FIXED
        | _EMPTY
        | {
            "base_model_name_or_path": base_id.repo if base_id else base,
            "revision": base_id.revision if base_id else None,
            "inference_mode": True,
            "lora_alpha": cfg.lora.alpha,
            "lora_dropout": 0.0,
            "r": cfg.lora.rank,
            "target_modules": list(
                dict.fromkeys(_MODULE.search(entry.name)[0] for entry, _ in projections)
            ),
            "task_type": "CAUSAL_LM",
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    # Not save_file, which makes a file that only its owner can read.
    write_whole(folder / _WEIGHTS, safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    (folder / _CONFIG).write_text(
        json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def warnings(cfg: ModelConfig) -> list[str]:
    """What to tell a user whose adapter alone may not give the log-probabilities of the run: it
    was learned beside a base in few bits; or PEFT 0.21 on transformers 5 does not serve it, or is
    not known to serve it, as we do.
    """
    found = []
    if cfg.lora.quantize != "none":
        found.append(
            f"warning: this adapter was learned beside a base in {cfg.lora.quantize}; over the "
            "base's own numbers it gives other log-probabilities than the run. For those, export "
            "the merged model (without --adapter)."
        )
    experts = {"expert_gate", "expert_up"} & set(cfg.lora.targets)
    shared = {"gate", "up", "down"} & set(cfg.lora.targets) if cfg.is_moe else set()
    wrong = [
        *sorted(shared),
        *(sorted(experts) if "expert_down" not in cfg.lora.targets or len(experts) == 1 else []),
    ]
    if wrong:
        found.append(
            f"warning: with adapters of {', '.join(wrong)} in a mixture of experts, PEFT on "
            "transformers 5 may compute other logits than this "
            "model, or fail; for use there, export the merged model (without --adapter)."
        )
    return found


def read_adapter(
    folder: str | os.PathLike, cfg: ModelConfig, entries: Sequence[table.Entry]
) -> tuple[ModelConfig, dict[str, Any]]:
    """(config with the adapter's lora section, the adapters as a nested dict of numpy arrays) for
    a model of `cfg`, whose official tensors are `entries`.

    Raises:
      ConfigError: no adapter there, one that does more than LoRA on projections, or tensors that
        do not fit the model, by name.
    """
    place = Place(folder, "adapter", (_CONFIG, _WEIGHTS, _PICKLE))
    rank, alpha, targeted = _settings(place)
    weights, tensors = _read_tensors(place)
    projections = {
        entry.name.removesuffix(".weight"): target
        for entry, target in _projections(entries, LORA_TARGETS)
    }
    modules = _modules(f"{place}/{_CONFIG}", targeted, entries, projections)
    held = {projections[name] for name in modules}
    cfg = dataclasses.replace(
        cfg, lora=LoraConfig(rank, alpha, tuple(t for t in LORA_TARGETS if t in held))
    )
    wanted = {
        _tensor_name(entry.name, part): (entry, target, part)
        for entry, target in _projections(entries, cfg.lora.targets)
        for part in "AB"
        if entry.name.removesuffix(".weight") in modules
    }
    params: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name not in wanted:
            raise ConfigError(f"{weights} holds {name!r}, {_why_not(name, cfg)}.")
        entry, target, part = wanted.pop(name)
        shape = (rank, entry.shape[1]) if part == "A" else (entry.shape[0], rank)
        if tensor.shape != shape:
            raise ConfigError(
                f"{weights}: {name} has shape {tensor.shape}; this model and r = {rank} ask for "
                f"{shape}."
            )
        leaf = lora.names(target)["AB".index(part) + 1]
        groups, *w_dims = (*entry.stacked, *entry.our_shape)
        whole = (groups, *lora.shapes(target, tuple(w_dims), rank)["AB".index(part)])
        node = params
        for key in entry.path.split("/")[:-1]:
            node = node.setdefault(key, {})
        # Zeros are the adapter of a layer that has none.
        stacked = node.setdefault(leaf, np.zeros(whole, np.float32))
        stacked[entry.index] = tensor.astype(np.float32).T.reshape(whole[len(entry.index) :])
    if wanted:
        raise ConfigError(
            f"{weights} lacks {len(wanted)} tensors that target_modules = {targeted} of {_CONFIG} "
            f"promises, the first one {next(iter(wanted))}; save the adapter again."
        )
    return cfg, params


def _projections(
    entries: Sequence[table.Entry], targets: tuple[str, ...]
) -> list[tuple[table.Entry, str]]:
    """The official weights that have an adapter if `targets` do, each with its target."""
    found = [(entry, _TARGETS.get(entry.path.rsplit("/", 1)[1])) for entry in entries]
    return [(entry, target) for entry, target in found if target in targets]


def _tensor_name(name: str, part: str) -> str:
    return f"{_PREFIX}{name.removesuffix('.weight')}.lora_{part}.weight"


def _leaf(params: dict[str, Any], entry: table.Entry, name: str) -> Any:
    for key in entry.path.split("/")[:-1]:
        params = params[key]
    return params[name]


def _settings(place: Place) -> tuple[int, float, str | list[str]]:
    """(rank, alpha, target_modules) of adapter_config.json; the product is times alpha / rank."""
    where = f"{place}/{_CONFIG}"
    if not place.is_file(_CONFIG):
        raise ConfigError(f"{place} is not a PEFT adapter: it has no {_CONFIG}.")
    settings = place.read_json(_CONFIG)
    for name, value in settings.items():
        wanted = _FIXED.get(name)
        is_fine = name in _HARMLESS | _READ or (value == wanted if wanted else not value)
        if not is_fine:
            raise ConfigError(
                f"{where}: {name} = {value!r}; only {wanted or _EMPTY.get(name)!r} is "
                "implemented. Merge the adapter with PEFT itself."
            )
    if missing := [name for name in ("r", "lora_alpha", "target_modules") if name not in settings]:
        raise ConfigError(f"{where} is not of a LoRA adapter: it has no {missing[0]}.")
    init = settings.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in _PLAIN_INITS:
        raise ConfigError(
            f"{where}: init_lora_weights = {init!r} also changes the frozen weights when PEFT "
            "loads the adapter, which is not implemented. Save it with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it with PEFT itself."
        )
    rank, alpha, targeted = (settings[name] for name in ("r", "lora_alpha", "target_modules"))
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise ConfigError(
            f"{where}: r = {rank!r} and lora_alpha = {alpha!r} must be a positive integer and a "
            "number."
        )
    is_names = isinstance(targeted, list) and all(isinstance(name, str) for name in targeted)
    if not targeted or not (is_names or isinstance(targeted, str)):
        raise ConfigError(
            f"{where}: target_modules = {targeted!r} must be a list of names or a regular "
            "expression."
        )
    return rank, float(alpha) * (rank**0.5 if settings.get("use_rslora") else 1.0), targeted


def _modules(
    where: str,
    targeted: str | list[str],
    entries: Sequence[table.Entry],
    projections: dict[str, str],
) -> set[str]:
    """The modules of the model that PEFT gives adapters.

    A text is a regular expression of the whole name; names in a list are whole or end behind a
    dot.
    """
    linears = [entry.name.removesuffix(".weight") for entry in entries if len(entry.shape) == 2]

    def is_named(name: str, target: str) -> bool:
        return name == target or name.endswith(f".{target}")

    idle = []  # in the list, but of no module that can have an adapter
    if not isinstance(targeted, str):
        found = {name for name in linears if any(is_named(name, t) for t in targeted)}
        idle = [t for t in targeted if not any(is_named(name, t) for name in projections)]
    elif targeted.lower() == "all-linear":
        found = set(linears) - {"lm_head", "model.embed_tokens"}
    else:
        try:
            found = {name for name in linears if re.fullmatch(targeted, name)}
        except re.error as e:
            raise ConfigError(
                f"{where}: target_modules = {targeted!r} is not a regular expression: {e}."
            ) from e
    other = idle or sorted(found - projections.keys()) or ([] if found else [targeted])
    if other:
        known = dict.fromkeys(name.rsplit(".", 1)[1] for name in projections)
        raise ConfigError(
            f"{where}: target_modules = {targeted} asks for {shards.listed(other)}; only "
            f"{', '.join(known)} can have adapters in this model. Merge the adapter with PEFT "
            "itself."
        )
    return found


def _read_tensors(place: Place) -> tuple[str, dict[str, np.ndarray]]:
    """(the file's path, its tensors)."""
    sizes = place.sizes()
    for name in (_WEIGHTS, _PICKLE):
        if name in sizes:
            return f"{place}/{name}", shards.read_file(place, name, sizes[name])
    raise ConfigError(f"{place} holds no {_WEIGHTS} and no {_PICKLE}; copy the whole adapter.")


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
