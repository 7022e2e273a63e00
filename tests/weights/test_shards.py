"""Every reader of an official folder gives the same answer, in one line with the remedy: loading,
a run's start, import and verify.
"""

import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from hunyuan_jax import from_pretrained
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.train.start import read_weights
from hunyuan_jax.weights import hf_config, quantized, stream, verify
from hunyuan_jax.weights.open import export_model
from support.folders import HF, contents, tensors_of, write_source

INDEX = "model.safetensors.index.json"
NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
BFLOAT16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of three shards, and its import."""
    folder = tmp_path_factory.mktemp("good")
    write_source(folder / "source", 3, num_hidden_layers=2)
    stream.import_model(folder / "source", folder / "ours")
    return folder


@pytest.fixture
def source(good, tmp_path):
    return shutil.copytree(good / "source", tmp_path / "source")


@pytest.fixture
def single(source):
    """The same model as one file."""
    tensors = tensors_of(source)
    for path in [*source.glob("*.safetensors"), source / INDEX]:
        path.unlink()
    safetensors.numpy.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def answers(folder, converted, tmp_path):
    """What each reader says of a folder: its error, or "" if it takes it."""
    cfg = hf_config.from_hf(HF | {"num_hidden_layers": 2})
    readers = {
        "load": lambda: from_pretrained(folder),
        "init_from": lambda: read_weights(str(folder), cfg, single_device_mesh()),
        "import": lambda: stream.import_model(folder, tmp_path / "imported"),
        "verify": lambda: verify.verify(folder, converted),
    }
    found = {}
    for name, read in readers.items():
        try:
            read()
            found[name] = ""
        except ConfigError as error:
            found[name] = str(error)
    return found


def refusal(folder, good, tmp_path):
    """The one line that every reader answers."""
    found = answers(folder, good / "ours", tmp_path)
    assert len(set(found.values())) == 1, found
    line = found["load"]
    assert line and "\n" not in line
    return line


def edit(folder, change, file="model.safetensors"):
    tensors = safetensors.numpy.load_file(folder / file)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_index(folder, **changes):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | changes}))


# -----------------------------------------------------------------------------
# which files


BAD_INDEX = {
    "list": (b"[]", "holds a JSON list; it must be an object"),
    "empty object": (b"{}", "has no weight_map"),
    "no weight_map": (b'{"metadata": {}}', "has no weight_map"),
    "empty weight_map": (b'{"weight_map": {}}', "has no weight_map"),
    "null weight_map": (b'{"weight_map": null}', "has no weight_map"),
    "weight_map of numbers": (b'{"weight_map": {"a": 3}}', "names 3 as a file of weights"),
    "weight_map of lists": (b'{"weight_map": {"a": ["b"]}}', "names ['b'] as a file of weights"),
    "cut off": (b'{"weight_map": {"model.norm', "is not valid JSON"),
    "empty": (b"", "is not valid JSON"),
    "not UTF-8": (b'{"weight_map": {"\xff": "a"}}', "is not valid JSON"),
    "nested without end": (b"[" * 200_000, "is not valid JSON"),
    "config as weights": (b'{"weight_map": {"a": "config.json"}}', "names 'config.json' as"),
}


@pytest.mark.parametrize("what", BAD_INDEX)
def test_a_bad_index_is_named(source, good, tmp_path, what):
    text, message = BAD_INDEX[what]
    (source / INDEX).write_bytes(text)
    line = refusal(source, good, tmp_path)
    assert f"{source}/{INDEX}" in line and message in line


@pytest.mark.parametrize("name", ["../outside.safetensors", "{absolute}", "a/../../b.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(source, good, tmp_path, name):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((source / SHARDS[0]).read_bytes())
    edit_index(source, **{NORM: name.format(absolute=outside)})
    assert "nothing outside is read" in refusal(source, good, tmp_path)


def test_links_out_of_the_folder_are_read(source, tmp_path):
    """A hub's cache holds links to blobs, whose names have no suffix."""
    expected = from_pretrained(source).params
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate(sorted(source.iterdir())):
        path.rename(tmp_path / f"blobs/{i:064x}")
        path.symlink_to(f"../blobs/{i:064x}")
    jax.tree.map(np.testing.assert_array_equal, from_pretrained(source).params, expected)


def test_a_tensor_of_two_shards_is_named(source, good, tmp_path):
    norm = tensors_of(source)[NORM]
    edit(source, lambda t: t.update({NORM: norm}), SHARDS[0])
    line = refusal(source, good, tmp_path)
    assert f"{NORM} is in both {SHARDS[0]} and {SHARDS[2]}" in line


def test_a_tensor_of_another_shard_is_found(source, good, tmp_path):
    edit_index(source, **{NORM: SHARDS[0]})
    line = refusal(source, good, tmp_path)
    assert f"{NORM} is in {SHARDS[2]}, not in {SHARDS[0]}" in line and "delete the index" in line
    edit_index(source, **{NORM: SHARDS[2], "extra": SHARDS[1]})
    assert f"extra is not in {SHARDS[1]}" in refusal(source, good, tmp_path)


def test_a_complete_set_of_shards_needs_no_index(source, good, tmp_path):
    expected = from_pretrained(source).params
    (source / INDEX).unlink()
    jax.tree.map(np.testing.assert_array_equal, from_pretrained(source).params, expected)
    assert set(answers(source, good / "ours", tmp_path).values()) == {""}
    for i, folder in enumerate((source, tmp_path / "imported")):
        export_model(folder, tmp_path / f"out-{i}")
        weight_map = json.loads((tmp_path / f"out-{i}/{INDEX}").read_text())["weight_map"]
        assert set(weight_map.values()) == set(SHARDS) and NORM in weight_map
    (source / SHARDS[1]).unlink()
    line = refusal(source, good, tmp_path / "other")
    assert f"has no {INDEX}, and of its 3 shards number 2 is missing" in line
    (source / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert "shards of several sets, of 2 and of 3 files" in refusal(source, good, tmp_path)


def test_a_single_file_is_read_before_an_index_as_transformers_does(source, good, tmp_path):
    tensors = {name: tensor + 1 for name, tensor in tensors_of(source).items()}
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    found = from_pretrained(source).params["final_norm"]["scale_D"]
    np.testing.assert_array_equal(found, tensors[NORM])
    (source / INDEX).write_text("[]")
    assert answers(source, good / "ours", tmp_path) | {"verify": ""} == dict.fromkeys(
        ("load", "init_from", "import", "verify"), ""
    )
    export_model(source, tmp_path / "out")
    assert not (tmp_path / "out" / INDEX).exists()


def test_an_index_of_a_single_file_is_kept(single, tmp_path):
    about = {"weight_map": dict.fromkeys(tensors_of(single), "model.safetensors")}
    (single / INDEX).write_text(json.dumps(about))
    export_model(single, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(single)


def test_other_names_of_weights_are_told(single, good, tmp_path):
    (single / "model.safetensors").rename(single / "consolidated.safetensors")
    assert "It has consolidated.safetensors; only" in refusal(single, good, tmp_path)
    (single / "adapter_config.json").write_text("{}")
    assert "is a PEFT adapter, not a model" in refusal(single, good, tmp_path)


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


BAD_FILES = {
    "empty": b"",
    "pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
    "list": header(b"[]"),
    "no offsets": header(b'{"a": {"dtype": "F32", "shape": [1]}}'),
    "words": header(b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}'),
    "three offsets": header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}'),
    "number": header(b'{"a": 3}'),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_file_that_is_not_safetensors_is_named(single, good, tmp_path, what):
    (single / "model.safetensors").write_bytes(BAD_FILES[what])
    line = refusal(single, good, tmp_path)
    assert "model.safetensors is not a safetensors file" in line


# -----------------------------------------------------------------------------
# numbers and codes


GPTQ = {"quant_method": "gptq", "bits": 3, "group_size": 128}
BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
QUANTIZED = [
    ("quantization_config", BITS, "quantised by bitsandbytes"),
    ("quantization_config", {"load_in_8bit": True, "load_in_4bit": False}, "by bitsandbytes"),
    ("quantization_config", {"quant_method": "compressed-tensors"}, "by 'compressed-tensors'"),
    ("quantization_config", "int4", "by 'int4'"),
    ("compression_config", {"quant_method": "compressed-tensors"}, "compression_config says"),
    ("quantization", {"group_size": 64, "bits": 4}, "quantised by MLX"),
]


@pytest.mark.parametrize(("field", "value", "message"), QUANTIZED)
def test_a_method_of_quantization_is_named(single, good, tmp_path, field, value, message):
    edit_json(single / "config.json", **{field: value})
    line = refusal(single, good, tmp_path)
    assert message in line and f"if its weights are plain numbers, delete {field}" in line


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "value", [None, {}, {"quant_method": "bitsandbytes", "_load_in_4bit": False,
                         "_load_in_8bit": False}]
)  # fmt: skip
def test_nothing_quantised_is_nothing_said(single, good, tmp_path, value):
    edit_json(single / "config.json", quantization_config=value)
    assert set(answers(single, good / "ours", tmp_path).values()) == {""}


CODES = [
    (f"{QUERY[:-7]}.qweight", np.zeros((2, 16), np.int32), "GPTQ or AWQ"),
    (f"{QUERY}.absmax", np.zeros(4, np.float32), "bitsandbytes"),
    (f"{QUERY[:-7]}.SCB", np.zeros(16, np.float32), "bitsandbytes"),
    (f"{QUERY}_packed", np.zeros((16, 2), np.int32), "compressed-tensors"),
    (f"{QUERY[:-7]}.scales", np.zeros((16, 2), np.float32), "MLX"),
    (QUERY, np.zeros((16, 16), np.int8), "has dtype I8"),
    (QUERY, np.zeros((16, 16), np.uint8), "has dtype U8"),
    (QUERY, np.zeros((16, 16), np.int64), "has dtype I64"),
    ("extra", np.zeros(2, np.bool_), "has dtype BOOL"),
]


@pytest.mark.parametrize(("name", "codes", "message"), CODES, ids=[m for _, _, m in CODES])
def test_no_code_is_read_as_a_number(single, good, tmp_path, name, codes, message):
    edit(single, lambda t: t.update({name: codes}))
    line = refusal(single, good, tmp_path)
    assert message in line and name in line and "oad the model that" in line


def test_codes_of_a_bin_are_refused_in_the_same_words(single, good, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(a.copy()) for name, a in tensors_of(single).items()}
    (single / "model.safetensors").unlink()
    for name, codes, message in (
        (QUERY, torch.zeros((16, 16), dtype=torch.int8), "has dtype torch.int8"),
        (f"{QUERY[:-7]}.qweight", torch.zeros((2, 16), dtype=torch.int32), "GPTQ or AWQ"),
    ):
        torch.save(tensors | {name: codes}, single / "pytorch_model.bin")
        assert message in refusal(single, good, tmp_path)
    for value in ({"state_dict": tensors}, [1, 2]):
        torch.save(value, single / "pytorch_model.bin")
        assert "is not a dict of tensors by name" in refusal(single, good, tmp_path)
    path = single / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)  # as before PyTorch 1.6
    assert set(answers(single, good / "ours", tmp_path).values()) == {""}


@pytest.mark.cases(2)
@pytest.mark.parametrize("is_stated", [True, False])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_fp8_is_multiplied_by_its_scale_by_all_readers(single, good, tmp_path, name, is_stated):
    values = {}

    def change(tensors):
        codes = (tensors[QUERY] * 4).astype(FP8)
        values[QUERY] = codes.astype(np.float32) * np.float32(0.25)
        stem = QUERY.removesuffix("weight")
        tensors |= {QUERY: codes, stem + name: np.array([0.25], np.float32),
                    stem + "input_scale": np.array(0.5, np.float32)}  # fmt: skip

    edit(single, change)
    if is_stated:
        edit_json(single / "config.json", quantization_config={"quant_method": "fp8"})
    stream.import_model(single, tmp_path / "ours")
    assert set(answers(single, tmp_path / "ours", tmp_path).values()) == {""}
    assert verify.verify(single, tmp_path / "ours") == []
    for i, folder in enumerate((single, tmp_path / "ours")):
        export_model(folder, tmp_path / f"out-{i}")
        np.testing.assert_array_equal(tensors_of(tmp_path / f"out-{i}")[QUERY], values[QUERY])


def test_fp8_by_blocks(single, good, tmp_path):
    """As transformers' FP8 and DeepSeek's: one scale for each block of a matrix."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.1, 1, (2, 3)).astype(np.float32)
    codes = rng.normal(size=(16, 16)).astype(FP8)
    expected = codes.astype(np.float32)
    for row in range(16):
        for column in range(16):
            expected[row, column] *= scale[row // 10, column // 6]
    found = quantized.dequantized(codes, scale, (10, 6), np.dtype(np.float32))
    np.testing.assert_array_equal(found, expected)

    name = QUERY.removesuffix("weight") + "weight_scale_inv"
    edit(single, lambda t: t.update({QUERY: codes, name: scale}))
    about = {"quant_method": "fp8", "weight_block_size": [10, 6]}
    edit_json(single / "config.json", quantization_config=about)
    export_model(single, tmp_path / "out")
    np.testing.assert_array_equal(tensors_of(tmp_path / "out")[QUERY], expected)
    edit_json(single / "config.json", quantization_config=about | {"weight_block_size": [8, 8]})
    with pytest.raises(ConfigError, match=r"weight_scale_inv \(2, 3\) .* block of \(8, 8\)"):
        export_model(single, tmp_path / "other")
    edit_json(single / "config.json", quantization_config=about | {"weight_block_size": 8})
    assert "weight_block_size = 8 must be two" in refusal(single, good, tmp_path)


def test_fp8_without_a_scale_is_refused(single, good, tmp_path):
    edit(single, lambda t: t.update({QUERY: t[QUERY].astype(FP8)}))
    assert f"are missing: {QUERY}_scale" in refusal(single, good, tmp_path)


@pytest.mark.cases(1)
@pytest.mark.parametrize("stored", [np.float16, np.float32])
def test_more_precision_than_promised_is_rounded_by_all_readers(good, tmp_path, stored, capsys):
    source = write_source(tmp_path / "source", 1, num_hidden_layers=2, torch_dtype="bfloat16")
    file = "model-00001-of-00001.safetensors"
    edit(source, lambda t: t.update({NORM: (t[NORM] * 1.001).astype(stored)}), file)
    expected = tensors_of(source)[NORM].astype(BFLOAT16)
    assert set(answers(source, good / "ours", tmp_path).values()) == {""}
    assert f"are rounded: {NORM}; --dtype=float32 keeps them" in capsys.readouterr().err
    for folder in (source, tmp_path / "imported"):
        found = from_pretrained(folder).params["final_norm"]["scale_D"]
        np.testing.assert_array_equal(found, expected, strict=True)
    assert verify.verify(source, tmp_path / "imported") == []


# -----------------------------------------------------------------------------
# the head


def test_a_head_is_the_embedding_or_its_own_by_one_rule(single, good, tmp_path):
    embedding = tensors_of(single)["model.embed_tokens.weight"]
    for copy in (embedding.astype(np.float16), embedding):
        edit(single, lambda t, copy=copy: t.update({"lm_head.weight": copy}))
        assert set(answers(single, good / "ours", tmp_path).values()) == {""}
        shutil.rmtree(tmp_path / "imported")
    edit(single, lambda t: t.update({"lm_head.weight": embedding + np.float32(1e-6)}))
    assert "set it to false to keep both" in refusal(single, good, tmp_path)
    edit_json(single / "config.json", tie_word_embeddings=False)
    assert from_pretrained(single).params["lm_head"]["w_VD"].dtype == np.float32
    edit(single, lambda t: t.pop("lm_head.weight"))
    found = answers(single, good / "ours", tmp_path)
    del found["verify"]  # the converted model has a head, which it says first
    assert len(set(found.values())) == 1 and "set tie_word_embeddings to true" in found["load"]


def test_a_head_of_another_dtype_is_the_embedding_in_the_models(tmp_path, good):
    source = write_source(tmp_path / "source", 1, num_hidden_layers=2, torch_dtype="bfloat16")
    file = "model-00001-of-00001.safetensors"
    tensors = tensors_of(source)
    head = tensors["model.embed_tokens.weight"].astype(np.float32) * np.float32(1 + 1e-6)
    edit(source, lambda t: t.update({"lm_head.weight": head}), file)
    os.remove(source / INDEX)
    assert set(answers(source, good / "ours", tmp_path).values()) == {""}
    export_model(source, tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors.keys()


# -----------------------------------------------------------------------------
# an import


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "format = None with 0 fields; this version reads format 1"),
        ('{"format": 1}', "format = 1 with 1 fields"),
        ('{"format": 2}', "format = 2 with 1 fields"),
    ],
)
def test_a_damaged_import_is_named_by_all_readers(good, tmp_path, text, message):
    ours = shutil.copytree(good / "ours", tmp_path / "ours")
    (ours / "conversion.json").write_text(text)
    for read in (
        lambda: from_pretrained(ours),
        lambda: verify.verify(good / "source", ours),
        lambda: export_model(ours, tmp_path / "out"),
        lambda: stream.import_model(good / "source", ours),
    ):
        with pytest.raises(ConfigError) as error:
            read()
        assert f"{ours}/conversion.json" in str(error.value) and message in str(error.value)


def test_a_byte_order_mark_is_no_hindrance(source, good, tmp_path):
    for name in ("config.json", INDEX):
        (source / name).write_bytes(b"\xef\xbb\xbf" + (source / name).read_bytes())
    assert set(answers(source, good / "ours", tmp_path).values()) == {""}


# -----------------------------------------------------------------------------
# the dtype


@pytest.mark.cases(3)
@pytest.mark.parametrize("stated", ["absent", None, "auto", "torch.bfloat16", "bfloat16"])
@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_no_dtype_is_that_of_the_files(tmp_path, good, stated, field):
    """As transformers' "auto"; routers, which are float32 in bfloat16 folders, do not count."""
    source = write_source(tmp_path / "source", 2, num_hidden_layers=2, torch_dtype="bfloat16")
    hf = json.loads((source / "config.json").read_text())
    del hf["torch_dtype"]
    (source / "config.json").write_text(
        json.dumps(hf | ({} if stated == "absent" else {field: stated}))
    )
    assert from_pretrained(source).config.dtype == "bfloat16"
    assert set(answers(source, good / "ours", tmp_path).values()) == {""}
    assert from_pretrained(tmp_path / "imported").config.dtype == "bfloat16"
    export_model(tmp_path / "imported", tmp_path / "out")
    for name, tensor in tensors_of(source).items():
        written = tensors_of(tmp_path / "out")[name]
        np.testing.assert_array_equal(written, tensor)


def test_float16_says_what_to_do(single, good, tmp_path):
    edit_json(single / "config.json", torch_dtype="float16")
    with pytest.raises(ConfigError, match="with dtype bfloat16 or float32"):
        from_pretrained(single)
    assert from_pretrained(single, dtype="float32").config.dtype == "float32"
