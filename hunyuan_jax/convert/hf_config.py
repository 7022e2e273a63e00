"""config.json of a `model_type: "hunyuan"` folder <-> ModelConfig (specification section 1)."""

import math
from types import NoneType
from typing import Any

from hunyuan_jax.config import ConfigError, ModelConfig, MoeConfig, validate_model

# Read by from_hf; whatever else a config.json holds has no influence on the model and is kept as it is.
_DEFAULTS = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "cla_share_factor": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "moe_topk": 1,
    "num_experts": 1,
    "num_key_value_heads": None,
    "num_shared_expert": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cla": False,
    "use_mixed_mlp_moe": False,
    "use_qk_norm": False,
}
# The types json gives for a field, by the type of its default or by name.
_TYPES_OF_DEFAULT = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
_TYPES = {
    "bos_token_id": (int, NoneType),
    "eos_token_id": (int, list, NoneType),
    "num_key_value_heads": (int, NoneType),
    "pad_token_id": (int, NoneType),
    "rope_scaling": (dict, NoneType),
}
_JSON_NAMES = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string", list: "a list of integers"}
_JSON_NAMES |= {dict: "an object", NoneType: "null"}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of an official config.json; a model folder routes dropless, as the official code does.

    Raises:
      ConfigError: another model_type, a missing size, or a variant that is not implemented, with what to do.
    """
    if hf.get("model_type") != "hunyuan":
        raise ConfigError(f"config.json: model_type = {hf.get('model_type')!r}; only 'hunyuan' (Hunyuan-Large) folders can be loaded.")
    missing = [name for name in _REQUIRED if name not in hf]
    if missing:
        raise ConfigError(f"config.json: {missing[0]} is missing; a Hunyuan-Large config needs {', '.join(_REQUIRED)}.")
    hf = _DEFAULTS | hf
    _check_types(hf)
    if hf["hidden_act"] != "silu":
        raise ConfigError(f"config.json: hidden_act = {hf['hidden_act']!r}; only 'silu' is implemented.")
    if hf["torch_dtype"] not in ("float32", "bfloat16"):
        raise ConfigError(f"config.json: torch_dtype = {hf['torch_dtype']!r}; only float32 and bfloat16 are implemented.")
    num_heads, hidden_size = hf["num_attention_heads"], hf["hidden_size"]
    if num_heads < 1 or hidden_size % num_heads:
        raise ConfigError(f"config.json: hidden_size = {hidden_size} is not divisible by num_attention_heads = {num_heads}.")
    for name in ("rms_norm_eps", "rope_theta"):
        if hf[name] <= 0:
            raise ConfigError(f"config.json: {name} = {hf[name]} must be positive.")
    is_moe = hf["num_experts"] > 1
    eos = hf["eos_token_id"]
    if isinstance(eos, list) and any(type(e) is not int for e in eos):
        raise ConfigError(f"config.json: eos_token_id = {eos} must be an integer or a list of integers.")
    return validate_model(
        ModelConfig(
            vocab_size=hf["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=num_heads if hf["num_key_value_heads"] is None else hf["num_key_value_heads"],
            head_dim=hidden_size // num_heads,
            max_position=hf["max_position_embeddings"],
            rms_norm_eps=float(hf["rms_norm_eps"]),
            rope_theta=float(hf["rope_theta"]),
            **_rope(hf["rope_scaling"]),
            cla_share_factor=hf["cla_share_factor"] if hf["use_cla"] else 1,
            use_qk_norm=hf["use_qk_norm"],
            attention_bias=hf["attention_bias"],
            tie_embeddings=hf["tie_word_embeddings"],
            attention_dropout=float(hf["attention_dropout"]),
            init_std=float(hf["initializer_range"]),
            pad_token_id=-1 if hf["pad_token_id"] is None else hf["pad_token_id"],
            bos_token_id=-1 if hf["bos_token_id"] is None else hf["bos_token_id"],
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            dtype=hf["torch_dtype"],
            moe=MoeConfig(
                num_experts=hf["num_experts"],
                top_k=hf["moe_topk"] if is_moe else 1,
                num_shared_experts=hf["num_shared_expert"] if is_moe and hf["use_mixed_mlp_moe"] else 0,
            ),
        )
    )


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """An official config.json for a model that was not loaded from one.

    Raises:
      ConfigError: the architecture cannot be expressed in the official format.
    """
    if cfg.head_dim * cfg.num_heads != cfg.hidden_size:
        raise ConfigError(
            f"head_dim = {cfg.head_dim} x num_heads = {cfg.num_heads} differs from hidden_size = {cfg.hidden_size}; "
            "the official format has no head_dim field. Keep the model in its own checkpoint format."
        )
    scaling = {
        "alpha": {"type": "dynamic", "factor": 1.0, "alpha": cfg.rope_alpha},
        "linear": {"type": "linear", "factor": cfg.rope_factor, "alpha": None},
        "plain": None,
    }[cfg.rope_type]
    eos = cfg.eos_token_ids
    return {
        "architectures": ["HunYuanForCausalLM"],
        "attention_bias": cfg.attention_bias,
        "attention_dropout": cfg.attention_dropout,
        "bos_token_id": None if cfg.bos_token_id < 0 else cfg.bos_token_id,
        "cla_share_factor": cfg.cla_share_factor,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "initializer_range": cfg.init_std,
        "intermediate_size": cfg.intermediate_size,
        "max_position_embeddings": cfg.max_position,
        "model_type": "hunyuan",
        "moe_topk": cfg.moe.top_k,
        "num_attention_heads": cfg.num_heads,
        "num_experts": cfg.moe.num_experts,
        "num_hidden_layers": cfg.num_layers,
        "num_key_value_heads": cfg.num_kv_heads,
        "num_shared_expert": max(1, cfg.moe.num_shared_experts),
        "pad_token_id": None if cfg.pad_token_id < 0 else cfg.pad_token_id,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_scaling": scaling,
        "rope_theta": cfg.rope_theta,
        "tie_word_embeddings": cfg.tie_embeddings,
        "torch_dtype": cfg.dtype,
        "use_cla": cfg.cla_share_factor > 1,
        "use_mixed_mlp_moe": cfg.moe.num_shared_experts > 0,
        "use_qk_norm": cfg.use_qk_norm,
        "vocab_size": cfg.vocab_size,
    }


def _check_types(hf: dict[str, Any]) -> None:
    """Raises ConfigError at the first value of another JSON type than its field has."""
    for name in (*_REQUIRED, *_DEFAULTS):
        value, types = hf[name], _TYPES.get(name) or _TYPES_OF_DEFAULT[type(_DEFAULTS.get(name, 1))]
        if type(value) not in types or (type(value) is float and not math.isfinite(value)):
            raise ConfigError(f"config.json: {name} = {value!r} must be {' or '.join(_JSON_NAMES[t] for t in types)}.")


def _rope(scaling: dict[str, Any] | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "plain"}
    missing = [name for name in ("type", "factor", "alpha") if name not in scaling]
    if missing:
        raise ConfigError(f"config.json: rope_scaling = {scaling} lacks {missing[0]!r}; the official class reads type, factor and alpha.")
    for name in ("factor", "alpha"):
        value = scaling[name]
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ConfigError(f"config.json: rope_scaling {name} = {value!r} must be a finite number.")
    if scaling["type"] == "linear" and scaling["factor"] is not None:
        return {"rope_type": "linear", "rope_factor": float(scaling["factor"])}
    if scaling["type"] == "dynamic" and scaling["alpha"]:
        return {"rope_type": "alpha", "rope_alpha": float(scaling["alpha"])}
    if scaling["type"] == "dynamic":
        raise ConfigError(
            f"config.json: rope_scaling = {scaling}: dynamic without alpha changes its base with the length of earlier calls, so that "
            "cached and full forward passes disagree; it is not implemented and no release uses it. Set alpha, or use type 'linear'."
        )
    raise ConfigError(f"config.json: rope_scaling = {scaling} is unknown; use type 'dynamic' with alpha, 'linear' with factor, or null.")
