"""The official forward pass, plainly, in numpy float32 and by official names (docs/model.md).

It shares no code with the model and does not use the table: `verify` compares the two.
Letters: T tokens of one sequence, D model, N query heads, K kv heads, H head dim, E experts.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

# Official tensor by name, as float32.
Read = Callable[[str], np.ndarray]


def embed(read: Read, ids_T: np.ndarray) -> np.ndarray:
    """[T, D]."""
    return read("model.embed_tokens.weight")[ids_T]


def layer(
    hf: dict[str, Any],
    read: Read,
    index: int,
    x_TD: np.ndarray,
    kv: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """(x after the layer, raw keys and values [T, K, H] for the layers that share them)."""
    prefix = f"model.layers.{index}."
    eps = hf.get("rms_norm_eps", 1e-5)
    y_TD = _rms_norm(x_TD, read(prefix + "input_layernorm.weight"), eps)
    out_TD, kv = _attention(hf, read, index, y_TD, kv, eps)
    x_TD = x_TD + out_TD
    y_TD = _rms_norm(x_TD, read(prefix + "post_attention_layernorm.weight"), eps)
    if _is_hy3(hf):
        mix = _dense if index < _num_dense_layers(hf) else _hy3_moe
    else:
        mix = _moe if hf.get("num_experts", 1) > 1 else _dense
    return x_TD + mix(hf, read, prefix + "mlp.", y_TD), kv


def logits(hf: dict[str, Any], read: Read, x_TD: np.ndarray) -> np.ndarray:
    """[T, V]."""
    x_TD = _rms_norm(x_TD, read("model.norm.weight"), hf.get("rms_norm_eps", 1e-5))
    return (
        x_TD
        @ read(
            "model.embed_tokens.weight" if hf.get("tie_word_embeddings") else "lm_head.weight"
        ).T
    )


def _attention(hf, read, index, y_TD, kv, eps):
    prefix = f"model.layers.{index}.self_attn."
    num_heads = hf["num_attention_heads"]
    num_kv_heads = hf.get("num_key_value_heads") or num_heads
    width, num_tokens = (
        hf.get("head_dim") or hf.get("attention_head_dim") or _head_dim(hf),
        len(y_TD),
    )

    def project(letter, x):
        out = x @ read(f"{prefix}{letter}_proj.weight").T
        return out + read(f"{prefix}{letter}_proj.bias") if hf.get("attention_bias") else out

    q_TNH = project("q", y_TD).reshape(num_tokens, num_heads, width)
    if not hf.get("use_cla") or index % hf["cla_share_factor"] == 0:
        kv = tuple(
            project(letter, y_TD).reshape(num_tokens, num_kv_heads, width) for letter in "kv"
        )
    k_TKH, v_TKH = kv
    if _is_hy3(hf):
        q_TNH = _rms_norm(q_TNH, read(prefix + "q_norm.weight"), eps)
        k_TKH = _rms_norm(k_TKH, read(prefix + "k_norm.weight"), eps)
    q_TNH, k_TKH = _rotate(hf, q_TNH), _rotate(hf, k_TKH)
    if (hf.get("use_qk_norm") or _is_v1(hf)) and not _is_hy3(hf):
        q_TNH = _rms_norm(q_TNH, read(prefix + "query_layernorm.weight"), eps)
        k_TKH = _rms_norm(k_TKH, read(prefix + "key_layernorm.weight"), eps)
    k_TNH, v_TNH = (np.repeat(a, num_heads // num_kv_heads, axis=1) for a in (k_TKH, v_TKH))
    scores_NTS = np.einsum("TNH,SNH->NTS", q_TNH, k_TNH) / np.float32(np.sqrt(width))
    scores_NTS = np.where(np.tri(num_tokens, dtype=bool), scores_NTS, -np.inf)
    out_TNH = np.einsum("NTS,SNH->TNH", _softmax(scores_NTS), v_TNH)
    return project("o", out_TNH.reshape(num_tokens, -1)), kv


def _rotate(hf, x_TNH):
    width, scaling = x_TNH.shape[-1], hf.get("rope_scaling")
    exponent, theta = (
        np.arange(0, width, 2, dtype=np.float32) / np.float32(width),
        hf.get("rope_theta", 11_158_840.0 if _is_hy3(hf) else 10_000.0),
    )
    positions = np.arange(len(x_TNH), dtype=np.float32)
    rope_type = scaling and scaling.get("type", scaling.get("rope_type"))
    if rope_type == "dynamic":
        inverse = 1.0 / np.float32(theta * scaling["alpha"] ** (width / (width - 2))) ** exponent
        angles = positions[:, None] * inverse
        cos, sin = np.cos(angles), np.sin(angles)
    elif _is_v1(hf):
        angles = positions[:, None] * (1.0 / np.float32(theta) ** exponent)
        cos, sin = np.cos(angles), np.sin(angles)
    else:
        inverse = _bfloat16(1.0 / np.float32(theta) ** exponent)
        if rope_type == "linear":
            angles = _bfloat16(
                _bfloat16(_bfloat16(positions) / np.float32(scaling["factor"]))[:, None] * inverse
            )
            cos, sin = _bfloat16(np.cos(angles)), _bfloat16(np.sin(angles))
        else:
            angles = positions[:, None] * inverse
            cos, sin = np.cos(angles), np.sin(angles)
    cos, sin = (np.concatenate([a, a], axis=-1)[:, None] for a in (cos, sin))
    half = width // 2
    return x_TNH * cos + np.concatenate([-x_TNH[..., half:], x_TNH[..., :half]], axis=-1) * sin


def _moe(hf, read, prefix, y_TD):
    top_k = hf.get("moe_topk", 1)
    probs_TE = _softmax(y_TD @ read(prefix + "gate.wg.weight").T)
    chosen_Tk = np.argsort(-probs_TE, axis=-1, kind="stable")[:, :top_k]
    weights_Tk = np.take_along_axis(probs_TE, chosen_Tk, axis=-1)
    if top_k > 1 or _is_v1(hf):
        weights_Tk = weights_Tk / np.maximum(
            weights_Tk.sum(-1, keepdims=True), np.finfo(np.float32).eps
        )
    out_TD = (
        _swiglu(read, prefix + "shared_mlp.", y_TD)
        if hf.get("use_mixed_mlp_moe") or _is_v1(hf)
        else np.zeros_like(y_TD)
    )
    return _experts(read, prefix, y_TD, chosen_Tk, weights_Tk, out_TD)


def _experts(read, prefix, y_TD, chosen_Tk, weights_Tk, out_TD):
    """out plus the weighted outputs of the chosen experts."""
    for expert in np.unique(chosen_Tk):
        tokens, choices = np.nonzero(chosen_Tk == expert)
        out_TD[tokens] += weights_Tk[tokens, choices, None] * _swiglu(
            read, f"{prefix}experts.{expert}.", y_TD[tokens]
        )
    return out_TD


def _hy3_moe(hf, read, prefix, y_TD):
    logits_TE = y_TD @ read(prefix + "router.gate.weight").T
    scores_TE = 1 / (1 + np.exp(-logits_TE))
    biased_TE = scores_TE + read(prefix + "expert_bias")
    chosen_Tk = np.argsort(-biased_TE, axis=-1, kind="stable")[:, : hf.get("moe_topk", 8)]
    weights_Tk = np.take_along_axis(scores_TE, chosen_Tk, axis=-1)
    weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdims=True) + np.float32(1e-20))
    weights_Tk = weights_Tk * np.float32(hf.get("router_scaling_factor", 2.826))
    shared_TD = _swiglu(read, prefix + "shared_mlp.", y_TD)
    return _experts(read, prefix, y_TD, chosen_Tk, weights_Tk, shared_TD)


def _num_dense_layers(hf):
    kinds = hf.get("mlp_layer_types")
    return hf.get("first_k_dense_replace", 1) if kinds is None else kinds.count("dense")


def _head_dim(hf):
    return 128 if _is_hy3(hf) else hf["hidden_size"] // hf["num_attention_heads"]


def _is_hy3(hf):
    return hf["model_type"] == "hy_v3"


def _is_v1(hf):
    """Whether it is transformers' class, in which some of Hunyuan-Large's options are fixed."""
    return hf["model_type"] != "hunyuan"


def _dense(hf, read, prefix, y_TD):
    return _swiglu(read, prefix, y_TD)


def _swiglu(read, prefix, y_TD):
    gate_TF = y_TD @ read(prefix + "gate_proj.weight").T
    hidden_TF = gate_TF / (1 + np.exp(-gate_TF)) * (y_TD @ read(prefix + "up_proj.weight").T)
    return hidden_TF @ read(prefix + "down_proj.weight").T


def _rms_norm(x, weight, eps):
    return weight * (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)))


def _softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _bfloat16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)
