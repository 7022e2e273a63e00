"""GGUF files: blocks as llama.cpp's, folders written as files and read back, what is refused, and
the same greedy tokens as llama.cpp (slow, needs xllamacpp).
"""

import base64
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest

import hunyuan_jax
from hunyuan_jax import cli, flags, from_pretrained
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.gguf import blocks, container
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.infer.settings import read_sampling
from hunyuan_jax.quant.array import is_quantized
from hunyuan_jax.storage import Place
from hunyuan_jax.tokenizer import load_tokenizer
from hunyuan_jax.weights import gguf_model, names, stream, verify
from hunyuan_jax.weights.command import export
from hunyuan_jax.weights.gguf_export import export_gguf
from hunyuan_jax.weights.gguf_file import model_place
from hunyuan_jax.weights.open import export_model, open_model
from support import goldens
from support.folders import tensors_of, write_source

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 384}
SIZES |= {"use_cla": False, "tie_word_embeddings": False, "max_position_embeddings": 128}
MODELS = {
    "llama": {"num_experts": 1, "use_qk_norm": False, "tie_word_embeddings": True},
    "hunyuan-dense": {"model_type": "hunyuan_v1_dense", "num_experts": 1, "head_dim": 32},
    "hunyuan-moe": {"model_type": "hunyuan_v1_moe", "num_experts": 3, "moe_topk": 2},
}
MODELS["llama"]["rope_scaling"] = {"type": "dynamic", "factor": 1.0, "alpha": 1.0}
MODELS["hunyuan-moe"]["rope_scaling"] = None
TEXT = "Hello 12 wörld, e\u0301\n\n  it's <|eos|>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An official folder of each architecture, with a tokenizer."""
    root, there = tmp_path_factory.mktemp("gguf"), goldens.folder_of("moe_top1")
    for name, changes in MODELS.items():
        write_source(root / name, 1, **SIZES | changes)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(there / file, root / name / file)
    return root


@pytest.fixture(scope="module")
def files(folders):
    """The same as files of float32, by architecture."""
    for name in MODELS:
        export_gguf(folders / name, folders / f"{name}.gguf", "f32")
    return {name: folders / f"{name}.gguf" for name in MODELS}


# Of what gguf 0.19.0 (gguf.quants) makes of the same bytes, and of the same numbers.
DEQUANTIZED = {
    "Q8_0": "8a63aed5d1b0f9ce",
    "Q4_0": "67b54cd88fb9318c",
    "Q4_1": "9d1d8e428672b21a",
    "Q5_0": "f5aa46b177f4c462",
    "Q5_1": "957f145ca3b9842b",
    "Q4_K": "3c5aaa96a2d32e56",
    "Q5_K": "333e4ef2a944aab5",
    "Q6_K": "bfa1ecec3cb2fb7b",
}
QUANTIZED = {
    "F16": "8bd195953c2f1998",
    "BF16": "d73a96225dfe8d56",
    "Q8_0": "f9787bd2bb7dbfc5",
    "Q4_0": "a976a7c6f3f7aebd",
}


def digest(array):
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def test_blocks_become_the_numbers_that_llama_cpp_makes_of_them():
    assert DEQUANTIZED.keys() == {n for n, kind in blocks.KINDS.items() if kind.decode}
    for kind, expected in DEQUANTIZED.items():
        dtype = blocks.KINDS[kind].dtype
        raw = np.random.default_rng(0).integers(0, 256, (50, dtype.itemsize), np.uint8)
        blocks_B = raw.reshape(-1).view(dtype)
        for field in {"d", "m"} & set(dtype.names):
            blocks_B[field] = np.linspace(-1, 1, 50)
        assert digest(blocks.numbers_of("file", kind, raw.tobytes())) == expected, kind
        if "d" in dtype.names:
            blocks_B["d"][7] = np.nan
            with pytest.raises(ConfigError, match="file .* a block whose scale is not finite"):
                blocks.numbers_of("file", kind, raw.tobytes())


def test_numbers_become_the_blocks_that_llama_cpp_makes_of_them():
    w_OI = (np.random.default_rng(0).standard_t(5, (64, 256)) * 0.02).astype(np.float32)
    w_OI[3], w_OI[5, 32:64] = 0, 0.5
    for kind, expected in QUANTIZED.items():
        encoded = blocks.encoded("w", kind, w_OI)
        assert digest(encoded) == expected, kind
        error = blocks.numbers_of("w", kind, encoded.tobytes()) - w_OI.reshape(-1)
        assert np.abs(error).max() < {"Q4_0": 0.05}.get(kind, 0.003)
    w_OI[0, 0] = 1e5
    with pytest.raises(ConfigError, match=r"w holds 1\d+.0, which F16 does not .*--gguf=bf16"):
        blocks.encoded("w", "F16", w_OI)
    w_OI[0, 0] = np.nan
    with pytest.raises(ConfigError, match="w holds nan"):
        blocks.encoded("w", "Q8_0", w_OI)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_comes_back(folders, files, name):
    source, read = open_model(folders / name), open_model(files[name])
    header = container.read_header(Place(files[name]))
    assert header.fields["general.architecture"] == name
    # The file has the base of the rotation that alpha made.
    assert read.cfg.rope_theta == pytest.approx(
        source.cfg.rope_theta * source.cfg.rope_alpha ** (32 / 30)
        if name == "hunyuan-dense" else source.cfg.rope_theta
    )  # fmt: skip
    for field in ("num_kv_heads", "head_dim", "use_qk_norm", "tie_embeddings", "moe", "dtype"):
        assert getattr(read.cfg, field) == getattr(source.cfg, field), field
    expected = tensors_of(folders / name)
    for entry in names.entries(read.cfg):
        np.testing.assert_array_equal(read.tensor(entry), expected[entry.name], entry.name)
    ours, theirs = load_tokenizer(str(files[name])), load_tokenizer(folders / name)
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours.encode(TEXT, parse_special=True) == theirs.encode(TEXT, parse_special=True)
    assert (ours.chat_template, ours.eos_id) == (theirs.chat_template, theirs.eos_id)
    assert read.cfg.eos_token_ids == ours.stop_ids


def test_queries_and_keys_of_llama_are_in_another_order(folders, files):
    """Row 2 i of a head is our row i, row 2 i + 1 our row i + half; others are as they were."""
    header, expected = container.read_header(Place(files["llama"])), tensors_of(folders / "llama")
    for name, ours in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj")):
        tensor = header.tensors[f"blk.1.{name}.weight"]
        raw = files["llama"].read_bytes()[tensor.start : tensor.start + tensor.num_bytes]
        rows = expected[f"model.layers.1.self_attn.{ours}.weight"].reshape(-1, 16, 64)
        if ours != "v_proj":
            order = [i // 2 + 8 * (i % 2) for i in range(16)]
            rows = rows[:, order]
        np.testing.assert_array_equal(np.frombuffer(raw, np.float32), rows.reshape(-1))


def test_any_range_of_the_folder_that_a_file_is_seen_as(folders):
    export_gguf(folders / "hunyuan-moe", folders / "ranges.gguf", "q8_0")
    place = model_place(folders / "ranges.gguf")
    whole = place.read("model.safetensors")
    assert len(whole) == place.sizes()["model.safetensors"]
    rng = np.random.default_rng(0)
    for start, end in np.sort(rng.integers(0, len(whole), (50, 2))).tolist():
        assert bytes(place.read("model.safetensors", start, end)) == whole[start:end]


@pytest.mark.heavy
def test_few_bits_are_imported_verified_exported_and_computed_with(folders, files, tmp_path):
    file = tmp_path / "model.gguf"
    export_gguf(folders / "llama", file, "q8_0")
    assert file.stat().st_size < 0.4 * (folders / "llama.gguf").stat().st_size
    stream.import_model(file, tmp_path / "ours")
    assert not verify.verify(file, tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "official")
    numbers, ids = tensors_of(tmp_path / "official"), np.arange(12)[None] * 5
    for name, tensor in tensors_of(folders / "llama").items():
        assert np.abs(numbers[name] - tensor).max() <= np.abs(tensor).max() / 250
    expected = from_pretrained(tmp_path / "official").logits(ids)
    lm = hunyuan_jax.load(file)
    np.testing.assert_array_equal(lm.model.logits(ids), expected)
    assert lm.chat_ids([{"role": "user", "content": "Hello"}])


def test_serve_takes_a_file_in_few_bits(folders, files, monkeypatch):
    class Loaded(Exception):
        pass

    def new_engine(model, limits):
        raise Loaded(model)

    monkeypatch.setattr(Pretrained, "new_engine", new_engine)
    options = ["--quantize=int8", "--port=0", "--max_rows=1", "--max_context=32"]
    with pytest.raises(Loaded) as caught:
        cli.run(["serve", f"--checkpoint={files['llama']}", *options])
    (model,) = caught.value.args
    expected = from_pretrained(folders / "llama", quantize="int8")
    quantized = [
        jax.tree.leaves(of.params["groups"], is_leaf=is_quantized) for of in (model, expected)
    ]
    for leaf, other in zip(*quantized, strict=True):
        assert is_quantized(leaf) == is_quantized(other)
        jax.tree.map(np.testing.assert_array_equal, leaf, other)
    assert sum(map(is_quantized, quantized[0])) == 7  # q, k, v, o, gate, up, down


def edited(file, output, edit=None, fields=None, tensors=None):
    """A copy of a GGUF file with other metadata, other tensors of zeros, or other bytes."""
    header = container.read_header(Place(file))
    about = [(t.name, t.kind, t.shape) for t in header.tensors.values()] + (tensors or [])
    raw = container.header(header.fields | (fields or {}), about)
    data = file.read_bytes()[min(t.start for t in header.tensors.values()) :] + bytes(10_000)
    raw += data
    output.write_bytes(edit(raw) if edit else raw)
    return output


def kind_number(raw):
    name = b"blk.0.attn_v.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8
    return raw[:at] + (23).to_bytes(4, "little") + raw[at + 4 :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edit": lambda raw: b"PK" + raw}, "does not begin with GGUF"),
        ({"edit": lambda raw: raw[:4] + b"\1" + raw[5:]}, "GGUF version 1; .* of version 2 and 3"),
        ({"edit": lambda raw: raw[:3000]}, "truncated or damaged: it has 3000 bytes"),
        ({"edit": lambda raw: raw[:-50_000]}, r"damaged: .* lies at bytes \d+ to \d+ of"),
        ({"edit": kind_number}, r"attn_v.weight has the type IQ4_XS \(23\), which is not"),
        ({"fields": {"general.architecture": "gemma3"}}, "'gemma3'; only llama, hunyuan-dense"),
        (
            {"fields": {"split.count": 3}},
            "is part 1 of 3 .* give the first, of the name NAME-0000",
        ),
        ({"fields": {"llama.expert_count": 8}}, "expert_count = 8; of architecture llama dense"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, "scaling.type = 'yarn' is not impl"),
        ({"fields": {"llama.attention.sliding_window": 9}}, "sliding_window = 9 is not impl"),
        ({"fields": {"llama.attention.head_count_kv": [2, 1]}}, "one positive number for all"),
        ({"fields": {"llama.attention.value_length": 8}}, "value_length = 8; heads of 16"),
        ({"fields": {"llama.block_count": 3}}, "are missing: .*model.layers.2.self_attn.q_proj"),
        ({"tensors": [("rope_freqs.weight", "F32", (8,))]}, "does not have: rope_freqs.weight"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(files, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        open_model(edited(files["llama"], tmp_path / "x.gguf", **changes))
    assert "\n" not in str(caught.value) and "x.gguf" in str(caught.value)


def split(file, folder, num_parts):
    """The parts of a GGUF file as llama-gguf-split writes them, by path."""
    header, raw = container.read_header(Place(file)), file.read_bytes()
    parts, names_of = [], np.array_split(list(header.tensors), num_parts)
    for i, part in enumerate(names_of):
        tensors = [header.tensors[name] for name in part]
        fields = {"split.no": i, "split.count": num_parts}
        fields["split.tensors.count"] = len(header.tensors)
        fields = header.fields | fields if i == 0 else fields
        head = container.header(fields, [(t.name, t.kind, t.shape) for t in tensors])
        data = (raw[t.start : t.start + t.num_bytes] for t in tensors)
        parts.append(folder / f"m-{i + 1:05d}-of-{num_parts:05d}.gguf")
        parts[-1].write_bytes(head + b"".join(d + container.padding(len(d)) for d in data))
    return parts


def test_parts_of_a_model_are_read_as_the_whole(files, tmp_path):
    parts, whole = split(files["llama"], tmp_path, 3), open_model(files["llama"])
    read = open_model(parts[0])
    assert read.cfg == whole.cfg and not set(read.others) ^ set(whole.others)
    for entry in names.entries(read.cfg):
        np.testing.assert_array_equal(read.tensor(entry), whole.tensor(entry), entry.name)
    ours, theirs = load_tokenizer(str(parts[0])), load_tokenizer(str(files["llama"]))
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    with pytest.raises(ConfigError, match="part 2 of 3 of a model; give the first, of the name"):
        open_model(parts[1])
    second = parts[1].read_bytes()
    for path in (parts[0], parts[2], files["llama"]):
        parts[1].write_bytes(path.read_bytes())
        with pytest.raises(ConfigError, match=r"00002-of-00003.gguf: split.*part 2 has \(1, 3"):
            open_model(parts[0])
    parts[1].write_bytes(second.replace(b"blk.0", b"blk.7"))
    with pytest.raises(ConfigError, match="blk.7"):
        open_model(parts[0])
    parts[1].unlink()
    with pytest.raises(ConfigError, match=r"00002-of-00003.gguf is not a file; .* all its parts"):
        open_model(parts[0])


def test_a_ranks_file_is_written_as_tokens_and_merges(tmp_path):
    write_source(tmp_path / "hy", 1, **SIZES | MODELS["hunyuan-moe"] | {"vocab_size": 512})
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"lo", b"he", b"hel", b"ell", b"hello", b" hello", b"12", b"  ", b"\xc3\xb6"]
    lines = b"".join(base64.b64encode(token) + b" 0\n" for token in tokens)
    (tmp_path / "hy/hy.tiktoken").write_bytes(lines)
    export_gguf(tmp_path / "hy", tmp_path / "hy.gguf", "f32")
    theirs, ours = load_tokenizer(tmp_path / "hy"), load_tokenizer(str(tmp_path / "hy.gguf"))
    for text in (TEXT, "hello hello  hellohelell", "ehel lo ohello12\xf6  \n he"):
        for is_parsed in (False, True):
            found = ours.encode(text, parse_special=is_parsed)
            assert found == theirs.encode(text, parse_special=is_parsed), text
            assert ours.decode(found) == theirs.decode(found)
    for name in ("bos_id", "eos_id", "pad_id", "special_names"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert set(theirs.stop_ids) <= set(ours.stop_ids) <= {*theirs.stop_ids, theirs.eos_id}
    write_source(tmp_path / "small", 1, **SIZES | MODELS["hunyuan-moe"])
    (tmp_path / "small/hy.tiktoken").write_bytes(lines)
    with pytest.raises(ConfigError, match="the id 473, and the model's table 384 rows"):
        export_gguf(tmp_path / "small", tmp_path / "small.gguf", "f32")


def test_settings_of_sampling_are_written_under_the_names_of_llama_cpp(folders, tmp_path):
    shutil.copytree(folders / "llama", tmp_path / "llama")
    stated = {"temperature": 0.7, "top_k": 5, "top_p": 0.95, "repetition_penalty": 1.05}
    for is_drawn in (True, False):
        settings = json.dumps(stated | {"do_sample": is_drawn})
        (tmp_path / "llama/generation_config.json").write_text(settings)
        file = tmp_path / f"{is_drawn}.gguf"
        export_gguf(tmp_path / "llama", file, "f32")
        fields = container.read_header(Place(file)).fields
        assert fields["general.sampling.penalty_repeat"] == np.float32(1.05)
        read = read_sampling(model_place(file))
        assert read == stated | ({} if is_drawn else {"temperature": 0.0})


def test_a_tokenizer_of_another_kind_leaves_the_weights(files, tmp_path):
    fields = {"tokenizer.ggml.model": "llama"}
    file = edited(files["llama"], tmp_path / "x.gguf", fields=fields)
    assert from_pretrained(file).logits([[1, 2]]).shape == (1, 2, 384)
    for load in (load_tokenizer, hunyuan_jax.load):
        message = "model 'llama', pre 'qwen2'; 'gpt2' with .*--tokenizer"
        with pytest.raises(ConfigError, match=message):
            load(str(file))


def test_what_cannot_be_written_is_refused_in_one_line(folders, tmp_path):
    (tmp_path / "there.gguf").write_bytes(b"")
    write_source(tmp_path / "cla", 1)
    shutil.copytree(folders / "llama", tmp_path / "split")
    path = tmp_path / "split/tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": None}))
    for source, output, message in (
        (folders / "llama", "there.gguf", "is there already"),
        (folders / "llama", "folder", "a name that ends in .gguf"),
        (tmp_path / "cla", "x.gguf", "no model of this kind .*cla_share_factor = 2"),
        (tmp_path / "split", "x.gguf", "no name for here; .*convert_hf_to_gguf.py"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            export_gguf(source, tmp_path / output, "q8_0")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.gguf").exists()


def test_the_command(folders, tmp_path, capsys):
    options = [f"--checkpoint={folders / 'llama'}", f"--output={tmp_path / 'x.gguf'}"]
    assert flags.run(export, "export", [*options, "--gguf=q4_0"]) == 0
    assert "x.gguf: complete, 0.000 GB" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--adapter and --gguf are two formats"):
        flags.run(export, "export", [*options, "--gguf=q4_0", "--adapter"])
    written = container.read_header(Place(tmp_path / "x.gguf"))
    kinds = {t.name: t.kind for t in written.tensors.values()}
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0" and kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_both_orders_of_rows():
    rows = np.arange(24)[:, None]
    assert gguf_model.neighbours(rows, 2)[:6, 0].tolist() == [0, 6, 1, 7, 2, 8]
    np.testing.assert_array_equal(gguf_model.halves(gguf_model.neighbours(rows, 2), 2), rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_draws_the_same_tokens(files, name):
    """docs/results/quantization.md."""
    llama = pytest.importorskip("xllamacpp")
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(files[name]), 128, 1
    params.n_gpu_layers, params.warmup, params.fit_params, params.verbosity = 0, False, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    lm = hunyuan_jax.load(files[name])
    # An answer lists only tokens that end a character.
    banned = [i for i in range(384) if not lm.tokenizer.decode([i]).isascii()]
    request = {"prompt": [5, 17, 300, 42], "n_predict": 64, "temperature": 0, "logprobs": 1}
    request |= {"ignore_eos": True, "logit_bias": [[i, False] for i in banned]}
    answer = llama.Server(params).handle_completions(request)
    theirs = answer["choices"][0]["logprobs"]["content"]
    ids = np.array([request["prompt"] + [token["id"] for token in theirs]])
    assert ids.shape == (1, 68)
    logits_TV = np.asarray(lm.model.logits(ids))[0, 3:-1].astype(np.float64)
    logits_TV -= np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    given = [token["logprob"] for token in theirs]
    found = np.take_along_axis(logits_TV, ids[0, 4:, None], 1)[:, 0]
    np.testing.assert_allclose(found, given, atol=1e-3)
    # What llama.cpp takes for an end by its name.
    ends = [*lm.tokenizer.stop_ids, lm.tokenizer.special_id("<|endoftext|>")]
    logits_TV[:, banned + ends] = -np.inf
    np.testing.assert_array_equal(np.argmax(logits_TV, -1), ids[0, 4:])
