"""config.json of a model folder <-> ModelConfig.

Five model types.  "hunyuan" is Hunyuan-Large's own code (docs/model.md), and A13B's as it is on
GitHub; "hunyuan_v1_moe" and "hunyuan_v1_dense" are transformers' classes.  They differ in what
follows from the same numbers, see docs/family.md.  "hy_v3" is Hy3 (hf_hy3.py).  "hunyuan_jax" is
for models with layers that no release has; its config.json holds the fields of ModelConfig.
"""

import dataclasses
import math
from typing import Any

from hunyuan_jax.config import (
    LatentConfig,
    ModelConfig,
    MoeConfig,
    SparkConfig,
    from_dict,
    to_dict,
)
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.weights import hf_fields, hf_hy3
from hunyuan_jax.weights.hf_spelling import check_types, dtype_of, one_spelling

LARGE, V1_MOE, V1_DENSE = "hunyuan", "hunyuan_v1_moe", "hunyuan_v1_dense"
# A folder with layers that no release has; its config.json holds the fields of ModelConfig.
OWN = "hunyuan_jax"
_ARCHITECTURES = {
    LARGE: "HunYuanForCausalLM",
    V1_MOE: "HunYuanMoEV1ForCausalLM",
    V1_DENSE: "HunYuanDenseV1ForCausalLM",
}

# Read by from_hf, in the spelling of the hub; a config.json may hold more, which `_FIXED` and its
# like check, or hf_fields.py.
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
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Fields that change the model in somebody's code but not here: with another value we would compute
# something else without a word.
_FIXED = {
    "add_classification_head": False,
    "group_limited_greedy": False,
    "mlp_bias": False,
    "moe_layer_num_skipped": 0,
    "norm_type": ("rms", "hf_rms"),
    "partial_rotary_factor": 1.0,
    "position_embedding_xdrope": False,
    "routed_scaling_factor": 1.0,
    "use_mla": False,
    "use_rotary_pos_emb": True,
}
# And those that transformers ignores where Hunyuan-Large's code does not.
_FIXED_V1 = {"use_cla": False, "use_qk_norm": True}
_FIXED_V1_MOE = {
    "moe_drop_tokens": False,
    "moe_random_routing_dropped_token": False,
    "norm_topk_prob": True,
    "num_shared_expert": 1,
    "use_mixed_mlp_moe": True,
}
# What is read or checked in this file.
_KNOWN = {*_DEFAULTS, *_REQUIRED, *_FIXED, *_FIXED_V1, *_FIXED_V1_MOE}
_KNOWN |= {"model_type", "head_dim", "attention_head_dim", "moe_intermediate_size"}
_ROPE_FIELDS = {"type", "rope_type", "rope_theta", "factor", "alpha"}
# Of RoPE types that are not read; the official classes do not read them with those that are.
_IDLE_ROPE_FIELDS = {
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
}


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json; a model folder routes dropless, as the official code does.

    Raises:
      ConfigError: another model_type, a missing size, a variant that is not implemented, or a
        field that transformers ignores with a value that asks for something; with what to do.
    """
    kind = hf.get("model_type")
    if kind == OWN:
        return _from_own(hf)
    if kind == hf_hy3.MODEL_TYPE:
        return hf_hy3.from_hf(hf)
    if kind not in _ARCHITECTURES:
        known = (*_ARCHITECTURES, hf_hy3.MODEL_TYPE)
        raise ConfigError(
            f"config.json: model_type = {kind!r}; only {', '.join(map(repr, known))} folders can "
            "be loaded (Hunyuan-Large, Hunyuan-A13B, the dense models of 0.5B to 7B, and Hy3)."
        )
    missing = [name for name in _REQUIRED if hf.get(name) is None]
    if missing:
        raise ConfigError(
            f"config.json: {missing[0]} is missing; a Hunyuan config needs {', '.join(_REQUIRED)}."
        )
    given = one_spelling(hf)
    hf = _DEFAULTS | given
    check_types(hf, _DEFAULTS, _REQUIRED)
    _check_fixed(given, kind)
    hf_fields.refuse_unknown(given, _KNOWN)
    if hf["hidden_act"] != "silu":
        raise ConfigError(
            f"config.json: hidden_act = {hf['hidden_act']!r}; only 'silu' is implemented."
        )
    if hf["torch_dtype"] not in ("float32", "bfloat16"):
        raise ConfigError(
            f"config.json: torch_dtype = {hf['torch_dtype']!r}; only float32 and bfloat16 are "
            "implemented. Load or import it with dtype bfloat16 or float32, or change it there."
        )
    for name in ("rms_norm_eps", "rope_theta"):
        if hf[name] <= 0:
            raise ConfigError(f"config.json: {name} = {hf[name]} must be positive.")
    _check_experts(hf, kind)
    num_heads = hf["num_attention_heads"]
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_heads if hf["num_key_value_heads"] is None else hf["num_key_value_heads"],
        head_dim=_head_dim(hf, kind),
        rope_theta=float(hf["rope_theta"]),
        **_rope(hf["rope_scaling"], kind),
        cla_share_factor=hf["cla_share_factor"] if hf["use_cla"] else 1,
        use_qk_norm=hf["use_qk_norm"] or kind != LARGE,
        **hf_fields.shared_by_all(hf),
        moe=_moe(hf, kind),
    )


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """A config.json for a model that was not loaded from one: transformers' own model type where
    it can compute the model, else "hunyuan".

    Spelled as on the hub, which transformers reads since 4.56.

    Raises:
      ConfigError: no model type can express the architecture.
    """
    if hf_hy3.is_hy3(cfg):
        return hf_hy3.to_hf(cfg)
    if cfg.spark != SparkConfig() or cfg.latent != LatentConfig() or _has_parts_of_hy3(cfg):
        return _to_own(cfg)
    kind = _model_type(cfg)
    scaling = {
        "alpha": {"type": "dynamic", "factor": 1.0, "alpha": cfg.rope_alpha},
        "linear": {"type": "linear", "factor": cfg.rope_factor, "alpha": None},
    }.get(cfg.rope_type)
    eos = cfg.eos_token_ids
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "attention_bias": cfg.attention_bias,
        "attention_dropout": cfg.attention_dropout,
        "bos_token_id": None if cfg.bos_token_id < 0 else cfg.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "initializer_range": cfg.init_std,
        "intermediate_size": cfg.intermediate_size,
        "max_position_embeddings": cfg.max_position,
        "model_type": kind,
        "num_attention_heads": cfg.num_heads,
        "num_hidden_layers": cfg.num_layers,
        "num_key_value_heads": cfg.num_kv_heads,
        "pad_token_id": None if cfg.pad_token_id < 0 else cfg.pad_token_id,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_scaling": scaling,
        "rope_theta": cfg.rope_theta,
        "tie_word_embeddings": cfg.tie_embeddings,
        "torch_dtype": cfg.dtype,
        "use_qk_norm": cfg.use_qk_norm,
        "vocab_size": cfg.vocab_size,
        **({} if kind == LARGE else {"head_dim": cfg.head_dim}),
        **(
            {"cla_share_factor": cfg.cla_share_factor, "use_cla": cfg.cla_share_factor > 1}
            if kind == LARGE
            else {}
        ),
        **({} if kind == V1_DENSE else _moe_fields(cfg.moe)),
        **({"norm_topk_prob": True} if kind == V1_MOE else {}),
    }


# Fields of ModelConfig that say how a model is trained or run, not what it is.
_NOT_OF_A_FOLDER = ("dtype", "remat", "kernels", "context_attention", "lora")


def _has_parts_of_hy3(cfg: ModelConfig) -> bool:
    """Whether something is not as in the older models."""
    plain = MoeConfig()
    return bool(
        cfg.norm_before_rope
        or cfg.num_dense_layers
        or cfg.num_mtp_layers
        or any(
            getattr(cfg.moe, name) != getattr(plain, name)
            for name in ("intermediate_size", "scoring", "routed_scale", "selection_bias")
        )
    )


def _to_own(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of a model with layers that only this project has."""
    fields = {name: v for name, v in to_dict(cfg).items() if name not in _NOT_OF_A_FOLDER}
    return {"model_type": OWN, "torch_dtype": cfg.dtype, "model": fields}


def _from_own(hf: dict[str, Any]) -> ModelConfig:
    """Inverse of `_to_own`, but for the routing, which is dropless in every model folder."""
    fields = hf.get("model")
    if not isinstance(fields, dict):
        raise ConfigError(
            f"config.json: model = {fields!r}; a {OWN!r} folder needs an object of the fields of "
            "ModelConfig."
        )
    cfg = from_dict(ModelConfig, fields | {"dtype": dtype_of(hf)}, "model.")
    return dataclasses.replace(
        cfg, moe=dataclasses.replace(cfg.moe, dispatch="dropless", group_size=0)
    )


def _check_fixed(given: dict[str, Any], kind: str) -> None:
    """Raises ConfigError where a field of the file asks for what neither this library nor, for its
    own types, transformers does.
    """
    fixed = {name: (value, "this library") for name, value in _FIXED.items()}
    if kind != LARGE:
        fixed |= {name: (value, f"transformers' {kind}") for name, value in _FIXED_V1.items()}
    if kind == V1_MOE:
        fixed |= {name: (value, f"transformers' {kind}") for name, value in _FIXED_V1_MOE.items()}
    for name, (values, where) in fixed.items():
        values = values if isinstance(values, tuple) else (values,)
        value = values[0]
        if name in given and given[name] not in values:
            raise ConfigError(
                f"config.json: {name} = {given[name]!r} has no effect in {where}, which computes "
                f"what {value!r} asks for. Set {name} to {value!r} if that is what the model was "
                "trained with; otherwise it cannot be loaded."
            )


def _check_experts(hf: dict[str, Any], kind: str) -> None:
    """Raises ConfigError for numbers and widths of experts that the model type does not have."""
    num_experts, width = hf["num_experts"], hf.get("moe_intermediate_size")
    if kind == V1_DENSE and num_experts != 1:
        raise ConfigError(
            f"config.json: num_experts = {num_experts} has no effect in transformers' {kind}; the "
            f"model type is {V1_MOE!r}."
        )
    if kind == V1_MOE and num_experts < 2:
        raise ConfigError(
            f"config.json: num_experts = {num_experts}; a {kind} needs at least 2. A model with "
            f"one MLP is a {V1_DENSE!r}."
        )
    if num_experts > 1 and width is not None and width != hf["intermediate_size"]:
        raise ConfigError(
            f"config.json: moe_intermediate_size = {width} differs from intermediate_size = "
            f"{hf['intermediate_size']}; transformers ignores it, and experts of another width "
            "than the shared one are not implemented. Set them equal."
        )
    is_normalised = hf["moe_topk"] > 1
    if (
        kind == LARGE
        and num_experts > 1
        and hf.get("norm_topk_prob", is_normalised) != is_normalised
    ):
        raise ConfigError(
            f"config.json: norm_topk_prob = {hf['norm_topk_prob']} has no effect in the code of "
            f"model_type {LARGE!r}: with moe_topk = {hf['moe_topk']} it computes what "
            f"{is_normalised} asks for. Set it to that, or leave it out."
        )


def _head_dim(hf: dict[str, Any], kind: str) -> int:
    """head_dim, else attention_head_dim, else hidden_size / heads, which is the only one that
    Hunyuan-Large's code knows.
    """
    num_heads, hidden_size = hf["num_attention_heads"], hf["hidden_size"]
    named = {
        name: hf[name] for name in ("head_dim", "attention_head_dim") if hf.get(name) is not None
    }
    for name, value in named.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"config.json: {name} = {value!r} must be a positive integer.")
    if len(set(named.values())) > 1:
        raise ConfigError(
            f"config.json: head_dim = {hf['head_dim']} and attention_head_dim = "
            f"{hf['attention_head_dim']} differ; keep one."
        )
    is_whole = num_heads >= 1 and hidden_size % num_heads == 0
    if not is_whole and (kind == LARGE or not named):
        raise ConfigError(
            f"config.json: hidden_size = {hidden_size} is not divisible by num_attention_heads = "
            f"{num_heads}."
        )
    if not named:
        return hidden_size // num_heads
    name, head_dim = next(iter(named.items()))
    if kind == LARGE and head_dim != hidden_size // num_heads:
        raise ConfigError(
            f"config.json: {name} = {head_dim} has no effect in the code of model_type {LARGE!r}, "
            f"whose heads have hidden_size / num_attention_heads = {hidden_size // num_heads} "
            "entries; set it to that, or use a model_type of transformers."
        )
    return head_dim


def _moe(hf: dict[str, Any], kind: str) -> MoeConfig:
    if hf["num_experts"] == 1:
        return MoeConfig()
    has_shared = kind == V1_MOE or hf["use_mixed_mlp_moe"]
    return MoeConfig(
        num_experts=hf["num_experts"],
        top_k=hf["moe_topk"],
        # transformers divides by the sum of the chosen probabilities always, Hunyuan-Large's code
        # for more than one choice.
        norm_topk_prob=kind == V1_MOE or hf["moe_topk"] > 1,
        num_shared_experts=hf["num_shared_expert"] if has_shared else 0,
    )


def _moe_fields(moe: MoeConfig) -> dict[str, Any]:
    return {
        "moe_topk": moe.top_k,
        "num_experts": moe.num_experts,
        "num_shared_expert": max(1, moe.num_shared_experts),
        "use_mixed_mlp_moe": moe.num_shared_experts > 0,
    }


def _model_type(cfg: ModelConfig) -> str:
    moe = cfg.moe
    if cfg.cla_share_factor == 1 and cfg.use_qk_norm and cfg.rope_type in ("alpha", "default"):
        if not cfg.is_moe:
            return V1_DENSE
        if moe.num_shared_experts == 1 and moe.norm_topk_prob:
            return V1_MOE
    if cfg.head_dim * cfg.num_heads != cfg.hidden_size:
        raise ConfigError(
            f"head_dim = {cfg.head_dim} x num_heads = {cfg.num_heads} differs from hidden_size = "
            f"{cfg.hidden_size}; the official format has no head_dim field. Keep the model in its "
            "own checkpoint format."
        )
    if cfg.rope_type == "default":
        raise ConfigError(
            "rope_type = 'default' (exact frequencies) exists in transformers' model types only, "
            "which have a norm of queries and keys, no cross-layer attention and, with experts, "
            "one shared expert and norm_topk_prob. Keep the model in its own checkpoint format."
        )
    if cfg.is_moe and moe.norm_topk_prob != (moe.top_k > 1):
        raise ConfigError(
            f"norm_topk_prob = {moe.norm_topk_prob} with top_k = {moe.top_k}: the official format "
            "has raw probabilities for one choice and "
            "normalised ones for several. Keep the model in its own checkpoint format."
        )
    return LARGE


def _rope(scaling: dict[str, Any] | None, kind: str) -> dict[str, Any]:
    # Hunyuan-Large's code rounds the plain frequencies to bfloat16, transformers does not.
    plain = {"rope_type": "plain" if kind == LARGE else "default"}
    if scaling is None:
        return plain
    rope_type = scaling.get("type", scaling.get("rope_type"))
    if scaling.get("rope_type", rope_type) != rope_type:
        raise ConfigError(
            f"config.json: rope_scaling = {scaling}: type and rope_type are one field; keep one."
        )
    other = scaling.keys() - _ROPE_FIELDS - _IDLE_ROPE_FIELDS
    hf_fields.refuse_unknown({f"rope_scaling.{name}": scaling[name] for name in other}, set())
    if rope_type is None:
        raise ConfigError(
            f"config.json: rope_scaling = {scaling} lacks 'type'; the official class reads type, "
            "factor and alpha."
        )
    if rope_type == "default":
        return plain
    factor, alpha = (scaling.get(name) for name in ("factor", "alpha"))
    for name, value in (("factor", factor), ("alpha", alpha)):
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ConfigError(
                f"config.json: rope_scaling {name} = {value!r} must be a finite number."
            )
    if rope_type == "linear" and factor is not None and kind == LARGE:
        return {"rope_type": "linear", "rope_factor": float(factor)}
    if rope_type == "dynamic" and alpha:
        return {"rope_type": "alpha", "rope_alpha": float(alpha)}
    if rope_type == "dynamic":
        raise ConfigError(
            f"config.json: rope_scaling = {scaling}: dynamic without alpha changes its base with "
            "the length of earlier calls, so that cached and full forward passes disagree; it is "
            "not implemented and no release uses it. Set alpha, or use type 'linear'."
        )
    known = (
        "type 'dynamic' with alpha, 'linear' with factor, or null"
        if kind == LARGE
        else "type 'dynamic' with alpha, or null"
    )
    raise ConfigError(
        f"config.json: rope_scaling = {scaling} is unknown for {kind!r}; use {known}."
    )
