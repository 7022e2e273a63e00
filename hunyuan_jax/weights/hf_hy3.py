"""config.json of Hy3 and Hy-MT2 (model_type "hy_v3") <-> ModelConfig (docs/family.md, Hy3)."""

from typing import Any

from hunyuan_jax.config import LatentConfig, ModelConfig, MoeConfig, SparkConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.weights import hf_fields
from hunyuan_jax.weights.hf_spelling import check_types, one_spelling

MODEL_TYPE = "hy_v3"

# Read here; the values are those of transformers' class, which fills in what a config.json lacks,
# but for enable_lm_head_fp32, which it does not know: the value is the releases'.
_DEFAULTS = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "enable_lm_head_fp32": True,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.006,
    "intermediate_size": 13_312,
    "max_position_embeddings": 131_072,
    "moe_intermediate_size": 1536,
    "moe_topk": 8,  # num_experts_per_tok in the file
    "num_attention_heads": 64,
    "num_experts": 192,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "pad_token_id": None,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 11_158_840.0,
    "router_scaling_factor": 2.826,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 120_832,
}
# Fields that transformers' class does not read, and what it computes whatever they say.
_FIXED = {
    "hidden_act": "silu",
    "mlp_bias": False,  # which it does read
    "moe_router_enable_expert_bias": True,
    "moe_router_use_sigmoid": True,
    "n_group": 1,
    "norm_topk_prob": True,
    "partial_rotary_factor": 1.0,
    "qk_norm": True,
    "route_norm": True,
    "scoring_func": "sigmoid",
    "topk_group": 1,
    "use_cla": False,
    "use_mla": False,
    "use_qk_norm": True,
}
# Fields that change nothing here: softmax and the sum of experts are float32 in any case.
_IDLE = {"enable_attention_fp32_softmax", "enable_moe_fp32_combine", "use_grouped_mm"}
_KNOWN = {*_DEFAULTS, *_FIXED, *_IDLE, "model_type", "mlp_layer_types", "first_k_dense_replace"}
_KNOWN |= {"expert_hidden_dim", "routed_scaling_factor"}


def from_hf(given: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json.

    Raises:
      ConfigError: a value that is not implemented, or a field that transformers' class ignores
        with a value that asks for something else than it computes.
    """
    if given.get("num_shared_experts", 1) is None:
        raise _other("num_shared_experts", None, 1, "which transformers' class needs")
    given = one_spelling(given)
    hf = _DEFAULTS | given
    check_types(hf, _DEFAULTS, ())
    for name, value in _FIXED.items():
        if given.get(name, value) != value:
            raise _other(name, given[name], value, f"of all that transformers' {MODEL_TYPE} does")
    for name, source in (
        ("expert_hidden_dim", "moe_intermediate_size"),
        ("routed_scaling_factor", "router_scaling_factor"),
    ):
        if given.get(name, hf[source]) != hf[source]:
            raise _other(name, given[name], hf[source], f"as {source}, which is read")
    hf_fields.refuse_unknown(given, _KNOWN)
    _check_rope(hf["rope_scaling"])
    if hf["num_shared_experts"] < 1:
        raise _other("num_shared_experts", hf["num_shared_experts"], 1, "or more")
    if hf["torch_dtype"] not in ("float32", "bfloat16"):
        raise _other("torch_dtype", hf["torch_dtype"], "bfloat16", "or 'float32'")
    for name in ("rms_norm_eps", "rope_theta", "router_scaling_factor"):
        if hf[name] <= 0:
            raise ConfigError(f"config.json: {name} = {hf[name]} must be positive.")
    num_layers, num_dense = hf["num_hidden_layers"], _num_dense_layers(hf)
    is_moe = num_dense < num_layers
    if is_moe and hf["num_experts"] < 2:
        raise _other("num_experts", hf["num_experts"], 2, "or more")
    if hf["num_nextn_predict_layers"] not in (0, 1):
        raise _other("num_nextn_predict_layers", hf["num_nextn_predict_layers"], 1, "or 0")
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=num_layers,
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        rope_type="default",
        rope_theta=float(hf["rope_theta"]),
        norm_before_rope=True,
        num_dense_layers=num_dense if is_moe else 0,
        num_mtp_layers=hf["num_nextn_predict_layers"] if is_moe else 0,
        fp32_head=hf["enable_lm_head_fp32"],
        **hf_fields.shared_by_all(hf),
        moe=_moe(hf) if is_moe else MoeConfig(),
    )


def is_hy3(cfg: ModelConfig) -> bool:
    """Whether transformers' class computes the model."""
    moe = cfg.moe
    is_attention = cfg.norm_before_rope and cfg.rope_type == "default"
    is_mixture = (
        moe.scoring == "sigmoid"
        and moe.selection_bias
        and moe.norm_topk_prob
        and moe.num_shared_experts > 0
    )
    is_plain = cfg.spark == SparkConfig() and cfg.latent == LatentConfig()
    return is_attention and is_plain and (is_mixture or not cfg.is_moe)


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """A config.json for a model that was not loaded from one, with the fields of the releases."""
    eos, moe = cfg.eos_token_ids, cfg.moe
    num_dense = cfg.num_dense_layers if cfg.is_moe else cfg.num_layers
    fields = {
        "architectures": ["HYV3ForCausalLM"],
        "attention_bias": cfg.attention_bias,
        "attention_dropout": cfg.attention_dropout,
        "bos_token_id": None if cfg.bos_token_id < 0 else cfg.bos_token_id,
        "dtype": cfg.dtype,
        "enable_lm_head_fp32": cfg.fp32_head,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "first_k_dense_replace": num_dense,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "initializer_range": cfg.init_std,
        "intermediate_size": cfg.intermediate_size,
        "max_position_embeddings": cfg.max_position,
        "mlp_layer_types": ["dense"] * num_dense + ["sparse"] * (cfg.num_layers - num_dense),
        "model_type": MODEL_TYPE,
        "num_attention_heads": cfg.num_heads,
        "num_hidden_layers": cfg.num_layers,
        "num_key_value_heads": cfg.num_kv_heads,
        "num_nextn_predict_layers": cfg.num_mtp_layers,
        "pad_token_id": None if cfg.pad_token_id < 0 else cfg.pad_token_id,
        "qk_norm": True,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_parameters": {"rope_theta": cfg.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": cfg.tie_embeddings,
        "vocab_size": cfg.vocab_size,
    }
    if cfg.is_moe:
        fields |= {
            "expert_hidden_dim": cfg.expert_size,
            "moe_intermediate_size": cfg.expert_size,
            "moe_router_enable_expert_bias": True,
            "moe_router_use_sigmoid": True,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "num_shared_experts": moe.num_shared_experts,
            "route_norm": True,
            "router_scaling_factor": moe.routed_scale,
        }
    return fields


def _moe(hf: dict[str, Any]) -> MoeConfig:
    return MoeConfig(
        num_experts=hf["num_experts"],
        top_k=hf["moe_topk"],
        intermediate_size=hf["moe_intermediate_size"],
        scoring="sigmoid",
        norm_topk_prob=True,
        routed_scale=float(hf["router_scaling_factor"]),
        selection_bias=True,
        num_shared_experts=hf["num_shared_experts"],
    )


def _num_dense_layers(hf: dict[str, Any]) -> int:
    """The layers at the bottom without experts, of mlp_layer_types, else first_k_dense_replace."""
    num_layers, stated = hf["num_hidden_layers"], hf.get("first_k_dense_replace", 1)
    if type(stated) is not int or not 0 <= stated <= num_layers:
        raise ConfigError(
            f"config.json: first_k_dense_replace = {stated!r} must be a number of layers, 0 to "
            f"{num_layers}."
        )
    kinds = hf.get("mlp_layer_types")
    if kinds is None:
        return stated
    num_dense = kinds.count("dense") if isinstance(kinds, list) else -1
    if kinds != ["dense"] * num_dense + ["sparse"] * (num_layers - num_dense):
        raise ConfigError(
            f"config.json: mlp_layer_types = {kinds!r} must name {num_layers} layers, the 'dense' "
            "ones first and the 'sparse' ones after them, as every release has them."
        )
    if hf.get("first_k_dense_replace", num_dense) != num_dense:
        raise _other("first_k_dense_replace", stated, num_dense, "as in mlp_layer_types")
    return num_dense


def _check_rope(scaling: dict[str, Any] | None) -> None:
    kind = (scaling or {}).get("type", "default")
    if kind != "default" or len(scaling or {}) > 1:
        raise ConfigError(
            f"config.json: rope_parameters = {scaling}; only rope_type 'default' is implemented "
            f"for {MODEL_TYPE!r}, which all releases have."
        )


def _other(name: str, found: Any, wanted: Any, why: str) -> ConfigError:
    return ConfigError(
        f"config.json: {name} = {found!r} is not implemented: it must be {wanted!r}, {why}. Set "
        "it to that if the model was trained so; otherwise it cannot be loaded."
    )
