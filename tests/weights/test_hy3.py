"""Folders of Hy3: what its config.json may say, the layouts that are read, what is written."""

import json
import math
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from hunyuan_jax import from_pretrained, presets
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.weights import hf_config, names, stream, verify
from hunyuan_jax.weights.open import export_model
from support import goldens
from support.folders import tensors_of

CASES = ("hy3_hub_bf16", "hy3_top2")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HUB = {
    "model_type": "hy_v3",
    "num_hidden_layers": 4,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "rope_parameters": {"rope_theta": 11158840.0, "rope_type": "default"},
}


def files_of(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if not path.name.startswith("golden")
    }


@pytest.mark.parametrize("preset", ["hy3", "hy_mt2_30b"])
def test_presets_are_in_the_format_of_the_releases(preset):
    cfg = getattr(presets, preset)()
    hf = hf_config.to_hf(cfg)
    again = hf_config.from_hf(hf)
    assert {**vars(again), "remat": "full"} == vars(cfg)
    assert hf["model_type"] == "hy_v3"
    assert hf["mlp_layer_types"] == ["dense"] + ["sparse"] * (cfg.num_layers - 1)


def test_the_released_file_has_47138_tensors():
    entries = names.entries(presets.hy3())
    assert len(entries) == len({entry.name for entry in entries}) == 47_138
    assert sum(math.prod(entry.shape) for entry in entries) == 298_786_155_776


def test_what_is_absent_is_as_in_transformers():
    cfg = hf_config.from_hf({"model_type": "hy_v3"})
    assert (cfg.hidden_size, cfg.num_layers, cfg.head_dim, cfg.num_dense_layers) == (
        *(4096, 80, 128),
        1,
    )
    assert (cfg.moe.num_experts, cfg.moe.top_k, cfg.expert_size) == (192, 8, 1536)
    assert (cfg.rope_theta, cfg.fp32_head, cfg.num_mtp_layers) == (11_158_840.0, True, 0)


REFUSED = [
    ({"first_k_dense_replace": 2, "mlp_layer_types": ["dense"] + 3 * ["sparse"]}, "must be 1"),
    ({"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]}, "the 'dense' ones first"),
    ({"mlp_layer_types": ["dense", "sparse"]}, "must name 4 layers"),
    ({"first_k_dense_replace": 5}, "must be a number of layers, 0 to 4"),
    ({"expert_hidden_dim": 24}, "expert_hidden_dim = 24 is not implemented: it must be 16"),
    ({"route_norm": False}, "route_norm = False"),
    ({"qk_norm": False}, "qk_norm = False"),
    ({"moe_router_use_sigmoid": False}, "moe_router_use_sigmoid = False"),
    ({"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias = False"),
    ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers = 2"),
    ({"num_shared_experts": 0}, "num_shared_experts = 0"),
    ({"num_shared_experts": None}, "num_shared_experts = None"),
    ({"mlp_bias": True}, "mlp_bias = True"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"routed_scaling_factor": 2.5}, "routed_scaling_factor = 2.5"),
    ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ({"n_group": 4}, "n_group = 4"),
    ({"num_experts": 1, "num_experts_per_tok": 1}, "num_experts = 1"),
    ({"router_scaling_factor": 0}, "router_scaling_factor = 0 must be positive"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "only rope_type 'default'"),
    ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "only rope_type 'default'"),
    ({"dtype": "float16"}, "torch_dtype = 'float16'"),
    ({"attention_scale": 2.0}, "attention_scale = 2.0 is not implemented"),
    ({"num_experts": "8"}, "num_experts = '8' must be an integer"),
]


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED, ids=[" ".join(changes) for changes, _ in REFUSED]
)
def test_what_would_be_computed_wrongly_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        hf_config.from_hf(HUB | changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_attention_fp32_softmax": False, "use_grouped_mm": True, "eod_token_id": 3},
        {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
        {"first_k_dense_replace": 1, "output_router_logits": True, "sep_token_id": 4},
        {"num_local_experts": 8, "expert_hidden_dim": 16, "norm_topk_prob": True},
    ],
)
def test_other_words_for_the_same_model(changes):
    assert hf_config.from_hf(HUB | changes) == hf_config.from_hf(HUB)


def test_kinds_of_layers():
    def counts(**changes):
        cfg = hf_config.from_hf(HUB | changes)
        return cfg.num_dense_layers, cfg.is_moe

    assert counts(first_k_dense_replace=2) == (2, True)
    assert counts(mlp_layer_types=4 * ["sparse"]) == (0, True)
    assert counts(mlp_layer_types=4 * ["dense"]) == (0, False)
    assert hf_config.from_hf(HUB | {"enable_lm_head_fp32": False}).fp32_head is False


@pytest.mark.parametrize("case", CASES)
def test_folders_are_written_as_they_were_read(case, tmp_path):
    source = goldens.folder_of(case)
    model = from_pretrained(source)
    model.save_pretrained(tmp_path / "saved")
    assert files_of(tmp_path / "saved") == files_of(source)


@pytest.mark.parametrize("case", CASES)
def test_folders_go_through_the_converter(case, tmp_path):
    source = goldens.folder_of(case)
    stream.import_model(source, tmp_path / "ours")
    assert verify.verify(source, tmp_path / "ours") == []
    export_model(tmp_path / "ours", tmp_path / "theirs")
    assert files_of(tmp_path / "theirs") == files_of(source)
    converted = from_pretrained(tmp_path / "ours")
    assert converted.config == from_pretrained(source).config
    assert converted.config.num_mtp_layers == (case == "hy3_hub_bf16")


@pytest.mark.cases(2)
@pytest.mark.parametrize("what", ["router.gate.weight", "expert_bias", "q_norm", "shared_mlp.up"])
def test_a_changed_tensor_is_found(what, tmp_path):
    source = shutil.copytree(goldens.folder_of("hy3_hub_bf16"), tmp_path / "source")
    stream.import_model(source, tmp_path / "ours")
    path = (
        "groups.layer_0."
        + {
            "router.gate.weight": "moe.router_DE",
            "expert_bias": "moe.bias_E",
            "q_norm": "attn.q_norm_H",
            "shared_mlp.up": "moe.shared.w_up_DF",
        }[what]
    )
    chunk = next(tmp_path.glob(f"ours/params/{path}/0.*"))
    data = bytearray(chunk.read_bytes())
    data[:] = data[::-1] if what != "q_norm" else bytes(len(data))
    chunk.write_bytes(bytes(data))
    lines = verify.verify(source, tmp_path / "ours")
    assert any(what.split(".")[0] in line for line in lines)
    assert any(line.startswith("layer 1") for line in lines)


def outer(tensors):
    """The same tensors as transformers has them in memory."""
    found = {}
    for name, array in tensors.items():
        if ".experts." not in name:
            for ours, theirs in (
                (".mlp.router.gate.", ".mlp.gate."),
                (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
                (".shared_mlp.", ".shared_experts."),
            ):
                name = name.replace(ours, theirs)
            found[name] = array
    prefixes = {name.split(".experts.")[0] for name in tensors if ".experts." in name}
    for prefix in sorted(prefixes):
        numbers = sorted(
            {int(n.split(".")[5]) for n in tensors if n.startswith(f"{prefix}.experts.")}
        )
        gate, up, down = (
            np.stack([tensors[f"{prefix}.experts.{e}.{kind}_proj.weight"] for e in numbers])
            for kind in ("gate", "up", "down")
        )
        found[f"{prefix}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        found[f"{prefix}.experts.down_proj"] = down
    return found


def save(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def source_of(case="hy3_hub_bf16"):
    source = goldens.folder_of(case)
    return json.loads((source / "config.json").read_text()), tensors_of(source)


def test_the_outer_layout_is_read(tmp_path):
    config, tensors = source_of()
    folder = save(tmp_path / "outer", config, outer(tensors))
    expected = from_pretrained(goldens.folder_of("hy3_hub_bf16"))
    model = from_pretrained(folder)
    assert model.config == expected.config.__class__(
        **{**vars(expected.config), "eos_token_ids": model.config.eos_token_ids}
    )
    jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)
    model.save_pretrained(tmp_path / "saved")  # under the names of the hub
    saved = tensors_of(tmp_path / "saved")
    assert saved.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(saved[name], array)


@pytest.mark.parametrize(
    ("router", "bias"),
    [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")],
)
def test_router_and_bias_have_either_dtype(router, bias, tmp_path):
    config, tensors = source_of()
    for name in tensors:
        if name.endswith("router.gate.weight"):
            tensors[name] = tensors[name].astype(BFLOAT16 if router == "bfloat16" else router)
        if name.endswith("expert_bias"):
            tensors[name] = tensors[name].astype(BFLOAT16 if bias == "bfloat16" else bias)
    folder = save(tmp_path / "mixed", config, tensors)
    model = from_pretrained(folder)
    layer = model.params["groups"]["layer_0"]["moe"]
    assert layer["router_DE"].dtype == layer["bias_E"].dtype == np.float32
    np.testing.assert_array_equal(
        layer["bias_E"][0], tensors["model.layers.1.mlp.expert_bias"].astype(np.float32)
    )
    stream.import_model(folder, tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "theirs")
    assert files_of(tmp_path / "theirs") == files_of(folder)


def test_fp8_is_multiplied_out(tmp_path):
    """Static, per tensor: a scalar bfloat16 scale for each weight, scales of inputs and caches."""
    config, tensors = source_of()
    quantised, expected = {}, {}
    for name, array in tensors.items():
        kept = array.ndim < 2 or any(
            part in name for part in ("router", "embed_tokens", "lm_head", "expert_bias")
        )
        quantised[name] = expected[name] = array
        if kept:
            continue
        scale = np.float32(np.abs(array.astype(np.float32)).max() / 448).astype(BFLOAT16)
        codes = (array.astype(np.float32) / scale.astype(np.float32)).clip(-448, 448)
        quantised[name] = codes.astype(ml_dtypes.float8_e4m3fn)
        stem = name.removesuffix(".weight")
        quantised[f"{stem}.weight_scale"] = np.array(scale)
        quantised[f"{stem}.input_scale"] = np.array(np.float32(0.5)).astype(BFLOAT16)
        values = quantised[name].astype(np.float32) * scale.astype(np.float32)
        expected[name] = values.astype(BFLOAT16)
    for layer in range(4):
        for kind in "kv":
            quantised[f"model.layers.{layer}.self_attn.{kind}_cache.scale"] = np.ones((), BFLOAT16)
    about = {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"}
    about["modules_to_not_convert"] = ["lm_head", "model.embed_tokens"]
    folder = save(tmp_path / "fp8", config | {"quantization_config": about}, quantised)
    model = from_pretrained(folder, dtype="bfloat16")
    ours = goldens.official_tensors(model.config, model.params)
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(
            ours[name].astype(np.float32), array.astype(np.float32), err_msg=name
        )
    stream.import_model(folder, tmp_path / "ours", "bfloat16")
    assert verify.verify(folder, tmp_path / "ours") == []


def test_a_folder_without_the_mtp_layer_is_complete(tmp_path):
    """transformers drops the layer and keeps num_nextn_predict_layers."""
    config, tensors = source_of()
    plain = {n: a for n, a in tensors.items() if not n.startswith("model.layers.4.")}
    folder = save(tmp_path / "plain", config, plain)
    model = from_pretrained(folder)
    assert model.config.num_mtp_layers == 0
    model.save_pretrained(tmp_path / "saved")
    assert files_of(tmp_path / "saved") == files_of(folder)
    stream.import_model(folder, tmp_path / "ours")
    assert verify.verify(folder, tmp_path / "ours") == []
    assert from_pretrained(tmp_path / "ours").config == model.config


def test_the_mtp_shard_is_found_without_an_index(tmp_path):
    source = shutil.copytree(goldens.folder_of("hy3_hub_bf16"), tmp_path / "source")
    (source / "model.safetensors.index.json").unlink()
    assert from_pretrained(source).config.num_mtp_layers == 1


def test_an_incomplete_mtp_layer_is_named(tmp_path):
    config, tensors = source_of()
    del tensors["model.layers.4.eh_proj.weight"]
    folder = save(tmp_path / "part", config, tensors)
    with pytest.raises(ConfigError, match=r"are missing: model\.layers\.4\.eh_proj\.weight"):
        from_pretrained(folder)


def test_a_killed_import_is_continued(tmp_path, monkeypatch):
    source = goldens.folder_of("hy3_hub_bf16")
    written = []
    write = stream.Place.write

    def dying(self, name, pieces):
        if name.startswith("params/") and len(written) > 20:
            raise KeyboardInterrupt
        written.append(name)
        return write(self, name, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(stream.Place, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            stream.import_model(source, tmp_path / "ours")
    total = len(names.entries(from_pretrained(source).config))
    assert 0 < stream.import_model(source, tmp_path / "ours") < total
    assert verify.verify(source, tmp_path / "ours") == []
