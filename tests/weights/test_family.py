"""The family's config.json in all its spellings, and folders written here under transformers' own
classes.

The classes themselves are compared where torch and transformers are installed; recorded runs of
them are in test_golden_hf.py.
"""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax import from_pretrained, presets
from hunyuan_jax.config import ModelConfig, MoeConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.storage import Place
from hunyuan_jax.weights import hf_config, hf_spelling, stream, verify
from hunyuan_jax.weights.folder import OfficialFolder
from hunyuan_jax.weights.open import export_model
from support import goldens
from support.folders import flat, random_params

# The config.json of Hunyuan-A13B: every field of it that a model's code could read.
A13B = {
    "add_classification_head": False,
    "architectures": ["HunYuanMoEV1ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_head_dim": 128,
    "bos_token_id": 1,
    "cla_share_factor": 2,
    "eod_token_id": 127967,
    "eos_token_id": 127960,
    "group_limited_greedy": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "kv_lora_rank": None,
    "max_position_embeddings": 32768,
    "mlp_bias": False,
    "model_type": "hunyuan_v1_moe",
    "moe_drop_tokens": False,
    "moe_intermediate_size": [3072] * 32,
    "moe_layer_num_skipped": 0,
    "moe_random_routing_dropped_token": False,
    "moe_topk": [8] * 32,
    "n_group": None,
    "norm_topk_prob": True,
    "norm_type": "rms",
    "num_attention_heads": 32,
    "num_experts": 64,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_shared_expert": [1] * 32,
    "org_vocab_size": 128167,
    "pad_id": 127961,
    "pad_token_id": 127961,
    "position_embedding_xdrope": False,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "alpha": 1000.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "type": "dynamic",
    },
    "rope_theta": 10000.0,
    "routed_scaling_factor": 1.0,
    "sep_token_id": 127962,
    "tie_word_embeddings": True,
    "topk_group": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_cla": False,
    "use_mixed_mlp_moe": True,
    "use_mla": False,
    "use_qk_norm": True,
    "use_rotary_pos_emb": True,
    "vocab_size": 128167,
}


def small(**changes) -> ModelConfig:
    """A small A13B: wide heads, two of four experts."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
    }
    moe = MoeConfig(num_experts=4, top_k=2, norm_topk_prob=True, num_shared_experts=1)
    return dataclasses.replace(
        ModelConfig(vocab_size=40, max_position=64, moe=moe, **sizes), **changes
    )


DENSE = {
    "moe": MoeConfig(),
    "tie_embeddings": False,
    "attention_bias": True,
    "rope_type": "default",
}


# -----------------------------------------------------------------------------
# config.json


@pytest.mark.parametrize("model_type", ["hunyuan_v1_moe", "hunyuan"])
def test_a13b_loads_as_it_is(model_type):
    """On the hub it has transformers' model type, on GitHub that of Hunyuan-Large."""
    expected = dataclasses.replace(
        presets.a13b(), remat="none", attention_dropout=0.1, eos_token_ids=(127960,)
    )
    assert hf_config.from_hf(A13B | {"model_type": model_type}) == expected


@pytest.mark.parametrize("preset", ["a13b", "dense_0_5b", "dense_1_8b", "dense_4b", "dense_7b"])
def test_presets_have_transformers_model_types(preset):
    cfg = dataclasses.replace(getattr(presets, preset)(), remat="none")
    hf = json.loads(json.dumps(hf_config.to_hf(cfg)))
    assert hf["model_type"] == ("hunyuan_v1_moe" if preset == "a13b" else "hunyuan_v1_dense")
    assert hf_config.from_hf(hf) == cfg


@st.composite
def v1_configs(draw) -> ModelConfig:
    num_kv_heads, num_experts, rope_type = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 4)),
        draw(st.sampled_from(["default", "alpha"])),
    )
    top_k = draw(st.integers(1, num_experts))
    moe = (
        MoeConfig(num_experts=num_experts, top_k=top_k, norm_topk_prob=True, num_shared_experts=1)
        if num_experts > 1
        else MoeConfig()
    )
    return ModelConfig(
        vocab_size=draw(st.integers(3, 9)),
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(1, 7)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=num_kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([4, 6])),
        max_position=draw(st.integers(1, 99)),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        rope_type=rope_type,
        rope_theta=draw(st.sampled_from([1e4, 5e5])),
        rope_alpha=draw(st.sampled_from([1000.0, 1e5])) if rope_type == "alpha" else 1000.0,
        attention_bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        pad_token_id=draw(st.integers(-1, 2)),
        eos_token_ids=tuple(draw(st.lists(st.integers(0, 2), max_size=2))),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        moe=moe,
    )


def as_transformers_5_writes(hf: dict) -> dict:
    """The same config.json in the other spelling, with lists for the layers."""
    hf = dict(hf)
    scaling = dict(hf.pop("rope_scaling") or {"type": "default"})
    hf["rope_parameters"] = {
        "rope_type": scaling.pop("type"),
        "rope_theta": hf.pop("rope_theta"),
        **scaling,
    }
    hf["dtype"] = hf.pop("torch_dtype")
    for name in {"moe_topk", "num_shared_expert"} & hf.keys():
        hf[name] = [hf[name]] * hf["num_hidden_layers"]
    return hf


@given(v1_configs())
@settings(max_examples=50)
def test_config_survives_both_spellings(cfg):
    hf = json.loads(json.dumps(hf_config.to_hf(cfg)))
    assert hf["model_type"] == ("hunyuan_v1_moe" if cfg.is_moe else "hunyuan_v1_dense")
    assert hf_config.from_hf(hf) == hf_config.from_hf(as_transformers_5_writes(hf)) == cfg
    for spelling in (hf, as_transformers_5_writes(hf)):
        changed = hf_spelling.with_dtype(spelling, "bfloat16")
        assert (
            changed.keys() == spelling.keys()
            and hf_spelling.dtype_of(changed) == hf_config.from_hf(changed).dtype == "bfloat16"
        )


def test_head_dim_has_three_sources():
    hf = hf_config.to_hf(small())
    assert hf_config.from_hf(hf).head_dim == 8
    named = {name: value for name, value in hf.items() if name != "head_dim"}
    assert hf_config.from_hf(named | {"attention_head_dim": 8}).head_dim == 8
    assert hf_config.from_hf(named | {"attention_head_dim": None}).head_dim == 16 // 4


V1_ONLY = "has no effect in transformers' hunyuan_v1_moe"
REFUSED = [
    ({"use_cla": True}, f"use_cla = True {V1_ONLY}"),
    ({"use_qk_norm": False}, f"use_qk_norm = False {V1_ONLY}"),
    ({"num_shared_expert": 2}, f"num_shared_expert = 2 {V1_ONLY}"),
    ({"norm_topk_prob": False}, f"norm_topk_prob = False {V1_ONLY}"),
    ({"use_mixed_mlp_moe": False}, f"use_mixed_mlp_moe = False {V1_ONLY}"),
    ({"moe_drop_tokens": True}, f"moe_drop_tokens = True {V1_ONLY}"),
    ({"routed_scaling_factor": 2.5}, "routed_scaling_factor = 2.5 has no effect in this library"),
    ({"moe_layer_num_skipped": 1}, "moe_layer_num_skipped = 1 has no effect"),
    ({"mlp_bias": True}, "mlp_bias = True has no effect"),
    ({"moe_intermediate_size": 9}, "moe_intermediate_size = 9 differs from intermediate_size = 8"),
    (
        {"moe_intermediate_size": [8, 9]},
        "moe_intermediate_size = [8, 9]; only one value for all of the 2 layers",
    ),
    ({"moe_topk": [2]}, "moe_topk = [2]; only one value for all of the 2 layers"),
    ({"num_experts": 1, "moe_topk": 1}, "num_experts = 1; a hunyuan_v1_moe needs at least 2"),
    ({"num_experts": [4, 4]}, "num_experts = [4, 4] must be an integer"),
    ({"attention_head_dim": 4}, "head_dim = 8 and attention_head_dim = 4 differ"),
    ({"head_dim": "8"}, "head_dim = '8' must be a positive integer"),
    (
        {"hidden_size": 18, "head_dim": None},
        "hidden_size = 18 is not divisible by num_attention_heads = 4",
    ),
    ({"dtype": "bfloat16"}, "dtype = 'bfloat16' and torch_dtype = 'float32' are one field"),
    (
        {"rope_parameters": {"rope_type": "default"}},
        "rope_parameters and rope_scaling are one field",
    ),
    (
        {"rope_scaling": None, "rope_parameters": 5},
        "rope_parameters = 5 must be an object or null",
    ),
    (
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        "rope_theta is 10000.0, but 5.0",
    ),
    (
        {"rope_scaling": {"type": "dynamic", "rope_type": "default", "alpha": 1e3}},
        "type and rope_type are one field",
    ),
    ({"rope_scaling": {"alpha": 1e3}}, "lacks 'type'"),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "is unknown for 'hunyuan_v1_moe'; use type 'dynamic' with alpha, or null",
    ),
    (
        {"model_type": "hunyuan_v1_dense"},
        "num_experts = 4 has no effect in transformers' hunyuan_v1_dense",
    ),
    ({"model_type": "hunyuan"}, "head_dim = 8 has no effect in the code of model_type 'hunyuan'"),
    (
        {"model_type": "hunyuan", "head_dim": 4, "norm_topk_prob": False},
        "norm_topk_prob = False has no effect in the code of",
    ),
    (
        {"model_type": "hy_v4"},
        "model_type = 'hy_v4'; only 'hunyuan', 'hunyuan_v1_moe', 'hunyuan_v1_dense', 'hy_v3'",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED, ids=[" ".join(changes) for changes, _ in REFUSED]
)
def test_what_would_be_computed_wrongly_is_refused(changes, message):
    hf = hf_config.to_hf(small())
    hf_config.from_hf(hf)
    with pytest.raises(ConfigError) as error:
        hf_config.from_hf(hf | changes)
    assert message in str(error.value) and "\n" not in str(error.value)


SAME = [
    *({name: None} for name in ("rope_theta", "hidden_act", "num_shared_expert", "use_qk_norm",
                                "norm_type", "sliding_window", "alpha")),
    {"rope_scaling": {"type": "dynamic", "alpha": 1000.0}},
    {"rope_scaling": {"rope_type": "dynamic", "alpha": 1000.0, "beta_fast": 32, "mscale": 1.0}},
    {"rope_scaling": {}, "rope_parameters": {"type": "dynamic", "alpha": 1000.0}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0,
                         "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    {"torch_dtype": "torch.float32"},
    {"torch_dtype": "auto"},
    {"torch_dtype": None, "dtype": "float"},
    {"dtype": "float32"},
    {"norm_type": "hf_rms"},
    {"moe_topk": None, "num_experts_per_tok": 2, "num_experts": None, "num_local_experts": 4},
    {"layer_types": ["full_attention"] * 2, "sliding_window": 4096, "use_sliding_window": False,
     "max_window_layers": 2},
    {"partial_rotary_factor": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1},
    {"final_logit_softcapping": None, "attention_chunk_size": 0, "mlp_only_layers": []},
    {"use_mla": False, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64},
    {"vit_norm_type": "fused", "anyres_pooling_size": 2, "dense_list": [16, 0]},
    {"output_router_logits": True, "router_aux_loss_coef": 0.01, "use_flash_attn": True},
    {"my_note": "trained on Monday", "unsloth_version": "2026.1", "neftune_noise_alpha": 5},
    {"architectures": None, "id2label": {"0": "a"}, "top_k": 50, "output_scores": True},
]  # fmt: skip


@pytest.mark.parametrize("changes", SAME, ids=[" ".join(changes) for changes in SAME])
def test_other_words_for_the_same_model(changes):
    hf = hf_config.to_hf(small())
    if "rope_parameters" in changes:
        del hf["rope_scaling"]
    assert hf_config.from_hf(hf | changes) == hf_config.from_hf(hf_config.to_hf(small()))


MORE = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4096,
    "use_sliding_window": True,
    "partial_rotary_factor": 0.5,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12,
    "logits_scaling": 8.0,
    "attention_multiplier": 0.01,
    "query_pre_attn_scalar": 256,
    "clip_qkv": 8.0,
    "rotary_pct": 0.25,
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 8192,
    "mlp_only_layers": [0],
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "decoder_sparse_step": 2,
    "num_nextn_predict_layers": 1,
    "qkv_bias": True,
    "use_alibi": True,
    "norm_type": "torch_nn",
    "norm_of_the_future": "deep",
    "hidden_activation": "gelu",
    "scoring_func": "sigmoid",
    "moe_router_use_sigmoid": True,
    "use_parallel_residual": True,
}


@pytest.mark.parametrize("name", MORE)
def test_a_field_that_may_change_the_model_is_refused_by_its_name(name):
    for kind in ("hunyuan_v1_moe", "hunyuan"):
        hf = hf_config.to_hf(small(head_dim=4)) | {"model_type": kind, name: MORE[name]}
        with pytest.raises(ConfigError) as error:
            hf_config.from_hf(hf)
        message = str(error.value)
        assert message.startswith(f"config.json: {name} = {MORE[name]!r} ") and "\n" not in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "alpha": 1e3, "partial_rotary_factor": 0.5}},
         "rope_scaling.partial_rotary_factor = 0.5 is not implemented"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}},
         "rope_scaling.full_attention = {'rope_type': 'default'} is not implemented"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok = 3 and moe_topk = 2 are one field"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
    ids=["rope", "layers", "alias", "null"],
)  # fmt: skip
def test_spellings_that_say_something_else_are_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        hf_config.from_hf(hf_config.to_hf(small()) | changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            small(head_dim=4, moe=MoeConfig(num_experts=4, top_k=2)),
            "norm_topk_prob = False with top_k = 2",
        ),
        (small(head_dim=4, rope_type="default", use_qk_norm=False), "rope_type = 'default'"),
    ],
)
def test_what_no_model_type_computes_is_not_written(cfg, message):
    with pytest.raises(ConfigError, match=message):
        hf_config.to_hf(cfg)


def test_bad_generation_config_is_refused(tmp_path):
    Pretrained(small(), random_params(small())).save_pretrained(tmp_path)
    for text, message in (
        ('{"eos_token_id": "2"}', "eos_token_id = '2' must be"),
        ("[", "is not valid JSON"),
        ("3", "holds a JSON int; it must be an object of fields"),
    ):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            from_pretrained(tmp_path)


# -----------------------------------------------------------------------------
# convert_torch.py


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "case", ["moe_top1", "dense_bias_untied", "hub_moe_bf16", "moe_alpha_tied_lists"]
)
def test_folders_go_through_the_converter(case, tmp_path):
    source = goldens.folder_of(case)
    stream.import_model(source, tmp_path / "ours")
    assert verify.verify(source, tmp_path / "ours") == []
    model = from_pretrained(tmp_path / "ours")
    assert model.config == from_pretrained(source).config
    export_model(tmp_path / "ours", tmp_path / "exported")
    model.save_pretrained(tmp_path / "saved")
    wanted = {
        path.name: path.read_bytes()
        for path in source.iterdir()
        if not path.name.startswith("golden")
    }
    for written in ("exported", "saved"):
        assert {name: (tmp_path / written / name).read_bytes() for name in wanted} == wanted
    stream.import_model(source, tmp_path / "other", dtype="bfloat16")
    assert from_pretrained(tmp_path / "other").config.dtype == "bfloat16"


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("case", "field", "value"),
    [
        ("moe_top1", "norm_topk_prob", False),
        ("moe_top1", "rope_type", "plain"),
        ("dense_bias_untied", "rope_type", "plain"),
    ],
)
def test_the_converters_layers_tell_the_families_apart(case, field, value, tmp_path):
    """The plain forward pass knows by itself what transformers' classes fix."""
    source = goldens.folder_of(case)
    stream.import_model(source, tmp_path / "ours")
    opened = OfficialFolder(Place(source))
    converted = stream.open_converted(Place(tmp_path / "ours"))
    assert verify.compare_layers(opened, converted) == []
    cfg = converted.cfg
    part = (
        {"moe": dataclasses.replace(cfg.moe, **{field: value})}
        if field == "norm_topk_prob"
        else {field: value}
    )
    assert verify.compare_layers(opened, converted._replace(cfg=dataclasses.replace(cfg, **part)))


# -----------------------------------------------------------------------------
# transformers reads what we write


def transformers_logits(folder, ids_BS) -> np.ndarray:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model(torch.from_numpy(ids_BS)).logits.numpy()


@pytest.mark.parametrize(
    "cfg",
    [
        small(),
        small(
            rope_type="default",
            moe=MoeConfig(num_experts=4, norm_topk_prob=True, num_shared_experts=1),
        ),
        small(**DENSE),
    ],
    ids=["moe", "moe-top-1", "dense"],
)
@pytest.mark.filterwarnings("ignore")  # of transformers
def test_a_model_trained_here_has_the_same_logits_in_transformers(cfg, tmp_path):
    pytest.importorskip("transformers")
    model = Pretrained(cfg, random_params(cfg))
    model.save_pretrained(tmp_path)
    ids_BS = np.arange(24).reshape(2, 12)
    np.testing.assert_allclose(
        np.asarray(model.logits(ids_BS)), transformers_logits(tmp_path, ids_BS), atol=1e-4, rtol=0
    )


@pytest.mark.filterwarnings("ignore")
def test_a_golden_folder_in_transformers(tmp_path):
    """Loaded, changed in dtype, saved: transformers' logits of the export are ours; and what it
    saves itself, fused, is read.
    """
    transformers, case = pytest.importorskip("transformers"), goldens.load("moe_top1")
    from_pretrained(case.folder).save_pretrained(tmp_path / "saved")
    model = from_pretrained(tmp_path / "saved")
    ids_BS = case["input_ids"]
    np.testing.assert_allclose(
        np.asarray(model.logits(ids_BS)),
        transformers_logits(tmp_path / "saved", ids_BS),
        atol=1e-4,
        rtol=0,
    )

    theirs = transformers.AutoModelForCausalLM.from_pretrained(case.folder)
    for is_original in (True, False):
        theirs.save_pretrained(tmp_path / str(is_original), save_original_format=is_original)
        names = OfficialFolder(Place(tmp_path / str(is_original))).tensors
        assert any(name.endswith("gate_up_proj") for name in names) != is_original
        read = flat(from_pretrained(tmp_path / str(is_original)).params)
        assert all(np.array_equal(array, read[path]) for path, array in flat(model.params).items())
