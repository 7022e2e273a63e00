"""A hub id is a model wherever a folder is: loading, starting a run, import and verify."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import hunyuan_jax
from hunyuan_jax.config import LoraConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.tokenizer import load_tokenizer
from hunyuan_jax.train.start import read_weights
from hunyuan_jax.weights import names, shards
from hunyuan_jax.weights.folder import OfficialFolder
from hunyuan_jax.weights.gguf_file import model_place
from hunyuan_jax.weights.open import open_model
from hunyuan_jax.weights.peft import read_adapter, write_adapter
from support import hub_server
from support.folders import random_params, small, write_source
from support.paths import ROOT


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub with org/name, and the folder that it has it from."""
    source = write_source(tmp_path / "source")
    (source / "hy.tiktoken").write_text("not read here")
    for name in ("pytorch_model.bin", "model.gguf", "README.md"):
        (source / name).write_text("not needed")
    with hub_server.serving() as server:
        server.folders["org/name"] = {"main": source}
        hub_server.point_to(server.endpoint, tmp_path / "cache", monkeypatch)
        yield server, source


def test_only_what_is_needed_is_fetched(served):
    server, source = served
    place = OfficialFolder(model_place("org/name")).place
    assert sorted(place.sizes()) == [
        "config.json",
        "hy.tiktoken",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer_config.json",
    ]
    for name in place.sizes():
        assert place.read(name) == (source / name).read_bytes()
    assert len(server.fetched()) == len(place.sizes())


@pytest.mark.parametrize(
    ("there", "fetched"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["model-00001-of-00001.safetensors", "pytorch_model.bin"], None),
        (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
        (["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"], None),
    ],
)
def test_which_weights_are_fetched(served, there, fetched):
    """`fetched` is what is fetched of `there`, None if that is the first file alone."""
    source = served[1]
    for path in [*source.glob("model*"), source / "pytorch_model.bin"]:
        path.unlink()
    for name in there:
        (source / name).write_text(json.dumps({"weight_map": {"a": there[0]}}))
    place = model_place("org/name")
    shards.fetch(place)
    weights = {name for name in place.sizes() if not name.endswith(".json")}
    assert weights == {*(fetched or there[:1]), "hy.tiktoken"}


def test_a_model_that_cannot_be_loaded_is_refused_before_its_weights_are_fetched(served):
    server, source = served
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(ConfigError, match="bert"):
        open_model("org/name")
    assert not any(name.endswith(".safetensors") for name in server.fetched())


def test_a_hub_id_is_loaded_and_trained_from(served):
    source = served[1]
    ids = np.arange(6)[None]
    expected, actual = (hunyuan_jax.from_pretrained(path) for path in (source, "org/name"))
    np.testing.assert_array_equal(actual.logits(ids), expected.logits(ids))
    weights = read_weights("hf://org/name@main", expected.config, single_device_mesh())
    jax.tree.map(np.testing.assert_array_equal, weights, expected.params)


def test_an_adapter_and_a_tokenizer_on_the_hub(served, tmp_path):
    server, source = served
    cfg = small(lora=LoraConfig(rank=2, alpha=4.0, targets=("q",)))
    write_adapter(tmp_path / "adapter", cfg, random_params(cfg), "org/name@v2")
    noted = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (noted["base_model_name_or_path"], noted["revision"]) == ("org/name", "v2")
    server.folders["org/adapter"] = {"main": tmp_path / "adapter"}
    found, _ = read_adapter("org/adapter", small(), names.entries(small()))
    assert found.lora == cfg.lora
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    assert load_tokenizer("org/name").encode("a") == [0]
    assert not any(name.endswith(".safetensors") for name in server.fetched()[2:])


@pytest.mark.heavy
def test_import_and_verify_in_a_process_of_their_own(served, tmp_path):
    environment = os.environ | {
        "HF_ENDPOINT": served[0].endpoint,
        "HF_HUB_CACHE": str(tmp_path / "fresh"),
        "PYTHONPATH": str(ROOT),
    }

    def convert(*words):
        command = [sys.executable, str(ROOT / "convert_torch.py"), *words]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    output = tmp_path / "converted"
    done = convert("import", "--source=org/name", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert convert("verify", "--source=hf://org/name", f"--checkpoint={output}").returncode == 0
    missing = convert("import", "--source=org/none", f"--output={tmp_path / 'none'}")
    assert missing.returncode == 2
    assert missing.stderr.splitlines()[-1].startswith("error: org/none does not exist")
    assert not Path(tmp_path / "none").exists()
