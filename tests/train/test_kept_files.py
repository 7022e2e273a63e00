"""What a run came from is in its workdir and in everything that is made of it: tokenizer, chat
template, generation config, code.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hunyuan_jax
from hunyuan_jax import from_pretrained
from hunyuan_jax.config import CheckpointConfig, Config, DataConfig, ScheduleConfig, TrainConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.storage import Place
from hunyuan_jax.tokenizer import load_tokenizer
from hunyuan_jax.train import loop, start
from hunyuan_jax.weights import hf_config, side_files, stream
from hunyuan_jax.weights.gguf_export import export_gguf
from hunyuan_jax.weights.open import export_model, open_model
from support import goldens
from support.runs import on_one_device, write_corpus

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
EXTRA = {
    "modeling_hunyuan.py": "code = 1\n",
    "tokenization_hy.py": "code = 2\n",
    "LICENSE": "free\n",
    "special_tokens_map.json": "{}",
}


@pytest.fixture
def origin(tmp_path):
    """A model folder with all that a release has beside its weights, with stop ids 5 and 7."""
    folder = tmp_path / "origin"
    folder.mkdir()
    for path in goldens.folder_of("dense_bias_untied").iterdir():
        if not path.name.startswith("golden"):
            shutil.copyfile(path, folder / path.name)
    for name, text in EXTRA.items():
        (folder / name).write_text(text)
    edit_json(folder / "generation_config.json", eos_token_id=[5, 7])
    return folder


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config_of(origin, tokenizer, **model):
    cfg = hf_config.from_hf(json.loads((origin / "config.json").read_text()))
    cfg = dataclasses.replace(cfg, **({"eos_token_ids": ()} | model))
    return Config(
        cfg,
        data=DataConfig(source="corpus", tokenizer=str(tokenizer)),
        train=TrainConfig(num_steps=1, batch_size=1, seq_len=32, init_from=str(origin)),
        schedule=ScheduleConfig(warmup_steps=0),
        checkpoint=CheckpointConfig(every=1),
    )


def kept(workdir):
    folder = workdir / side_files.FOLDER
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


@pytest.mark.heavy
def test_a_run_and_its_exports_are_whole_wherever_they_are(origin, tmp_path, monkeypatch):
    """Trained with a relative tokenizer; moved; read from elsewhere without its origin."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus")
    with on_one_device():
        assert loop.run(config_of(origin, "origin"), "run") == 0
    stated = load_tokenizer(origin)
    whole = [*TOKENIZER, *EXTRA, "generation_config.json"]
    expected = {name: (origin / name).read_bytes() for name in whole}
    origin.rename(tmp_path / "gone")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    lm = hunyuan_jax.load(tmp_path / "moved")
    assert lm.tokenizer.fingerprint() == stated.fingerprint()
    assert lm.tokenizer.chat_template == stated.chat_template
    assert lm.model.config.eos_token_ids == (5, 7)
    assert lm.recommended["top_k"] == 20
    export_model(tmp_path / "moved", tmp_path / "exported")
    lm.model.save_pretrained(tmp_path / "saved")
    stream.import_model(tmp_path / "exported", tmp_path / "imported")
    from_pretrained(tmp_path / "exported").save_pretrained(tmp_path / "again")
    from_pretrained(tmp_path / "imported").save_pretrained(tmp_path / "last")
    for name in ("exported", "saved", "imported", "again", "last"):
        folder = tmp_path / name
        assert {file: (folder / file).read_bytes() for file in whole} == expected, name
        assert open_model(folder).cfg.eos_token_ids == (5, 7)
    assert json.loads((tmp_path / "exported/config.json").read_text())["eos_token_id"] == [5, 7]


def test_a_gguf_file_is_an_origin_like_a_folder(tmp_path):
    folder, file = goldens.folder_of("dense_alpha_tied"), tmp_path / "origin.gguf"
    export_gguf(folder, file, "f32")
    config = config_of(folder, file)
    start.keep_files(tmp_path / "run", config)
    found = kept(tmp_path / "run")
    train = dataclasses.replace(config.train, init_from=str(file))
    start.keep_files(tmp_path / "run", dataclasses.replace(config, train=train))
    assert found["tokenizer.json"] == kept(tmp_path / "run")["tokenizer.json"]
    ours, theirs = load_tokenizer(tmp_path / "run/model_files"), load_tokenizer(folder)
    assert ours.encode("Hello 12") == theirs.encode("Hello 12")
    assert ours.chat_template == theirs.chat_template


def test_stop_ids_of_a_config_are_kept_where_the_run_states_none(origin, tmp_path):
    (origin / "generation_config.json").unlink()
    edit_json(origin / "config.json", eos_token_id=[5, 7])
    start.keep_files(tmp_path / "run", config_of(origin, "byte"))
    assert json.loads(kept(tmp_path / "run")["generation_config.json"]) == {"eos_token_id": [5, 7]}
    start.keep_files(tmp_path / "run", config_of(origin, "byte", eos_token_ids=(3,)))
    assert "generation_config.json" not in kept(tmp_path / "run")


def test_the_tokenizer_is_that_of_the_training(origin, tmp_path):
    """Not that of the weights' folder, where the two differ."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copyfile(origin / "tokenizer.json", other / "tokenizer.json")
    edit_json(origin / "tokenizer.json", version="1.1")
    shutil.copyfile(origin / "tokenizer_config.json", other / "tokenizer_config.json")
    for tokenizer in (other, other / "tokenizer.json"):
        start.keep_files(tmp_path / "run", config_of(origin, tokenizer))
        found = kept(tmp_path / "run")
        assert found["tokenizer.json"] == (other / "tokenizer.json").read_bytes()
        assert "chat_template.jinja" not in found and "modeling_hunyuan.py" in found
        place = Place(tmp_path / "run" / side_files.FOLDER)
        assert side_files.tokenizer_of(config_of(origin, tokenizer), place) is place


def test_a_ranks_file_alone_keeps_its_built_in_template(origin, tmp_path):
    (tmp_path / "my.tiktoken").write_bytes(b"YQ== 0\n")
    config = config_of(origin, tmp_path / "my.tiktoken")
    start.keep_files(tmp_path / "run", config)
    found = kept(tmp_path / "run")
    assert found["hy.tiktoken"] == b"YQ== 0\n" and "tokenizer.json" not in found
    assert found["chat_template.jinja"] == (origin / "chat_template.jinja").read_bytes()
    name = side_files.tokenizer_of(config, Place(tmp_path / "run" / side_files.FOLDER))
    assert str(name) == str(tmp_path / "run" / side_files.FOLDER / "hy.tiktoken")


def test_weights_that_are_not_finite_are_named_before_the_first_step(origin, tmp_path):
    weights = load_file(origin / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = np.nan
    save_file(weights, origin / "model.safetensors", {"format": "pt"})
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus")
    config = config_of(origin, "byte")
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, source=str(tmp_path / "corpus"))
    )
    with (
        on_one_device(),
        pytest.raises(
            ConfigError, match=r"init_from = .* not finite, in .*wq.*; every step would be skipped"
        ),
    ):
        loop.run(config, tmp_path / "run")


def test_bytes_and_nothing_to_start_from_keep_nothing(origin, tmp_path):
    config = config_of(origin, "byte")
    start.keep_files(tmp_path / "run", config)
    assert kept(tmp_path / "run").keys() == {
        "generation_config.json", "LICENSE", "modeling_hunyuan.py", "tokenization_hy.py"
    }  # fmt: skip
    place = Place(tmp_path / "run" / side_files.FOLDER)
    assert side_files.tokenizer_of(config, place) == "byte"
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=""))
    start.keep_files(tmp_path / "run", config)
    assert kept(tmp_path / "run") == {}
