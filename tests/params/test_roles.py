"""The role of every parameter, and what follows from it."""

import dataclasses

import jax
import pytest

from hunyuan_jax import presets
from hunyuan_jax.config import LORA_TARGETS, LoraConfig, OptimizerConfig
from hunyuan_jax.layers import lora
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.optim.groups import assign_groups, default_groups
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.parallel.rules import RULES, stored_spec
from hunyuan_jax.params.roles import LOW_PRECISION_ROLES
from hunyuan_jax.params.tree import path_of
from hunyuan_jax.weights import names as table

PRESETS = (
    "a52b",
    "a52b_instruct",
    "a13b",
    "dense_0_5b",
    "dense_1_8b",
    "dense_4b",
    "dense_7b",
    "tiny",
    "bench",
)
OPTIMIZER = OptimizerConfig(expert_lr_ratio=0.25, weight_decay=0.1)
HEADS = ("embed", "heads", "head_dim")
# Of a model with every kind of parameter.  path -> (role, dims, optimizer group, its learning-rate
# ratio and decay, dtype in use in a bfloat16 model, dims with a scale each or None, LoRA target)
EXPECTED = {
    "embed/embedding_VD": (
        "embedding", ("vocab", "embed"), "embedding", 1.0, 0.0, "bfloat16", 0, None,
    ),
    "lm_head/w_VD": (
        "matrix", ("vocab", "embed"), "matrices", 1.0, 0.1, "bfloat16", 0, None,
    ),
    "final_norm/scale_D": (
        "norm", ("norm",), "norms_and_biases", 1.0, 0.0, "float32", None, None,
    ),
}  # fmt: skip
LAYER = {
    "attn_norm/scale_D": (
        "norm", ("layers", "norm"), "norms_and_biases", 1.0, 0.0, "float32", None, None,
    ),
    "mlp_norm/scale_D": (
        "norm", ("layers", "norm"), "norms_and_biases", 1.0, 0.0, "float32", None, None,
    ),
    "attn/q_norm_H": (
        "norm", ("layers", "norm"), "norms_and_biases", 1.0, 0.0, "float32", None, None,
    ),
    "attn/k_norm_H": (
        "norm", ("layers", "norm"), "norms_and_biases", 1.0, 0.0, "float32", None, None,
    ),
    "attn/bq_NH": (
        "bias", ("layers", "heads", "head_dim"), "norms_and_biases", 1.0, 0.0, "float32", None,
        None,
    ),
    "attn/bo_D": (
        "bias", ("layers", "norm"), "norms_and_biases", 1.0, 0.0, "float32", None, None,
    ),
    "attn/wq_DNH": (
        "matrix", ("layers", "embed", "heads", "head_dim"), "matrices", 1.0, 0.1, "bfloat16", 1,
        "q",
    ),
    "attn/wo_NHD": (
        "matrix", ("layers", "heads", "head_dim", "embed"), "matrices", 1.0, 0.1, "bfloat16", 1,
        "o",
    ),
    "moe/router_DE": (
        "router", ("layers", "embed", "router_experts"), "router", 1.0, 0.1, "float32", None,
        None,
    ),
    "moe/shared/w_gate_DF": (
        "matrix", ("layers", "embed", "ffn"), "matrices", 1.0, 0.1, "bfloat16", 1, "gate",
    ),
    "moe/shared/w_up_DF": (
        "matrix", ("layers", "embed", "ffn"), "matrices", 1.0, 0.1, "bfloat16", 1, "up",
    ),
    "moe/shared/w_down_FD": (
        "matrix", ("layers", "ffn", "embed"), "matrices", 1.0, 0.1, "bfloat16", 1, "down",
    ),
    "moe/experts/w_gate_EDF": (
        "expert", ("layers", "experts", "embed", "expert_ffn"), "experts", 0.25, 0.1, "bfloat16",
        2, "expert_gate",
    ),
    "moe/experts/w_up_EDF": (
        "expert", ("layers", "experts", "embed", "expert_ffn"), "experts", 0.25, 0.1, "bfloat16",
        2, "expert_up",
    ),
    "moe/experts/w_down_EFD": (
        "expert", ("layers", "experts", "expert_ffn", "embed"), "experts", 0.25, 0.1, "bfloat16",
        2, "expert_down",
    ),
}  # fmt: skip
PRODUCER = {
    "attn/bk_KH": (
        "bias", ("layers", "kv_heads", "head_dim"), "norms_and_biases", 1.0, 0.0, "float32", None,
        None,
    ),
    "attn/bv_KH": (
        "bias", ("layers", "kv_heads", "head_dim"), "norms_and_biases", 1.0, 0.0, "float32", None,
        None,
    ),
    "attn/wk_DKH": (
        "matrix", ("layers", "embed", "kv_heads", "head_dim"), "matrices", 1.0, 0.1, "bfloat16",
        1, "k",
    ),
    "attn/wv_DKH": (
        "matrix", ("layers", "embed", "kv_heads", "head_dim"), "matrices", 1.0, 0.1, "bfloat16",
        1, "v",
    ),
}  # fmt: skip


def specs_of(cfg):
    specs = abstract_model(cfg, single_device_mesh())[1]
    return {path_of(path): spec for path, spec in jax.tree.leaves_with_path(specs)}


def groups_of(cfg, specs):
    groups = default_groups(OPTIMIZER, is_moe=cfg.is_moe, is_lora=cfg.lora.rank > 0)
    by_name = {group.name: group for group in groups}
    return {path: by_name[name] for path, name in assign_groups(specs, groups).items()}


def test_every_parameter_of_a_small_model():
    cfg = dataclasses.replace(
        presets.tiny(), attention_bias=True, tie_embeddings=False, dtype="bfloat16"
    )
    expected = EXPECTED | {
        f"groups/layer_{i}/{path}": facts
        for i, layer in ((0, LAYER | PRODUCER), (1, LAYER))
        for path, facts in layer.items()
    }
    specs, targets = specs_of(cfg), {lora.names(target)[0]: target for target in LORA_TARGETS}
    groups = groups_of(cfg, specs)
    found = {
        path: (
            spec.role,
            spec.dims,
            groups[path].name,
            groups[path].lr_ratio,
            groups[path].weight_decay,
            spec.dtype_in_use(cfg.dtype),
            spec.num_scale_dims,
            targets.get(path.rsplit("/", 1)[1]),
        )
        for path, spec in specs.items()
    }
    assert found == expected
    for spec in specs.values():
        assert spec.sharding.spec == stored_spec(spec.dims)


def test_adapters_have_a_role_of_their_own():
    cfg = dataclasses.replace(presets.tiny(), lora=LoraConfig(rank=2, targets=("q", "expert_up")))
    specs = specs_of(cfg)
    adapters = {path: spec for path, spec in specs.items() if spec.role == "adapter"}
    assert {path: (spec.dims, spec.num_scale_dims) for path, spec in adapters.items()} == {
        f"groups/layer_{i}/{path}": facts
        for i in (0, 1)
        for path, facts in {
            "attn/wq_lora_a_Dr": (("layers", "embed", "rank"), 1),
            "attn/wq_lora_b_rNH": (("layers", "rank", "heads", "head_dim"), 1),
            "moe/experts/w_up_lora_a_EDr": (("layers", "experts", "embed", "rank"), 2),
            "moe/experts/w_up_lora_b_ErF": (("layers", "experts", "rank", "expert_ffn"), 2),
        }.items()
    }
    assert {(g.name, g.lr_ratio, g.weight_decay) for g in groups_of(cfg, adapters).values()} == {
        ("adapters", 1.0, 0.1)
    }


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets(name):
    cfg = getattr(presets, name)()
    specs = specs_of(cfg)
    mixture = {"expert", "router"} if cfg.is_moe else set()
    assert {spec.role for spec in specs.values()} == {"matrix", "embedding", "norm"} | mixture
    assert groups_of(cfg, specs).keys() == specs.keys()
    for path, spec in specs.items():
        assert set(spec.dims) <= RULES.keys() and len(spec.dims) == len(spec.shape), path
        # A whole matrix has two dims or more, however many of them are stacked.
        is_matrix = len(spec.shape) - spec.num_stacked >= 2
        assert is_matrix == (spec.role in (*LOW_PRECISION_ROLES, "router")), path
    # The table of official names says the same.
    assert {
        entry.path: (entry.role, (*entry.stacked, *entry.our_shape))
        for entry in table.entries(cfg)
    } == {path: (spec.role, spec.shape) for path, spec in specs.items()}
