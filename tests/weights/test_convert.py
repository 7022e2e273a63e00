"""Official model folders: every tensor has one place, folders come out as they went in, and what
does not fit is refused by name.
"""

import dataclasses
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax import from_pretrained
from hunyuan_jax.config import ModelConfig, MoeConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.train.state import abstract_model
from hunyuan_jax.weights import hf_config, stream, verify, write
from hunyuan_jax.weights import names as table
from hunyuan_jax.weights.open import export_model
from support import goldens
from support.folders import flat, random_params, small, tensors_of

LOADABLE_CASES = [case for case in goldens.ALL_CASES if case != "rope_ntk_factor"]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def assert_identical(ours, expected):
    ours, expected = flat(ours), flat(expected)
    assert ours.keys() == expected.keys()
    for path, array in expected.items():
        assert (
            ours[path].dtype == array.dtype
            and np.asarray(ours[path]).tobytes() == np.asarray(array).tobytes()
        ), path


def weight_files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name == "config.json" or "safetensors" in path.name
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved small model, tied, to be tampered with."""
    cfg = small()
    Pretrained(cfg, random_params(cfg)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the dict of official tensors of a single-file folder."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -----------------------------------------------------------------------------
# the table


def official_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official checkpoint, as docs/model.md lists them; Linear weights are
    [out, in].
    """
    D, F, V = cfg.hidden_size, cfg.intermediate_size, cfg.vocab_size
    q_width, kv_width = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not cfg.tie_embeddings:
        shapes["lm_head.weight"] = (V, D)

    def add_mlp(prefix, width):
        shapes.update(
            {f"{prefix}.gate_proj.weight": (width, D), f"{prefix}.up_proj.weight": (width, D)}
        )
        shapes[f"{prefix}.down_proj.weight"] = (D, width)

    for layer in range(cfg.num_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = shapes[
            f"{prefix}.post_attention_layernorm.weight"
        ] = (D,)
        linears = {"q_proj": (q_width, D), "o_proj": (D, q_width)}
        if layer % cfg.cla_share_factor == 0:
            linears |= {"k_proj": (kv_width, D), "v_proj": (kv_width, D)}
        for name, shape in linears.items():
            shapes[f"{prefix}.self_attn.{name}.weight"] = shape
            if cfg.attention_bias:
                shapes[f"{prefix}.self_attn.{name}.bias"] = shape[:1]
        if cfg.use_qk_norm:
            for name in ("query_layernorm", "key_layernorm"):
                shapes[f"{prefix}.self_attn.{name}.weight"] = (cfg.head_dim,)
        if not cfg.is_moe:
            add_mlp(f"{prefix}.mlp", F)
            continue
        shapes[f"{prefix}.mlp.gate.wg.weight"] = (cfg.moe.num_experts, D)
        for expert in range(cfg.moe.num_experts):
            add_mlp(f"{prefix}.mlp.experts.{expert}", F)
        if cfg.moe.num_shared_experts:
            add_mlp(f"{prefix}.mlp.shared_mlp", F * cfg.moe.num_shared_experts)
    return shapes


@st.composite
def model_configs(draw) -> ModelConfig:
    share_factor, num_kv_heads, head_dim = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([2, 4, 6])),
    )
    num_heads = num_kv_heads * draw(st.integers(1, 3))
    num_experts = draw(st.integers(1, 4))
    top_k = draw(st.integers(1, num_experts))
    rope_type = draw(st.sampled_from(["plain", "linear"] + ["alpha"] * (head_dim > 2)))
    return ModelConfig(
        vocab_size=draw(st.integers(3, 9)),
        hidden_size=num_heads * head_dim,
        intermediate_size=draw(st.integers(1, 7)),
        num_layers=share_factor * draw(st.integers(1, 3)),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=draw(st.integers(1, 99)),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        rope_type=rope_type,
        rope_theta=draw(st.sampled_from([1e4, 5e5])),
        rope_alpha=draw(st.sampled_from([1000.0, 1e5])) if rope_type == "alpha" else 1000.0,
        rope_factor=draw(st.sampled_from([1.0, 2.5])) if rope_type == "linear" else 1.0,
        cla_share_factor=share_factor,
        use_qk_norm=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        attention_dropout=draw(st.sampled_from([0.0, 0.1])),
        init_std=draw(st.sampled_from([0.02, 0.006])),
        pad_token_id=draw(st.integers(-1, 2)),
        bos_token_id=draw(st.integers(-1, 2)),
        eos_token_ids=tuple(draw(st.lists(st.integers(0, 2), max_size=2))),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        moe=MoeConfig(
            num_experts=num_experts,
            top_k=top_k,
            norm_topk_prob=top_k > 1,
            num_shared_experts=draw(st.integers(0, 2)) if num_experts > 1 else 0,
        ),
    )


@given(model_configs())
@settings(max_examples=20)
def test_table_names_every_official_tensor_once(cfg):
    all_entries = table.entries(cfg)
    assert len({e.name for e in all_entries}) == len(all_entries)
    assert {e.name: e.shape for e in all_entries} == official_shapes(cfg)


@given(model_configs())
@settings(max_examples=10)
def test_table_fills_every_parameter_once(cfg):
    shapes = flat(abstract_model(cfg, single_device_mesh())[1])
    indices = {}
    for e in table.entries(cfg):
        indices.setdefault(e.path, []).append((e.index, e.shape))
    assert indices.keys() == shapes.keys()
    for path, pieces in indices.items():
        stacked = shapes[path].shape[: len(pieces[0][0])]
        assert sorted(index for index, _ in pieces) == list(np.ndindex(stacked)), path
        assert all(
            math.prod(shape) == math.prod(shapes[path].shape[len(stacked) :])
            for _, shape in pieces
        ), path


@given(model_configs())
@settings(max_examples=10)
def test_layouts_are_inverse(cfg):
    shapes = flat(abstract_model(cfg, single_device_mesh())[1])
    for e in table.entries(cfg):
        official = np.arange(math.prod(e.shape), dtype=np.float32).reshape(e.shape)
        ours = table.to_ours(official, e, shapes[e.path].shape[len(e.index) :])
        back = table.to_official(ours, e)
        assert back.shape == e.shape and back.flags.c_contiguous
        np.testing.assert_array_equal(back, official)
        if e.is_transposed:  # a torch Linear computes x @ weight.T
            x = np.linspace(-1, 1, e.shape[1], dtype=np.float32)
            np.testing.assert_array_equal(x @ ours.reshape(e.shape[::-1]), x @ official.T)


@given(model_configs())
@settings(max_examples=30)
def test_config_survives_the_official_form(cfg):
    if cfg.moe.num_experts == 1:
        cfg = dataclasses.replace(cfg, moe=MoeConfig())
    as_json = json.loads(json.dumps(hf_config.to_hf(cfg)))
    assert hf_config.from_hf(as_json) == cfg


# -----------------------------------------------------------------------------
# reading and writing


@pytest.mark.parametrize("case", LOADABLE_CASES)
def test_golden_folders_are_written_as_they_were_read(case, tmp_path):
    source = goldens.folder_of(case)
    from_pretrained(source).save_pretrained(tmp_path / "saved")
    expected = {
        name: content
        for name, content in weight_files(source).items()
        if not name.startswith("golden")
    }
    assert len(expected) >= 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == expected


def test_config_text_is_kept_to_the_byte(folder, tmp_path):
    text = (
        (folder / "config.json")
        .read_bytes()
        .replace(b"\n", b"\r\n")
        .replace(b'"model_type"', b'"my_own_key": "\xc3\xa9", "model_type"')
    )
    (folder / "config.json").write_bytes(text)
    from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/config.json").read_bytes() == text


@pytest.mark.parametrize(("case", "dtype"), [("a52b_tiny", "bfloat16"), ("bf16", "float32")])
def test_dtype_conversion(case, dtype, tmp_path):
    source = goldens.folder_of(case)
    model = from_pretrained(source, dtype=dtype)
    assert model.config.dtype == dtype
    wanted = {"bfloat16": BFLOAT16, "float32": np.dtype(np.float32)}[dtype]
    for path, array in flat(model.params).items():
        assert array.dtype == (np.float32 if path.endswith("router_DE") else wanted), path

    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    ) | {"torch_dtype": dtype}
    original, saved = (tensors_of(folder) for folder in (source, tmp_path / "saved"))
    assert original.keys() == saved.keys()
    for name, array in saved.items():
        expected = original[name].astype(np.float32 if name.endswith("gate.wg.weight") else wanted)
        assert array.dtype == expected.dtype and array.tobytes() == expected.tobytes(), name
    assert_identical(from_pretrained(tmp_path / "saved").params, model.params)


def test_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="dtype = 'float16'; use 'float32', 'bfloat16' or None"):
        from_pretrained("unread", dtype="float16")


@pytest.mark.parametrize(
    "cfg",
    [
        small(),
        small(
            dtype="bfloat16",
            tie_embeddings=False,
            attention_bias=True,
            use_qk_norm=False,
            rope_type="plain",
            eos_token_ids=(3, 4),
        ),
        small(moe=MoeConfig(), cla_share_factor=1, rope_type="linear", rope_factor=2.0),
        small(
            moe=MoeConfig(
                num_experts=3,
                top_k=2,
                norm_topk_prob=True,
                num_shared_experts=2,
                dispatch="recycle",
                group_size=64,
            ),
            remat="full",
        ),
    ],
    ids=["tied", "untied-bias-bfloat16", "dense", "recycle"],
)
@pytest.mark.parametrize("max_shard_bytes", [write._MAX_SHARD_BYTES, 6000])
def test_a_model_trained_here_is_saved_and_read_back(cfg, max_shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_MAX_SHARD_BYTES", max_shard_bytes)
    dtype = BFLOAT16 if cfg.dtype == "bfloat16" else np.float32
    params = jax.tree.map_with_path(
        lambda path, a: a.astype(np.float32 if "router_DE" in str(path) else dtype),
        random_params(cfg),
    )
    model = Pretrained(cfg, params)
    model.save_pretrained(tmp_path)
    read = from_pretrained(tmp_path)
    assert read.config == model.config
    assert_identical(read.params, params)

    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if max_shard_bytes > 6000:
        assert shards == ["model.safetensors"] and not list(tmp_path.glob("*.index.json"))
        return
    assert (
        len(shards) > 2
        and shards[-1] == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    contents = {shard: safetensors.numpy.load_file(tmp_path / shard) for shard in shards}
    assert index["weight_map"] == {
        name: shard for shard, tensors in contents.items() for name in tensors
    }
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for tensors in contents.values() for t in tensors.values()
    )
    assert all(
        sum(t.nbytes for t in tensors.values()) <= max_shard_bytes or len(tensors) == 1
        for tensors in contents.values()
    )


def test_saving_over_a_sharded_model_leaves_nothing_of_it(tmp_path, monkeypatch):
    cfg = small()
    first, second = Pretrained(cfg, random_params(cfg, 1)), Pretrained(cfg, random_params(cfg, 2))
    with monkeypatch.context() as patch:
        patch.setattr(write, "_MAX_SHARD_BYTES", 6000)
        first.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    second.save_pretrained(tmp_path)
    assert_identical(from_pretrained(tmp_path).params, second.params)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_heads_that_do_not_fill_the_hidden_size_have_no_official_form(tmp_path):
    cfg = small(head_dim=8)
    with pytest.raises(
        ConfigError, match=r"head_dim = 8 x num_heads = 4 differs from hidden_size = 16"
    ):
        Pretrained(cfg, random_params(cfg)).save_pretrained(tmp_path)


# -----------------------------------------------------------------------------
# refusals, by name


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.3.mlp.experts.2.up_proj.weight"))
    with pytest.raises(
        ConfigError,
        match=r"are missing: model\.layers\.3\.mlp\.experts\.2\.up_proj\.weight\.",
    ):
        from_pretrained(folder)


def test_an_unexpected_tensor_is_named(folder):
    # A cross layer has no key projection of its own.
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {"model.layers.1.self_attn.k_proj.weight": np.zeros((8, 16), np.float32)}
        ),
    )
    with pytest.raises(
        ConfigError,
        match=r"such a model does not have: model\.layers\.1\.self_attn\.k_proj\.weight",
    ):
        from_pretrained(folder)


def test_a_misshapen_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(17, np.float32)}))
    with pytest.raises(
        ConfigError,
        match=r"tensors of another shape: model\.norm\.weight \(17,\), not \(16,\)",
    ):
        from_pretrained(folder)


def test_rope_buffers_of_old_saves_are_skipped(folder):
    params = from_pretrained(folder).params
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
        ),
    )
    assert_identical(from_pretrained(folder).params, params)


def test_a_copy_of_the_tied_head_is_accepted_and_written_again(folder, tmp_path):
    params = from_pretrained(folder).params
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
        ),
    )
    model = from_pretrained(folder)
    assert_identical(model.params, params)
    model.save_pretrained(tmp_path / "saved")
    assert weight_files(tmp_path / "saved") == weight_files(folder)


def test_a_head_that_contradicts_the_tie_is_refused(folder):
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"] + np.float32(1e-3)}
        ),
    )
    with pytest.raises(
        ConfigError,
        match=r"lm_head\.weight differs from model\.embed_tokens\.weight although "
        r".*tie_word_embeddings",
    ):
        from_pretrained(folder)


def test_a_folder_without_config_or_weights_is_refused(folder, tmp_path):
    with pytest.raises(
        ConfigError, match=r"nowhere is not a model folder: it has no config\.json"
    ):
        from_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        from_pretrained(folder)


def test_a_shard_that_was_not_copied_is_named(tmp_path):
    shutil.copytree(
        goldens.folder_of("a52b_tiny"), tmp_path, dirs_exist_ok=True, copy_function=shutil.copyfile
    )
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"names 2 shards, but model-00002-of-00002\.safetensors is not there"
    ):
        from_pretrained(tmp_path)


def test_a_file_that_is_not_safetensors_is_named(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a safetensors file"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("[]", "holds a JSON list"), ("\udcff", "is not valid JSON")],
    ids=["open", "list", "bytes"],
)
def test_config_that_is_no_object_is_refused(folder, text, message):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize("name", hf_config._REQUIRED)
def test_a_missing_size_is_named(name):
    hf = hf_config.to_hf(small())
    del hf[name]
    with pytest.raises(ConfigError, match=rf"config\.json: {name} is missing"):
        hf_config.from_hf(hf)


BAD_VALUES = [
    ("model_type", "llama", "only 'hunyuan'"),
    ("vocab_size", 0, "vocab_size"),
    ("vocab_size", "256", "vocab_size = '256' must be an integer"),
    ("hidden_size", 16.0, "hidden_size = 16.0 must be an integer"),
    ("hidden_size", 18, "hidden_size = 18 is not divisible by num_attention_heads = 4"),
    ("intermediate_size", [8, 8], "intermediate_size"),
    ("num_hidden_layers", -2, "num_layers = -2 must be at least 1"),
    ("num_hidden_layers", 3, "num_layers = 3 is not divisible by cla_share_factor = 2"),
    ("num_attention_heads", 0, "num_attention_heads = 0"),
    ("num_attention_heads", -4, "num_attention_heads = -4"),
    ("num_key_value_heads", 3, "num_kv_heads = 3"),
    ("num_key_value_heads", 0, "num_kv_heads = 0"),
    ("num_key_value_heads", True, "num_key_value_heads = True must be an integer or null"),
    ("hidden_act", "gelu", "only 'silu'"),
    ("torch_dtype", "float16", "only float32 and bfloat16"),
    ("torch_dtype", 16, "torch_dtype = 16 must be a string"),
    ("max_position_embeddings", "64", "max_position_embeddings = '64'"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps = nan must be an integer or a finite number"),
    ("rms_norm_eps", 0, "rms_norm_eps = 0 must be positive"),
    ("rope_theta", -1e4, "rope_theta"),
    ("rope_scaling", "dynamic", "rope_scaling = 'dynamic' must be an object or null"),
    ("rope_scaling", {"factor": 1.0, "alpha": 1000.0}, "lacks 'type'"),
    ("rope_scaling", {"type": "yarn", "factor": 1.0, "alpha": 1.0}, "unknown"),
    (
        "rope_scaling",
        {"type": "dynamic", "factor": 1.0, "alpha": "1000"},
        "alpha = '1000' must be a finite number",
    ),
    (
        "rope_scaling",
        {"type": "dynamic", "factor": 1.0, "alpha": -1.0},
        "rope_alpha = -1.0 must be positive",
    ),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0, "alpha": None}, "dynamic without alpha"),
    ("rope_scaling", {"type": "linear", "factor": None, "alpha": None}, "'linear' with factor"),
    (
        "rope_scaling",
        {"type": "linear", "factor": 0.0, "alpha": None},
        "rope_factor = 0.0 must be positive",
    ),
    ("use_cla", "yes", "use_cla = 'yes' must be true or false"),
    ("cla_share_factor", 0, "cla_share_factor = 0"),
    ("tie_word_embeddings", 1, "tie_word_embeddings = 1 must be true or false"),
    ("attention_dropout", 1.0, "attention_dropout = 1.0"),
    ("pad_token_id", 40, "pad_token_id = 40 is outside the vocabulary of 40"),
    ("eos_token_id", [1, "2"], "eos_token_id"),
    ("num_experts", 0, "num_experts = 0"),
    ("moe_topk", 4, "top_k = 4 must be between 1 and num_experts = 3"),
    (
        "moe_topk",
        [1, 2, 1, 2],
        "moe_topk = [1, 2, 1, 2]; only one value for all of the 4 layers is implemented",
    ),
    ("num_shared_expert", -1, "num_shared_experts = -1"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_bad_config_values_are_refused_in_one_line(name, value, message):
    with pytest.raises(ConfigError) as error:
        hf_config.from_hf(hf_config.to_hf(small()) | {name: value})
    assert message in str(error.value) and "\n" not in str(error.value)


# -----------------------------------------------------------------------------
# .bin shards


def test_bin_without_torch_says_what_to_install(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch then raises ModuleNotFoundError
    with pytest.raises(
        ConfigError,
        match=r"pytorch_model\.bin is a PyTorch pickle; reading it needs torch: pip install "
        r"-e '\.\[torch\]'",
    ):
        from_pretrained(folder)


def as_bin(folder: Path, target: Path, num_shards: int, *, with_tied_head: bool) -> None:
    """Writes the folder's model as the official trainer does (save_safetensors False)."""
    torch = pytest.importorskip("torch")
    tensors = {}
    for name, array in tensors_of(folder).items():
        is_bfloat16 = array.dtype == BFLOAT16
        tensor = torch.from_numpy(array.view(np.int16).copy() if is_bfloat16 else array.copy())
        tensors[name] = tensor.view(torch.bfloat16) if is_bfloat16 else tensor
    if with_tied_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    target.mkdir()
    shutil.copyfile(folder / "config.json", target / "config.json")
    names = list(tensors)
    files = {
        name: f"pytorch_model-{i % num_shards + 1:05d}-of-{num_shards:05d}.bin"
        for i, name in enumerate(names)
    }
    if num_shards == 1:
        files = dict.fromkeys(names, "pytorch_model.bin")
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, target / file)
    if num_shards > 1:
        (target / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": files})
        )


@pytest.mark.cases(2)
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize(("case", "num_shards"), [("a52b_tiny", 3), ("bf16", 1), ("bf16", 2)])
@pytest.mark.heavy
def test_bin_shards_hold_the_same_model(case, num_shards, tmp_path):
    source = goldens.folder_of(case)
    as_bin(source, tmp_path / "bin", num_shards, with_tied_head=True)
    model = from_pretrained(tmp_path / "bin")
    assert_identical(model.params, from_pretrained(source).params)
    model.save_pretrained(tmp_path / "saved")  # as safetensors, without the copy of the embedding
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} == {".json", ".safetensors"}
    assert_identical(from_pretrained(tmp_path / "saved").params, model.params)
    # Through convert_torch.py: safetensors again, with the source's names and bits.
    stream.import_model(tmp_path / "bin", tmp_path / "ours")
    assert json.loads((tmp_path / "ours/conversion.json").read_text())["dropped"] == [
        "lm_head.weight"
    ]
    assert verify.verify(tmp_path / "bin", tmp_path / "ours") == []
    export_model(tmp_path / "ours", tmp_path / "back")
    exported = tensors_of(tmp_path / "back")
    assert_identical(exported, tensors_of(source))


# -----------------------------------------------------------------------------
# what callers may pass


@pytest.fixture(scope="module")
def model() -> Pretrained:
    cfg = small(moe=MoeConfig(), num_layers=2, eos_token_ids=(5,), pad_token_id=7)
    return Pretrained(cfg, random_params(cfg))


IDS = np.array([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 40]], "holds the id 40; ids are 0 to 39"),
        ([[1, -1]], "holds the id -1; ids are 0 to 39"),
        ([1, 2], r"has shape \(2,\)"),
        ([[1.0, 2.0]], r"has shape \(1, 2\) and dtype float64"),
        (np.zeros((1, 0), np.int32), r"has shape \(1, 0\)"),
    ],
)
def test_bad_ids_are_refused(model, ids, message):
    for method in (model.logits, model.generate, model.stream, lambda ids: model.loss(ids, ids)):
        with pytest.raises(ValueError, match=f"input_ids {message}"):
            method(ids)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_arrays_of_another_shape_are_refused(model, name):
    with pytest.raises(
        ValueError, match=rf"{name} has shape \(1, 3\); it must match input_ids, \(2, 3\)"
    ):
        model.logits(IDS, **{name: np.ones((1, 3), np.int32)})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, "holds 0.5"),
        (2, "holds 2"),
        (-1, "holds -1"),
        (np.nan, "holds nan"),
        (1e300, "holds"),
    ],
)
def test_masks_are_checked_before_they_are_cast(model, value, message):
    mask = np.ones(IDS.shape, np.asarray(value).dtype)
    mask[0, 0] = value
    for method in (model.logits, lambda *a: model.loss(a[0], IDS, a[1]), model.generate):
        with pytest.raises(ValueError, match=f"attention_mask {message}"):
            method(IDS, mask)
    ones = np.ones(IDS.shape)
    for same in (ones, ones.astype(bool), jnp.ones(IDS.shape, jnp.bfloat16), ones.tolist()):
        np.testing.assert_array_equal(model.logits(IDS, same), model.logits(IDS))


def test_positions_are_checked_before_they_are_cast(model):
    mask = [[0, 1, 1], [1, 1, 1]]
    for value, message in ((-1, "holds -1 for a token"), (0.5, "holds 0.5"), (2**31, "holds 21")):
        with pytest.raises(ValueError, match=f"position_ids {message}"):
            model.logits(IDS, None, np.array([[value, 0, 1], [0, 1, 2]]))
    # cumsum - 1, as it is before transformers fills in the padding.
    found = model.logits(IDS, mask, [[-1, 0, 1], [0, 1, 2]])
    expected = model.logits(IDS, mask, [[1, 0, 1], [0, 1, 2]])
    np.testing.assert_array_equal(found[:, 1:], expected[:, 1:])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (IDS[:, :2], r"labels has shape \(2, 2\)"),
        (IDS - 2, "labels holds -1"),
        (IDS + 34, "labels holds 40"),
        (IDS + 0.5, r"labels holds 1.5"),
        (IDS + 2**32, "labels holds 4294967"),
        ([["a"] * 3] * 2, "labels has dtype <U1; it must hold integers"),
    ],
)
def test_bad_labels_are_refused(model, labels, message):
    with pytest.raises(ValueError, match=message):
        model.loss(IDS, labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": [[1, 1, 0], [1, 1, 1]]}, "attention_mask has a 0 after a 1"),
        ({"attention_mask": [[1, 1, 1]]}, r"attention_mask has shape \(1, 3\)"),
        (
            {"max_new_tokens": 62},
            r"3 prompt tokens \+ max_new_tokens = 62 exceed the 64 positions",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens = 0 must be an integer of at least 1"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"temperature": None}, "temperature = None must be a number; leave it out"),
        ({"eos_token_id": 2.7}, r"eos_token_id = \[2.7\] must be token ids"),
        ({"eos_token_id": [2**31]}, r"eos_token_id = \[2147483648\] must be token ids"),
    ],
)
def test_bad_generation_arguments_are_refused_at_once(model, arguments, message):
    for method in (model.generate, model.stream):  # stream before its first token is asked for
        with pytest.raises(ValueError, match=message):
            method(IDS, **arguments)


def test_generation_stops_at_the_stop_id_and_fills_with_padding(model):
    free = model.generate(IDS, max_new_tokens=6, eos_token_id=())
    np.testing.assert_array_equal(free[:, :3], IDS)
    stop = int(free[0, 5])
    stopped = model.generate(IDS, max_new_tokens=6, eos_token_id=stop)
    for free_T, stopped_T in zip(free[:, 3:], stopped[:, 3:], strict=True):
        length = free_T.tolist().index(stop) + 1 if stop in free_T else 6
        np.testing.assert_array_equal(stopped_T[:length], free_T[:length])
        assert (stopped_T[length:] == 7).all()
    assert (stopped[0, -1] == 7).all()


def test_a_model_trained_with_routing_groups_takes_any_batch():
    cfg = small(num_layers=2, moe=MoeConfig(num_experts=3, dispatch="recycle", group_size=64))
    model = Pretrained(cfg, random_params(cfg))
    np.testing.assert_array_equal(
        model.generate(IDS, max_new_tokens=2)[:, 3], np.argmax(model.logits(IDS)[:, -1], axis=-1)
    )
