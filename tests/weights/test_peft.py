"""PEFT's adapters: what it writes is read as it means it, and every field that could mean
something else is refused by its name.
"""

import json

import numpy as np
import pytest
import safetensors.numpy

from hunyuan_jax import from_pretrained
from hunyuan_jax.config import LoraConfig, MoeConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.weights import names, peft
from support.folders import random_params, small

RANK, ALPHA = 2, 6.0
LAYERS = range(2)
# What PEFT 0.21.2 writes beside r, lora_alpha and target_modules.
SETTINGS = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": None, "base_model_name_or_path": "base", "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_bias": False, "lora_dropout": 0.05,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core",
    "modules_to_save": None, "monteclora_config": None, "peft_type": "LORA",
    "peft_version": "0.21.2", "qalora_group_size": 16, "rank_pattern": {}, "revision": None,
    "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None,
    "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    "velora_config": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A dense model of two layers."""
    cfg = small(moe=MoeConfig(), num_layers=2, cla_share_factor=1, num_kv_heads=4)
    folder = tmp_path_factory.mktemp("base")
    Pretrained(cfg, random_params(cfg)).save_pretrained(folder)
    return folder


def matrices(base):
    return {
        entry.name: (entry, entry.shape)
        for entry in names.entries(from_pretrained(base).config)
        if len(entry.shape) == 2
    }


def write(folder, base, modules, targeted, is_bin=False, **changes):
    """An adapter with tensors of `modules`, and what each adds to its matrix at scale 1."""
    rng, tensors, added = np.random.default_rng(0), {}, {}
    shapes = matrices(base)
    for module in modules:
        rows, columns = shapes[f"{module}.weight"][1]
        a, b = rng.normal(size=(RANK, columns)), rng.normal(size=(rows, RANK))
        prefix = f"base_model.model.{module}.lora_"
        tensors |= {f"{prefix}A.weight": a.astype(np.float32),
                    f"{prefix}B.weight": b.astype(np.float32)}  # fmt: skip
        added[f"{module}.weight"] = (b @ a).astype(np.float32)
    folder.mkdir(exist_ok=True)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targeted}
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings | changes))
    if is_bin:
        torch = pytest.importorskip("torch")
        as_torch = {name: torch.from_numpy(array) for name, array in tensors.items()}
        torch.save(as_torch, folder / "adapter_model.bin")
    else:
        safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder, added


def assert_merged(base, folder, added, scale=ALPHA / RANK):
    """Each matrix is that of the base and `scale` times what its adapter adds."""
    plain, merged = from_pretrained(base), from_pretrained(base, adapter=folder)
    for name, (entry, _) in matrices(base).items():
        expected = names.read_tensor(plain.params, entry) + scale * added.get(name, 0)
        np.testing.assert_allclose(
            names.read_tensor(merged.params, entry), expected, atol=2e-5, err_msg=name
        )


def attention(projections, layers=LAYERS):
    return [f"model.layers.{i}.self_attn.{p}_proj" for i in layers for p in projections]


TARGETS = {
    "suffixes": (["q_proj", "v_proj"], attention("qv")),
    "longer suffixes": (["self_attn.o_proj"], attention("o")),
    "full paths": (attention("qkvo"), attention("qkvo")),
    "full paths of one layer": (attention("q", [1]), attention("q", [1])),
    "paths and suffixes": (["k_proj", *attention("q", [0])], attention("k") + attention("q", [0])),
    "regex": (r".*\.self_attn\.(q|v)_proj", attention("qv")),
    "regex of a layer": (
        r"model\.layers\.1\.(self_attn\.o_proj|mlp\.up_proj)",
        [*attention("o", [1]), "model.layers.1.mlp.up_proj"],
    ),
    "all-linear": (
        "all-linear",
        attention("qkvo")
        + [f"model.layers.{i}.mlp.{p}_proj" for i in LAYERS for p in ("gate", "up", "down")],
    ),
}


@pytest.mark.parametrize("what", TARGETS)
def test_target_modules_are_read_as_peft_reads_them(base, tmp_path, what):
    targeted, modules = TARGETS[what]
    folder, added = write(tmp_path / "adapter", base, modules, targeted)
    assert_merged(base, folder, added)


@pytest.mark.parametrize(
    ("targeted", "message"),
    [
        (r".*\.q_pro", r"asks for \.\*\\\.q_pro; only q_proj, k_proj"),
        (r".*(q_proj|lm_head|embed_tokens)", "asks for model.embed_tokens; only q_proj"),
        ("(", "is not a regular expression"),
        (["q_proj", "k_proj", "rotary"], "asks for rotary; only"),
        (["proj"], "asks for proj; only"),
        ([], "must be a list of names or a regular expression"),
        (None, "must be a list of names or a regular expression"),
        ([["q_proj"]], "must be a list of names or a regular expression"),
        (["q_proj"], r"holds 'base_model.model.model.layers.0.self_attn.k_proj"),
        (["q_proj", "k_proj", "v_proj"], r"lacks 4 tensors .*v_proj.* save the adapter again"),
    ],
)
def test_target_modules_that_do_not_fit_are_named(base, tmp_path, targeted, message):
    folder, _ = write(tmp_path / "adapter", base, attention("qk"), targeted)
    with pytest.raises(ConfigError, match=message) as error:
        from_pretrained(base, adapter=folder)
    assert "\n" not in str(error.value)


MEANS_MORE = {
    "init_lora_weights": ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "mica",
                          "lora_ga", "of_the_future"),
    "alora_invocation_tokens": ([1, 2],),
    "alpha_pattern": ({"q_proj": 8},),
    "arrow_config": ({"top_k": 3},),
    "bias": ("all", "lora_only"),
    "exclude_modules": (["k_proj"],),
    "fan_in_fan_out": (True,),
    "kasa_config": ({"beta": 1e-4},),
    "layer_replication": ([[0, 2]],),
    "layers_pattern": (["layers"],),
    "layers_to_transform": ([0],),
    "lora_bias": (True,),
    "megatron_config": ({"a": 1},),
    "modules_to_save": (["lm_head"],),
    "monteclora_config": ({"a": 1},),
    "peft_type": ("IA3", None),
    "rank_pattern": ({"q_proj": 4},),
    "target_parameters": (["experts.gate_up_proj"],),
    "trainable_token_indices": ([3],),
    "use_bdlora": ({"nblocks": 2},),
    "use_dora": (True,),
    "use_qalora": (True,),
    "velora_config": ({"num_groups": 64},),
    "of_the_future": (True, "a", 3, {"a": 1}),
}  # fmt: skip


@pytest.mark.parametrize("field", MEANS_MORE)
def test_a_field_that_may_mean_more_is_refused_by_its_name(base, tmp_path, field):
    for value in MEANS_MORE[field]:
        changes = {field: value}
        folder, _ = write(tmp_path / "adapter", base, attention("q"), ["q_proj"], **changes)
        with pytest.raises(ConfigError, match=rf"{field} = .* with PEFT") as error:
            from_pretrained(base, adapter=folder)
        assert repr(value) in str(error.value)


HARMLESS = {
    "init_lora_weights": (False, "gaussian", "Gaussian", "eva", "orthogonal"),
    "eva_config": ({"rho": 2.0},),
    "runtime_config": ({"ephemeral_gpu_offload": False},),
    "auto_mapping": ({"base_model_class": "HunYuanDenseV1ForCausalLM"},),
    "lora_dropout": (0.3,),
    "revision": ("main",),
    "of_the_future": (None, False, {}, [], "", 0),
}


@pytest.mark.parametrize("field", HARMLESS)
def test_a_field_without_influence_is_no_hindrance(base, tmp_path, field):
    for value in HARMLESS[field]:
        changes = {field: value}
        folder, added = write(tmp_path / "adapter", base, attention("q"), ["q_proj"], **changes)
        assert_merged(base, folder, added)


def test_rank_stabilised_scaling(base, tmp_path):
    folder, added = write(tmp_path / "a", base, attention("q"), ["q_proj"], use_rslora=True)
    assert_merged(base, folder, added, ALPHA / RANK**0.5)


def test_an_adapter_of_pickled_tensors(base, tmp_path):
    folder, added = write(tmp_path / "a", base, attention("q"), ["q_proj"], is_bin=True)
    assert_merged(base, folder, added)


@pytest.mark.parametrize("name", ["r", "lora_alpha", "target_modules"])
def test_a_missing_field_is_named(base, tmp_path, name):
    folder, _ = write(tmp_path / "adapter", base, attention("q"), ["q_proj"])
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    del settings[name]
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=f"is not of a LoRA adapter: it has no {name}"):
        from_pretrained(base, adapter=folder)


def test_what_is_written_can_be_read_by_others(base, tmp_path):
    """Of the modes that the umask allows, like every file."""
    cfg = small(moe=MoeConfig(), num_layers=2, cla_share_factor=1, lora=LoraConfig(rank=2))
    peft.write_adapter(tmp_path / "adapter", cfg, random_params(cfg), "base")
    (tmp_path / "plain").write_text("")
    expected = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "adapter").iterdir()} == {expected}


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("what", TARGETS)
def test_logits_are_those_of_peft(base, tmp_path, what):
    torch, peft_lib = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    targeted, modules = TARGETS[what]
    folder, _ = write(tmp_path / "adapter", base, modules, targeted)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft_lib.PeftModel.from_pretrained(theirs, folder)
    ids_BS = np.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids_BS)).logits.numpy()
    logits = from_pretrained(base, adapter=folder).logits(ids_BS)
    np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-3)
