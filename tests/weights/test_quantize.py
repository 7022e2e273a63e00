"""Folders in few bits: written, read, loaded by the engine; and those that are damaged."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from hunyuan_jax import from_pretrained, presets
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.quant import codes
from hunyuan_jax.quant.array import dequantized, is_quantized
from hunyuan_jax.weights import few_bits, names, quantize, quantized
from hunyuan_jax.weights.open import export_model, open_model
from support.folders import tensors_of, write_source
from support.models import assert_close, mesh_of

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_experts": 2}
IDS = np.arange(12).reshape(1, 12) % 48


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("model") / "source", 1, **SIZES)


@pytest.fixture(scope="module")
def folders(source, tmp_path_factory):
    """One in each method."""
    root = tmp_path_factory.mktemp("few_bits")
    for method in codes.METHODS:
        quantize.quantize_model(source, root / method, method)
    return root


def numbers(folder):
    opened = open_model(folder, "float32")
    return {entry.name: opened.tensor(entry) for entry in names.entries(opened.cfg)}


@pytest.mark.parametrize("method", codes.METHODS)
def test_a_folder_gives_what_the_method_makes(source, folders, method):
    plain, opened = open_model(source), open_model(folders / method)
    group, num_quantized = few_bits.group_of(plain.entries), 0
    for entry in names.entries(plain.cfg):
        tensor, stored = plain.tensor(entry), opened.codes(entry)
        if not few_bits.is_quantizable(entry):
            assert stored is None
            np.testing.assert_array_equal(opened.tensor(entry), tensor)
            continue
        num_quantized += 1
        expected = codes.quantize(entry.name, tensor, method, group)
        assert stored.kind == expected.kind
        np.testing.assert_array_equal(opened.tensor(entry), codes.dequantized(expected))
    assert num_quantized == 2 * (2 + 2 * 3 + 3) + 2  # q, o, experts, shared; k, v of the producer
    sizes = [
        sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (source, folders / method)
    ]
    assert sizes[1] < 0.45 * sizes[0]
    assert quantize.num_bytes(plain.cfg, method, 0.01) == pytest.approx(sizes[1], rel=0.5)


def test_embedding_and_head_are_quantised_by_choice(source):
    """With the same logits as with the numbers that their codes stand for, on a mesh too."""
    model = from_pretrained(source, quantize="int8+head")
    params = model.params | {}
    for place, name in (("embed", "embedding_VD"), ("lm_head", "w_VD")):
        if place in params:
            assert params[place][name].values.dtype == np.int8
            params[place] = {name: dequantized(params[place][name], np.float32)}
    expected = Pretrained(model.config, params).logits(IDS)
    assert_close(model.logits(IDS), expected, 1e-5)
    on_mesh = from_pretrained(source, quantize="int8+head", mesh=mesh_of(expert=2, tensor=2))
    assert_close(on_mesh.logits(IDS), expected, 1e-5)


@pytest.mark.heavy
def test_every_tensor_of_hunyuan_large_at_reduced_width(tmp_path):
    """64 layers of 16 experts: all projections and experts get codes, and nothing else does."""
    sizes = {"hidden_size": 32, "intermediate_size": 32}
    source = write_source(tmp_path / "source", 1, num_hidden_layers=64, num_experts=16, **sizes)
    quantize.quantize_model(source, tmp_path / "int4", "int4")
    opened = open_model(tmp_path / "int4")
    entries = names.entries(opened.cfg)
    assert {entry.name for entry in entries} == {e.name for e in names.entries(presets.a52b())}
    has_codes = [opened.codes(entry) is not None for entry in entries]
    assert has_codes == [few_bits.is_quantizable(entry) for entry in entries]
    # q and o of each layer, k and v of every other, and 16 + 1 experts of three.
    assert sum(has_codes) == 64 * (2 + 1 + 17 * 3)


@pytest.mark.heavy
def test_the_model_computes_with_few_bits(source, folders):
    """Loaded from the folder, quantised at load, or on a mesh: the same logits, those of the
    numbers that the codes stand for.
    """
    folder = folders / "easyquant"
    expected = from_pretrained(folder, quantize="none").logits(IDS)
    for model in (
        from_pretrained(source, quantize="easyquant"),
        from_pretrained(folder, mesh=mesh_of(expert=2, tensor=2)),
    ):
        experts = model.params["groups"]["layer_0"]["moe"]["experts"]
        assert all(is_quantized(leaf) for leaf in experts.values())
        assert experts["w_up_EDF"].values.dtype == jnp.int8
        assert not is_quantized(model.params["embed"]["embedding_VD"])
        assert_close(model.logits(IDS), expected, 2e-5)


@pytest.mark.heavy
def test_the_engine_computes_with_few_bits(source, folders):
    rows = from_pretrained(source, quantize="int8").generate(IDS, max_new_tokens=4)
    logits = from_pretrained(folders / "int8", quantize="none").logits(rows)
    np.testing.assert_array_equal(rows[0, 12:], np.argmax(logits, -1)[0, 11:-1])


@pytest.mark.heavy
def test_activations_in_eight_bits(source):
    """In projections, shared and routed experts, beside weights in int8."""
    int8, model = (from_pretrained(source, quantize=method) for method in ("int8", "w8a8"))
    leaves = jax.tree.leaves(model.params, is_leaf=is_quantized)
    assert {leaf.rounds_inputs for leaf in leaves if is_quantized(leaf)} == {True}
    expected, found = int8.logits(IDS), model.logits(IDS)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05
    for method, kind, other in (
        ("w8a8-fp8", "cpu", "'w8a8'"),
        ("w8a8-fp8", "TPU v6 lite", "'w8a8'"),
        ("w8a8", "TPU7x", "'w8a8-fp8'"),
    ):
        with pytest.raises(ConfigError, match=f"{kind}' has no such product .*use {other}, or"):
            few_bits.check_product(method, kind, "quantize")
    for method, kind in (("w8a8", "cpu"), ("w8a8-fp8", "TPU7x"), ("w8a8-fp8", "NVIDIA H200")):
        few_bits.check_product(method, kind, "quantize")
    with pytest.raises(ConfigError, match="quantize = 'w8a8-fp8': 'cpu' has no such product"):
        from_pretrained(source, quantize="w8a8-fp8")


def test_fp8_of_a_folder_becomes_numbers_unless_it_is_asked_for(folders):
    model = from_pretrained(folders / "fp8")
    assert not is_quantized(model.params["groups"]["layer_0"]["attn"]["wq_DNH"])
    kept = from_pretrained(folders / "fp8", quantize="fp8")
    assert is_quantized(kept.params["groups"]["layer_0"]["attn"]["wq_DNH"])
    assert_close(kept.logits(IDS), model.logits(IDS), 2e-5)


def test_a_quantised_model_is_exported_as_numbers(folders, tmp_path):
    export_model(folders / "int8", tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    expected = numbers(folders / "int8")
    from_pretrained(folders / "int8").save_pretrained(tmp_path / "saved")
    for out in ("out", "saved"):
        for name, tensor in tensors_of(tmp_path / out).items():
            np.testing.assert_allclose(tensor, expected[name], rtol=1e-6, atol=1e-9)


def test_a_killed_call_is_continued(source, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "_MAX_FILE_BYTES", 40_000)
    output = tmp_path / "out"
    count, num_bytes = quantize.quantize_model(source, output, "int4")
    assert count > 2
    assert num_bytes == sum(f.stat().st_size for f in output.glob("*.safetensors"))
    for name, tensor in numbers(folders / "int4").items():
        np.testing.assert_array_equal(numbers(output)[name], tensor)
    files = sorted(output.glob("*.safetensors"))
    kept = files[0].read_bytes()
    for path in [*files[1:], output / "config.json"]:
        path.unlink()
    with pytest.raises(ConfigError, match="is not empty"):
        quantize.quantize_model(source, output, "int4")
    for path in output.glob("*.json"):
        path.unlink()
    opened = open_model(source)
    claim = {"fingerprint": opened.fingerprint, "dtype": "float32", "method": "int4"}
    (output / "quantize.json").write_text(json.dumps(claim))
    for path in sorted(output.iterdir()):
        if path.name not in (files[0].name, "quantize.json"):
            path.unlink()
    with pytest.raises(ConfigError, match="another checkpoint or --method"):
        quantize.quantize_model(source, output, "int8")
    assert quantize.quantize_model(source, output, "int4")[0] == count - 1
    assert files[0].read_bytes() == kept
    np.testing.assert_array_equal(
        numbers(output)["model.layers.1.mlp.shared_mlp.up_proj.weight"],
        numbers(folders / "int4")["model.layers.1.mlp.shared_mlp.up_proj.weight"],
    )


def test_what_cannot_be_quantised_is_refused(source, folders, tmp_path):
    for call, message in (
        (lambda: quantize.quantize_model(folders / "int8", tmp_path / "a", "int4"), "already"),
        (lambda: quantize.quantize_model(source, tmp_path / "a", "int3"), "--method=int3; use"),
        (lambda: from_pretrained(source, quantize="int3"), "quantize = 'int3'; use int8"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "a").exists()


# -----------------------------------------------------------------------------
# formats of others


def gptq(w_OI, group, zero=8, order=None):
    """GPTQ's tensors of a matrix, and the numbers they stand for."""
    num_out, num_in = w_OI.shape
    group_I = np.arange(num_in) // group if order is None else order
    rng = np.random.default_rng(0)
    codes_IO = rng.integers(0, 16, (num_in, num_out))
    scale_GO = rng.uniform(0.01, 0.1, (num_in // group, num_out)).astype(np.float16)
    dense = scale_GO.astype(np.float32)[group_I] * (codes_IO - zero).astype(np.float32)

    def pack(x_AB, axis):
        x = np.moveaxis(x_AB, axis, -1).reshape(-1, x_AB.shape[axis] // 8, 8).astype(np.uint32)
        packed = (x << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32)
        return np.ascontiguousarray(np.moveaxis(packed.view(np.int32), -1, axis))

    zeros_GO = np.full(scale_GO.shape, zero - 1)
    tensors = {
        "qweight": pack(codes_IO, 0),
        "qzeros": pack(zeros_GO, 1),
        "scales": scale_GO,
        "g_idx": group_I.astype(np.int32),
    }
    return tensors, dense.T


def as_gptq(source, output, group=32, **options):
    """The model with all its projections as GPTQ; (folder, numbers by name)."""
    shutil.copytree(source, output)
    opened, tensors, expected = open_model(source), {}, {}
    for entry in names.entries(opened.cfg):
        if not few_bits.is_quantizable(entry):
            tensors[entry.name] = expected[entry.name] = opened.tensor(entry)
            continue
        made, expected[entry.name] = gptq(opened.tensor(entry), group, **options)
        stem = entry.name.removesuffix("weight")
        tensors |= {stem + what: array for what, array in made.items()}
    write_tensors(output, tensors)
    about = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False}
    edit_config(output, quantization_config=about)
    return output, expected


def write_tensors(folder, tensors):
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("zero", [8, 5])
def test_gptq(source, tmp_path, zero):
    folder, expected = as_gptq(source, tmp_path / "gptq", zero=zero)
    for name, tensor in numbers(folder).items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-6)
    entry = next(e for e in names.entries(open_model(folder).cfg) if few_bits.is_quantizable(e))
    found = open_model(folder).codes(entry)
    # Four bits stay four bits where the zero is the middle.
    assert (found is None) == (zero != 8)
    if found is not None:
        np.testing.assert_allclose(codes.dequantized(found), expected[entry.name], rtol=1e-6)


QUERY = "model.layers.0.self_attn.q_proj."


def truncated(tensors):
    tensors[QUERY + "qweight"] = tensors[QUERY + "qweight"][:-1]


def out_of_range(tensors):
    tensors[QUERY + "g_idx"] = tensors[QUERY + "g_idx"] + 1


def zero_scale(tensors):
    tensors[QUERY + "scales"] = tensors[QUERY + "scales"] * np.float16(0)


def nan_scale(tensors):
    tensors[QUERY + "scales"][1, 2] = np.nan


def lacking(tensors):
    del tensors[QUERY + "scales"]


def not_used(tensors):
    tensors[QUERY + "k_zero"] = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncated, r"another shape: .*q_proj.weight \(64, 56\), not \(64, 64\)"),
        (out_of_range, r"q_proj.g_idx \(64,\) must have a group from 0 to 1 .* holds 1 to 2"),
        (zero_scale, r"q_proj.scales \(2, 64\) holds 0.0; scales are positive"),
        (nan_scale, r"q_proj.scales \(2, 64\) holds nan; scales are positive"),
        (lacking, r"are missing: .*q_proj.scales"),
        (not_used, r"does not have: .*q_proj.k_zero"),
    ],
)
def test_damage_is_named(source, tmp_path, change, message):
    folder, _ = as_gptq(source, tmp_path / "gptq")
    tensors = tensors_of(folder)
    tensors = {name: np.array(array) for name, array in tensors.items()}
    change(tensors)
    write_tensors(folder, tensors)
    with pytest.raises(ConfigError, match=message) as caught:
        from_pretrained(folder)
    assert "\n" not in str(caught.value)


def edited_raw(folder, name, edit):
    """Edits a tensor in place in the files of a folder."""
    for path in folder.glob("*.safetensors"):
        raw = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        about = json.loads(raw[8:start]).get(name)
        if about is not None:
            dtype = {"I32": np.int32, "I64": np.int64, "BF16": np.uint16}[about["dtype"]]
            begin, end = (start + offset for offset in about["data_offsets"])
            edit(np.frombuffer(memoryview(raw)[begin:end], dtype))
            path.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_shape", 63, r"q_proj.weight_shape holds \[63, 64\], but .*weight_packed has"),
        ("outlier_position", -1, "q_proj.outlier_position .* are not outliers of a weight"),
        ("outlier_position", 4095, "q_proj.outlier_position .* positions in it that rise"),
        ("outlier_value", 0x7FC0, "q_proj.outlier_value .* finite numbers. The file is damaged"),
    ],
)
def test_damage_of_our_own_files_is_named(folders, tmp_path, name, value, message):
    shutil.copytree(folders / "easyquant", tmp_path / "model")
    edited_raw(tmp_path / "model", QUERY + name, lambda array: array.__setitem__(0, value))
    with pytest.raises(ConfigError, match=message) as caught:
        from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_another_group_size_than_stated(source, folders, tmp_path):
    folder, _ = as_gptq(source, tmp_path / "gptq")
    about = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    edit_config(folder, quantization_config=about)
    with pytest.raises(ConfigError, match="_proj.scales .* 2 groups; .*group_size = 64"):
        from_pretrained(folder)
    edit_config(folder, quantization_config=about | {"group_size": 0})
    with pytest.raises(ConfigError, match="group_size = 0, .* -1 for all"):
        from_pretrained(folder)
    shutil.copytree(folders / "int4", tmp_path / "int4")
    config = json.loads((tmp_path / "int4/config.json").read_text())
    about = config["quantization_config"]
    about["config_groups"]["group_0"]["weights"]["group_size"] = 16
    edit_config(tmp_path / "int4", quantization_config=about)
    with pytest.raises(ConfigError, match="has groups of 32 inputs; .*group_size = 16"):
        from_pretrained(tmp_path / "int4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 3}, "num_bits 3"),
        ({"symmetric": False}, "symmetric False"),
        ({"strategy": "block"}, "strategy 'block'"),
    ],
)
def test_a_scheme_of_compressed_tensors_that_is_not_read(folders, tmp_path, changes, message):
    shutil.copytree(folders / "int8", tmp_path / "int8")
    about = json.loads((tmp_path / "int8/config.json").read_text())["quantization_config"]
    about["config_groups"]["group_0"]["weights"] |= changes
    edit_config(tmp_path / "int8", quantization_config=about)
    with pytest.raises(ConfigError, match=message):
        from_pretrained(tmp_path / "int8")
    about["config_groups"]["group_1"] = {"weights": {"num_bits": 8, "type": "int"}}
    edit_config(tmp_path / "int8", quantization_config=about)
    with pytest.raises(ConfigError, match="name several methods"):
        from_pretrained(tmp_path / "int8")


def test_int8_of_others_with_activations_in_int8(folders, tmp_path):
    """Not packed, as compressed-tensors stores W8A8; we keep its activations as numbers."""
    shutil.copytree(folders / "int8", tmp_path / "int8")
    opened, tensors = open_model(folders / "int8"), {}
    for entry in names.entries(opened.cfg):
        tensors[entry.name] = opened.tensor(entry)
        if (found := opened.codes(entry)) is not None:
            tensors |= {entry.name: found.values, f"{entry.name}_scale": found.scale}
    write_tensors(tmp_path / "int8", tensors)
    about = json.loads((tmp_path / "int8/config.json").read_text())["quantization_config"]
    about["config_groups"]["group_0"]["input_activations"] = {
        "num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True,
    }  # fmt: skip
    edit_config(tmp_path / "int8", quantization_config=about | {"format": "int-quantized"})
    expected = numbers(folders / "int8")
    for name, tensor in numbers(tmp_path / "int8").items():
        np.testing.assert_array_equal(tensor, expected[name])


def test_packing_is_that_of_compressed_tensors():
    values = np.array([[-128, -1, 0, 127]], np.int8)
    assert quantized.packed(values, 8)[0, 0] == np.uint32(0xFF807F00).view(np.int32)
    np.testing.assert_array_equal(
        quantized.unpacked(quantized.packed(values, 8), 1, 8) - 128, values
    )
    values = np.array([[-8, -7, 0, 7, 1, 2, 3, -1]], np.int8)
    assert quantized.packed(values)[0, 0] == np.uint32(0x7BA9F810).view(np.int32)
    np.testing.assert_array_equal(quantized.unpacked(quantized.packed(values), 1) - 8, values)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int8", "fp8", "int4"])
def test_transformers_computes_the_same_with_a_folder(tmp_path, method):
    """docs/results/quantization.md."""
    pytest.importorskip("compressed_tensors")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = SIZES | {"num_experts": 1, "use_cla": False, "head_dim": 16}
    write_source(tmp_path / "source", 1, model_type="hunyuan_v1_dense", **sizes)
    (tmp_path / "source/tokenizer_config.json").unlink()
    quantize.quantize_model(tmp_path / "source", tmp_path / method, method)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / method)
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    assert_close(from_pretrained(tmp_path / method, quantize="none").logits(IDS), expected, 1e-5)
