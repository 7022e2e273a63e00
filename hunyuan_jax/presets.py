"""Architecture numbers of the released models and of the small ones used here; they live in this
file only.

docs/model.md has the sources of A52B, docs/family.md those of A13B, the dense models and Hy3.  A
model folder brings its own config.json: `from_pretrained` does not look here.
"""

import dataclasses
from typing import Any

from hunyuan_jax.config import ModelConfig, MoeConfig


def a52b() -> ModelConfig:
    """Hunyuan-Large as pre-trained: 256K context, alpha 1e5 (an effective RoPE base of 1.34e9)."""
    return ModelConfig(
        vocab_size=128_512,
        hidden_size=6400,
        intermediate_size=18_304,
        num_layers=64,
        num_heads=80,
        num_kv_heads=8,
        head_dim=80,
        max_position=262_144,
        rope_alpha=100_000.0,
        cla_share_factor=2,
        dtype="bfloat16",
        remat="full",
        pad_token_id=127_961,
        bos_token_id=127_958,
        eos_token_ids=(127_960, 127_967),
        moe=MoeConfig(
            num_experts=16, top_k=1, num_shared_experts=1, dispatch="recycle", capacity_factor=1.0
        ),
    )


def a52b_long() -> ModelConfig:
    """Hunyuan-Large in its long-context stages: the capacity counts per 4096 tokens, as in
    pre-training.
    """
    model = a52b()
    moe = dataclasses.replace(model.moe, group_size=4096, aux_loss_weight=0.01)
    return dataclasses.replace(model, moe=moe)


def a52b_instruct() -> ModelConfig:
    """Hunyuan-Large-Instruct: a larger padded vocabulary, 128K context, alpha 1e3."""
    return dataclasses.replace(
        a52b(), vocab_size=129_024, max_position=131_072, rope_alpha=1_000.0
    )


def a13b() -> ModelConfig:
    """Hunyuan-A13B: 64 experts, top-8, one shared, no cross-layer attention."""
    return ModelConfig(
        vocab_size=128_167,
        hidden_size=4096,
        intermediate_size=3072,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position=32_768,
        dtype="bfloat16",
        remat="full",
        pad_token_id=127_961,
        bos_token_id=1,
        eos_token_ids=(127_960, 127_967),
        moe=MoeConfig(
            num_experts=64, top_k=8, norm_topk_prob=True, num_shared_experts=1, dispatch="dropless"
        ),
    )


def hy3() -> ModelConfig:
    """Hy3: 192 experts of 1536, top-8 of sigmoids with a selection bias, one dense layer, and a
    layer of multi-token prediction.
    """
    return ModelConfig(
        vocab_size=120_832,
        hidden_size=4096,
        intermediate_size=13_312,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        max_position=262_144,
        bos_token_id=120_000,
        pad_token_id=120_002,
        eos_token_ids=(120_025,),
        **_HY3,
        moe=_hy3_moe(num_experts=192, intermediate_size=1536),
    )


def hy_mt2_30b() -> ModelConfig:
    """Hy-MT2-30B-A3B: Hy3's class at 48 layers of half its width."""
    return ModelConfig(
        vocab_size=120_832,
        hidden_size=2048,
        intermediate_size=6912,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        max_position=262_144,
        bos_token_id=120_000,
        pad_token_id=120_002,
        eos_token_ids=(120_025,),
        **_HY3 | {"num_mtp_layers": 0},
        moe=_hy3_moe(num_experts=128, intermediate_size=768),
    )


_HY3 = {
    "rope_type": "default",
    "rope_theta": 11_158_840.0,
    "norm_before_rope": True,
    "num_dense_layers": 1,
    "num_mtp_layers": 1,
    "tie_embeddings": False,
    "init_std": 0.006,
    "dtype": "bfloat16",
    "remat": "full",
}


def _hy3_moe(**sizes: int) -> MoeConfig:
    return MoeConfig(
        top_k=8,
        scoring="sigmoid",
        norm_topk_prob=True,
        routed_scale=2.826,
        selection_bias=True,
        num_shared_experts=1,
        dispatch="dropless",
        **sizes,
    )


def dense_0_5b() -> ModelConfig:
    """Hunyuan-0.5B: 16 heads of 128 entries are twice the width of the model."""
    return _dense(
        hidden_size=1024, intermediate_size=3584, num_layers=24, num_heads=16, num_kv_heads=8
    )


def dense_1_8b() -> ModelConfig:
    """Hunyuan-1.8B, and HY-MT-1.8B."""
    return _dense(
        hidden_size=2048, intermediate_size=6144, num_layers=32, num_heads=16, num_kv_heads=4
    )


def dense_4b() -> ModelConfig:
    """Hunyuan-4B."""
    return _dense(
        hidden_size=3072, intermediate_size=8192, num_layers=36, num_heads=32, num_kv_heads=8
    )


def dense_7b() -> ModelConfig:
    """Hunyuan-7B; its tokenizer is that of A13B, its three small siblings have another."""
    return _dense(
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        vocab_size=128_167,
        pad_token_id=127_961,
        bos_token_id=127_958,
        eos_token_ids=(127_960,),
    )


def _dense(**sizes: Any) -> ModelConfig:
    """A dense model with the numbers that all of them share; of the special ids of the small ones'
    tokenizer only eos has a source.
    """
    shared = {
        "vocab_size": 120_818,
        "head_dim": 128,
        "max_position": 262_144,
        "eos_token_ids": (120_020,),
        "dtype": "bfloat16",
    }
    return ModelConfig(**{**shared, "remat": "full", **sizes})


def tiny() -> ModelConfig:
    """The a52b shape at 4.7 M parameters: CLA pairs, GQA, one shared and eight recycled experts,
    bytes as tokens.
    """
    return ModelConfig(
        vocab_size=320,  # 256 bytes and three specials, padded
        hidden_size=160,
        intermediate_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position=2048,
        rope_alpha=1.0,
        cla_share_factor=2,
        remat="none",
        pad_token_id=258,
        bos_token_id=256,
        eos_token_ids=(257,),
        moe=MoeConfig(
            num_experts=8,
            top_k=1,
            num_shared_experts=1,
            dispatch="recycle",
            capacity_factor=1.0,
            aux_loss_weight=0.01,
        ),
    )


def bench() -> ModelConfig:
    """15.3 M parameters: the size at which training speed is compared with other libraries
    (docs/results/speed.md).
    """
    return ModelConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        max_position=2048,
        tie_embeddings=False,
        remat="none",
        moe=MoeConfig(
            num_experts=8, top_k=1, num_shared_experts=1, dispatch="recycle", capacity_factor=1.0
        ),
    )


def bench_hy3() -> ModelConfig:
    """21.1 M parameters of Hy3's kind, for the same comparison with its class."""
    return ModelConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        max_position=2048,
        **_HY3 | {"num_mtp_layers": 0, "dtype": "float32", "remat": "none"},
        moe=dataclasses.replace(_hy3_moe(num_experts=32, intermediate_size=256), top_k=4),
    )
