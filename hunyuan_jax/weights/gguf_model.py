"""GGUF's metadata and tensor names <-> ModelConfig and official names.

Three architectures of llama.cpp: "hunyuan-moe" and "hunyuan-dense", transformers' HunYuanMoEV1
and HunYuanDenseV1, and "llama", our dense model without a norm of queries and keys.  llama.cpp
rotates neighbouring rows of a "llama" head where we rotate row i with row i + H / 2, so that the
rows of its queries and keys are in another order; those of Hunyuan's are as ours.
"""

from typing import Any

import numpy as np

from hunyuan_jax.config import ModelConfig, MoeConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.gguf.container import Header
from hunyuan_jax.weights import hf_config, hf_fields, names

LLAMA, DENSE, MOE = "llama", "hunyuan-dense", "hunyuan-moe"
ARCHITECTURES = (LLAMA, DENSE, MOE)
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_OF_A_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.query_layernorm": "attn_q_norm",
    "self_attn.key_layernorm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate.wg": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_mlp.gate_proj": "ffn_gate_shexp",
    "mlp.shared_mlp.up_proj": "ffn_up_shexp",
    "mlp.shared_mlp.down_proj": "ffn_down_shexp",
}
# Fields of an architecture that change the model in llama.cpp, with the values that do not.
_FIXED = {
    "expert_gating_func": (0, 1),
    "expert_weights_norm": (True,),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.type": ("none",),
    "use_parallel_residual": (False,),
}
_READ = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_feed_forward_length",
    "expert_shared_count",
    "expert_shared_feed_forward_length",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
    "vocab_size",
}


def tensors_of(cfg: ModelConfig) -> dict[str, list[names.Entry]]:
    """The official tensors that each tensor of a GGUF file holds: one, or those of all experts."""
    found: dict[str, list[names.Entry]] = {}
    for entry in names.entries(cfg):
        found.setdefault(_tensor_name(entry.name), []).append(entry)
    return found


def _tensor_name(official: str) -> str:
    stem, _, end = official.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{end}"
    _, _, layer, *pieces = stem.split(".")
    if pieces[:2] == ["mlp", "experts"]:
        del pieces[2]
    return f"blk.{layer}.{_OF_A_LAYER['.'.join(pieces)]}.{end}"


def is_rotated(architecture: str, name: str) -> bool:
    """Whether the rows of a tensor of a GGUF file are in llama.cpp's other order."""
    return architecture == LLAMA and name.split(".")[-2] in ("attn_q", "attn_k")


def num_heads_of(cfg: ModelConfig, name: str) -> int:
    """Heads of the rows of queries or keys."""
    return cfg.num_heads if name.split(".")[-2] == "attn_q" else cfg.num_kv_heads


def halves(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows 0, 1, 2, ... of each head as 0, 2, 4, ..., 1, 3, 5, ...: from llama.cpp's order."""
    split = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
    return split.swapaxes(1, 2).reshape(tensor.shape)


def neighbours(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    """Inverse of `halves`."""
    split = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])
    return split.swapaxes(1, 2).reshape(tensor.shape)


def config_of(where: str, header: Header) -> ModelConfig:
    """The model of a GGUF file.

    Raises:
      ConfigError: another architecture, a missing field, a variant that is not implemented.
    """
    name = header.fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"{where}: general.architecture = {name!r}; only {', '.join(ARCHITECTURES)} can be "
            "loaded."
        )
    prefix = f"{name}."
    fields = {k.removeprefix(prefix): v for k, v in header.fields.items() if k.startswith(prefix)}

    def get(field: str, kind: type = int, default: Any = None) -> Any:
        value = fields.get(field, default)
        if type(value) is not kind or value <= 0:
            raise ConfigError(
                f"{where}: {prefix}{field} = {value!r} must be one positive number for all layers."
            )
        return value

    for field, values in _FIXED.items():
        if field in fields and fields[field] not in values:
            raise ConfigError(
                f"{where}: {prefix}{field} = {fields[field]!r} is not implemented; "
                f"{values[-1]!r} is."
            )
    hf_fields.refuse_unknown(fields, _READ | _FIXED.keys(), f"{where}: {prefix}")
    num_heads, hidden_size = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", default=hidden_size // num_heads)
    for field in ("attention.value_length", "rope.dimension_count"):
        if get(field, default=head_dim) != head_dim:
            raise ConfigError(
                f"{where}: {prefix}{field} = {fields[field]}; heads of {head_dim} have as many."
            )
    table = header.tensors.get("token_embd.weight")
    eps, ids = get("attention.layer_norm_rms_epsilon", float), _token_ids(header.fields)
    moe, width = MoeConfig(), get("feed_forward_length") if name != MOE else 0
    if name == MOE:
        moe, width = _moe(where, prefix, fields, get)
    elif fields.get("expert_count", 0):
        raise ConfigError(
            f"{where}: {prefix}expert_count = {fields['expert_count']}; of architecture {name} "
            "dense models are read."
        )
    return ModelConfig(
        vocab_size=table.shape[0] if table else get("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=width,
        num_layers=get("block_count"),
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", default=num_heads),
        head_dim=head_dim,
        max_position=get("context_length"),
        rms_norm_eps=_float(eps),
        # alpha is in the base already.
        rope_theta=_float(get("rope.freq_base", float, 10_000.0)),
        rope_type="alpha" if name == LLAMA else "default",
        rope_alpha=1.0,
        use_qk_norm=name != LLAMA,
        attention_bias="blk.0.attn_q.bias" in header.tensors,
        tie_embeddings="output.weight" not in header.tensors,
        dtype="bfloat16" if _is_bfloat16(header) else "float32",
        moe=moe,
        **ids,
    )


def _moe(where, prefix, fields, get):
    """(MoeConfig, width of an expert)."""
    width = get("expert_feed_forward_length", default=fields.get("feed_forward_length"))
    shared = get("expert_shared_feed_forward_length", default=width)
    if shared != width or fields.get("expert_shared_count", 1) != 1:
        raise ConfigError(
            f"{where}: {prefix}expert_shared_count = {fields.get('expert_shared_count')} of width "
            f"{shared}; one shared expert as wide as the others, {width}, is implemented."
        )
    num_experts, top_k = get("expert_count"), get("expert_used_count")
    return (
        MoeConfig(num_experts=num_experts, top_k=top_k, norm_topk_prob=True, num_shared_experts=1),
        width,
    )


def _token_ids(fields: dict[str, Any]) -> dict[str, Any]:
    found = {
        name: fields.get(f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "padding", "eot", "eos", "eom")
    }
    ends = (found["eot"], found["eos"], found["eom"])
    return {
        "bos_token_id": -1 if found["bos"] is None else found["bos"],
        "pad_token_id": -1 if found["padding"] is None else found["padding"],
        "eos_token_ids": tuple(dict.fromkeys(i for i in ends if i is not None)),
    }


def _float(value: float) -> float:
    """A float32 as its shortest decimal, which config.json is to say."""
    return float(str(np.float32(value)))


def _is_bfloat16(header: Header) -> bool:
    matrices = [t for t in header.tensors.values() if len(t.shape) > 1 and "_inp." not in t.name]
    return all(tensor.kind == "BF16" for tensor in matrices)


def architecture_of(cfg: ModelConfig) -> str:
    """The architecture of llama.cpp that computes a model.

    Raises:
      ConfigError: there is none.
    """
    kind = hf_config.to_hf(cfg)["model_type"]
    is_llama = kind == hf_config.LARGE and not cfg.is_moe and not cfg.use_qk_norm
    if kind in (hf_config.V1_MOE, hf_config.V1_DENSE) and not cfg.attention_bias:
        return MOE if cfg.is_moe else DENSE
    if is_llama and cfg.cla_share_factor == 1 and cfg.rope_type == "alpha":
        return LLAMA
    raise ConfigError(
        "llama.cpp computes no model of this kind "
        f"(model_type {kind!r}, cla_share_factor = {cfg.cla_share_factor}, use_qk_norm = "
        f"{cfg.use_qk_norm}, rope_type = {cfg.rope_type!r}, attention_bias = "
        f"{cfg.attention_bias}); it has HunYuanMoEV1, HunYuanDenseV1 and dense models like llama. "
        "Export a folder instead, without --gguf."
    )


def fields_of(cfg: ModelConfig, architecture: str) -> dict[str, Any]:
    """The metadata of a model, but for its tokenizer's lists; inverse of `config_of`."""
    dim = cfg.head_dim
    alpha = cfg.rope_alpha if cfg.rope_type == "alpha" else 1.0
    fields = {
        "context_length": cfg.max_position,
        "embedding_length": cfg.hidden_size,
        "block_count": cfg.num_layers,
        "feed_forward_length": cfg.intermediate_size,
        "attention.head_count": cfg.num_heads,
        "attention.head_count_kv": cfg.num_kv_heads,
        "attention.key_length": dim,
        "attention.value_length": dim,
        "attention.layer_norm_rms_epsilon": float(cfg.rms_norm_eps),
        "rope.dimension_count": dim,
        "rope.freq_base": cfg.rope_theta * alpha ** (dim / (dim - 2)),
        "vocab_size": cfg.vocab_size,
    }
    if cfg.is_moe:
        fields |= {
            "expert_count": cfg.moe.num_experts,
            "expert_used_count": cfg.moe.top_k,
            "expert_feed_forward_length": cfg.intermediate_size,
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": cfg.intermediate_size,
        }
    ids = {"bos": cfg.bos_token_id, "padding": cfg.pad_token_id}
    ids |= dict(zip(("eos", "eot", "eom"), cfg.eos_token_ids, strict=False))
    return {f"{architecture}.{name}": value for name, value in fields.items()} | {
        f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i >= 0
    }
