"""Fields of a config.json that are not read: which change nothing, and which are refused because
they would change the model.

The format grows with every release of transformers.  A field is refused unless it is known to be
harmless, says nothing (null, false, 0, empty, a factor of 1), or has a name that does not speak of
the model.  Also those that every class reads alike (`shared_by_all`).
"""

import re
from typing import Any

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.tokenizer.files import stop_ids

# What the names of fields are made of that say how a model computes.
_OF_A_MODEL = re.compile(
    "attn|attention|window|sliding|soft_?cap|clip|multiplier|scal(e|ing|ar)|norm|bias|rope|rotary|"
    "position|alibi|yarn|layer|expert|moe|rout(er|ed|ing)|gat(e|ing)(?!her)|topk|dense|sparse|"
    "mlp|ffn|activation|hidden|head|residual|parallel_|chunk|sink|embed|emb_|mup_|mtp|nextn|mla|"
    "lora|conv(?!ers)|ssm|mamba|recur|compress|indexer|hyper|qk_|kv_|shared|scoring|fp32"
)
_OF_A_FACTOR = re.compile("multiplier|scal(e|ing|ar)|factor")
# Names that speak of the model, of fields without influence here: how it is trained or run, parts
# that other fields turn on, the vision of other models of the family.
_HARMLESS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_experts_implementation",
    "_flash_attn_2_enabled",
    "add_cross_attention",
    "attn_implementation",
    "attention_probs_dropout_prob",
    "chunk_size_feed_forward",
    "compression_config",  # quantized.py
    "cross_attention_hidden_size",
    "dense_list",  # of a classification head
    "experts_implementation",
    "hidden_dropout",
    "hidden_dropout_prob",
    "kv_lora_rank",  # of use_mla, as four more
    "max_window_layers",  # of use_sliding_window
    "mlp_dropout",
    "moe_aux_loss_coef",
    "moe_drop_tokens",
    "moe_random_routing_dropped_token",
    "n_layers",
    "num_layers",
    "num_media_embeds",
    "original_max_position_embeddings",  # of RoPE types that are not read
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "quantization_config",  # quantized.py
    "router_aux_loss_coef",
    "router_jitter_noise",
    "topk_group",  # of group_limited_greedy
    "use_flash_attention",
    "use_flash_attention_2",
    "use_flash_attn",
    "v_head_dim",
    "xdrope_section",  # of position_embedding_xdrope
}
_HARMLESS_PREFIXES = ("vit_", "anyres_", "image_", "video_", "text_", "im_")
_HARMLESS_SUFFIXES = ("_token_id", "initializer_range", "_initializer_factor")
_FULL = ("", "none", "default", "full", "full_attention", "auto")


def refuse_unknown(fields: dict[str, Any], read: set[str], where: str = "config.json: ") -> None:
    """Raises ConfigError at a field that would, or may, change the model.

    Args:
      fields: of config.json, in one spelling, without nulls.
      read: names of those that are implemented or checked elsewhere.
      where: begins the message.
    """
    for name, value in fields.items():
        if name in read | _HARMLESS or _says_nothing(name, value, fields):
            continue
        if name.startswith(_HARMLESS_PREFIXES) or name.endswith(_HARMLESS_SUFFIXES):
            continue
        if _OF_A_MODEL.search(name.lower()):
            raise ConfigError(
                f"{where}{name} = {value!r} is not implemented and may change what the model "
                f"computes. Remove {name} if the model was trained without it."
            )


def _says_nothing(name: str, value: Any, fields: dict[str, Any]) -> bool:
    if name == "sliding_window":  # as in configs with the fields of Qwen2
        return fields.get("use_sliding_window") is False
    if name == "layer_types":
        return isinstance(value, list) and set(map(str, value)) <= {"full_attention"}
    if isinstance(value, str):
        return value.lower() in _FULL
    if _OF_A_FACTOR.search(name) and not isinstance(value, bool) and value == 1:
        return True
    return not value


def shared_by_all(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` that every class of transformers names alike."""
    return {
        "max_position": hf["max_position_embeddings"],
        "rms_norm_eps": float(hf["rms_norm_eps"]),
        "attention_bias": hf["attention_bias"],
        "tie_embeddings": hf["tie_word_embeddings"],
        "attention_dropout": float(hf["attention_dropout"]),
        "init_std": float(hf["initializer_range"]),
        "pad_token_id": -1 if hf["pad_token_id"] is None else hf["pad_token_id"],
        "bos_token_id": -1 if hf["bos_token_id"] is None else hf["bos_token_id"],
        "eos_token_ids": stop_ids("config.json", hf["eos_token_id"]),
        "dtype": hf["torch_dtype"],
    }
