"""What is at a path: runs, converted checkpoints and official folders answer the same questions,
and an official folder is one model however its tensors are stored.
"""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from hunyuan_jax import from_pretrained
from hunyuan_jax.checkpoint import manifest, store
from hunyuan_jax.config import Config, TrainConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.train.state import build_program, to_items
from hunyuan_jax.weights import names, stream, verify
from hunyuan_jax.weights.open import export_model, open_model
from support.folders import HF, contents, small, tensors_of, write_source

NUM_EXPERTS = HF["num_experts"]


def split_experts(tensors, layer):
    """[E, 2 F, D] and [E, D, F] of the experts of a layer, which are taken out of `tensors`."""
    gate, up, down = (
        np.stack(
            [
                tensors.pop(f"model.layers.{layer}.mlp.experts.{e}.{kind}_proj.weight")
                for e in range(NUM_EXPERTS)
            ]
        )
        for kind in ("gate", "up", "down")
    )
    return {"gate_up_proj": np.concatenate([gate, up], axis=1), "down_proj": down}


def fused(tensors):
    """Experts as transformers 5 saves them."""
    for layer in range(HF["num_hidden_layers"]):
        parts = split_experts(tensors, layer)
        tensors |= {f"model.layers.{layer}.mlp.experts.{k}": v for k, v in parts.items()}
    return tensors


def fp8(tensors):
    """Each projection of layer 1 in FP8 with a factor of its own, and what it then is."""
    held = {}
    for i, name in enumerate(n for n in list(tensors) if ".layers.1." in n and "_proj." in n):
        factor = np.float32(2.0 ** -(i % 5) * 1.25)
        values = (tensors[name] / factor).astype(ml_dtypes.float8_e4m3fn)
        held |= {name: values, name.removesuffix("weight") + "weight_scale": np.array(factor)}
        tensors[name] = values.astype(np.float32) * factor
    return tensors | held, tensors


def write_as(folder, tensors, kind, **hf):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF | hf))
    if kind == "safetensors":
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    torch = pytest.importorskip("torch")
    as_torch = {}
    for name, array in tensors.items():
        is_fp8 = array.dtype == ml_dtypes.float8_e4m3fn
        tensor = torch.from_numpy(array.view(np.uint8).copy() if is_fp8 else array.copy())
        as_torch[name] = tensor.view(torch.float8_e4m3fn) if is_fp8 else tensor
    torch.save(as_torch, folder / "pytorch_model.bin")
    return folder


@pytest.mark.cases(2)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("storage", ["fused", "fp8"])
@pytest.mark.heavy
def test_each_way_of_storing_is_read_in_memory_and_streamed(tmp_path, storage, kind):
    plain = tensors_of(write_source(tmp_path / "source"))
    options = {}
    if storage == "fused":
        held, values = fused(dict(plain)), plain
    else:
        held, values = fp8(dict(plain))
        options = {"quantization_config": {"quant_method": "fp8"}}
    folder = write_as(tmp_path / "held", held, kind, **options)
    expected = from_pretrained(write_as(tmp_path / "plain", values, "safetensors")).params

    jax.tree.map(np.testing.assert_array_equal, from_pretrained(folder).params, expected)
    stream.import_model(folder, tmp_path / "ours")
    jax.tree.map(
        np.testing.assert_array_equal, from_pretrained(tmp_path / "ours").params, expected
    )
    assert verify.verify(folder, tmp_path / "ours") == []
    for i, model in enumerate((folder, tmp_path / "ours")):
        export_model(model, tmp_path / f"back-{i}")
        back = tensors_of(tmp_path / f"back-{i}")
        assert back.keys() == values.keys()
        for name, tensor in values.items():
            np.testing.assert_array_equal(back[name], tensor, strict=True)


@pytest.fixture
def run(tmp_path):
    """The workdir of a run, with a checkpoint of random numbers."""
    cfg = small(dtype="bfloat16")
    config = Config(cfg, train=TrainConfig(seq_len=32))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda a: jax.device_put(rng.normal(size=a.shape).astype(a.dtype), a.sharding),
        build_program(config, single_device_mesh()).state,
    )
    store.claim_workdir(tmp_path / "run", config)
    saving = store.Store(tmp_path / "run", config.checkpoint, print)
    saving.save(3, to_items(state), manifest.facts(config, {}, {"row": 7}, None))
    saving.close()
    return tmp_path / "run"


def test_three_sources_answer_the_same_questions(run, tmp_path):
    export_model(run, tmp_path / "official")
    stream.import_model(tmp_path / "official", tmp_path / "converted")
    models = {name: open_model(tmp_path / name) for name in ("run", "official", "converted")}
    assert models["run"].tokenizer == "byte"
    for name in ("official", "converted"):
        assert str(models[name].tokenizer) == str(tmp_path / name)
    assert models["run"].layout is None
    assert models["official"].layout == models["converted"].layout
    for dtype in (None, "float32", "bfloat16"):
        opened = [open_model(tmp_path / name, dtype) for name in models]
        assert {model.cfg.dtype for model in opened} == {dtype or "bfloat16"}
    for entry in names.entries(models["run"].cfg):
        tensors = [model.tensor(entry) for model in models.values()]
        for tensor in tensors[1:]:
            np.testing.assert_array_equal(tensor, tensors[0], strict=True)


def test_an_official_folder_is_exported_as_it_is(tmp_path):
    source = write_source(tmp_path / "source", num_shards=3)
    assert export_model(source, tmp_path / "copy") == 3
    assert contents(tmp_path / "copy") == contents(source)


def test_an_export_continues_and_is_not_written_over_something_else(run, tmp_path):
    assert export_model(run, tmp_path / "out") == 1
    with pytest.raises(ConfigError, match=r"out is not empty: .*; use another --output"):
        export_model(run, tmp_path / "out")
    expected = contents(tmp_path / "out")
    (tmp_path / "out/config.json").unlink()
    claim = {"fingerprint": open_model(run).fingerprint, "dtype": "bfloat16"}
    (tmp_path / "out/export.json").write_text(json.dumps(claim))
    assert export_model(run, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == expected
    (tmp_path / "out/export.json").write_text(json.dumps(claim | {"fingerprint": "another"}))
    with pytest.raises(ConfigError, match="an unfinished export of another checkpoint"):
        export_model(run, tmp_path / "out")
