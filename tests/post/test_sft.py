"""Fine-tuning on chats: from a model folder to a run that answers, exactly."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from hunyuan_jax.cli import complete
from hunyuan_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    ScheduleConfig,
    TrainConfig,
    from_config_dict,
    to_dict,
)
from hunyuan_jax.data import examples
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer.text import load
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.post.build import build_objective
from hunyuan_jax.train import loop, step
from hunyuan_jax.train.start import read_weights
from hunyuan_jax.train.state import build_program, init_state
from support import paths, recipes, runs
from support.models import assert_close, fast_jit

FOLDER = recipes.FOLDER
LENGTH = 16
MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    max_position=LENGTH,
)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"yes {i} " * (1 + i % 4)},
            ]
        }
        for i in range(24)
    ]
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"messages": []}\n')
    return path


def recipe(chats, **changes):
    """The recipe, set for a quick run."""
    quick = {
        "train__seq_len": 64,
        "train__batch_size": 2,
        "train__eval_every": 2,
        "data__validation_fraction": 0.2,
        "checkpoint__every": 2,
    }
    return recipes.recipe_of("sft", chats, **quick | changes)


# --- The recipe


def test_a_recipe_takes_model_tokenizer_and_length_from_the_weights(chats):
    config = from_config_dict(recipe(chats, train__seq_len=None), complete)
    found = json.loads((FOLDER / "config.json").read_text())
    assert config.model.hidden_size == found["hidden_size"]
    assert config.model.moe.num_experts > 1 and config.model.hidden_dropout == 0.2
    assert config.train.seq_len == found["max_position_embeddings"] < 4096
    assert config.data.tokenizer == str(FOLDER)
    assert from_config_dict(to_dict(config)) == config


def test_an_override_may_not_change_what_the_weights_mean(chats):
    changed = recipe(chats, model__max_position=128, model__lora__rank=2, data__tokenizer="byte")
    config = from_config_dict(changed, complete)
    assert (config.model.max_position, config.model.lora.rank) == (128, 2)
    assert config.data.tokenizer == "byte"
    with pytest.raises(ConfigError, match=r"rope_theta = 10000\.0; config\.model\.rope_theta is"):
        from_config_dict(recipe(chats, model__rope_theta=5.0), complete)
    with pytest.raises(ConfigError, match=r"config\.train\.init_from is empty, and this recipe"):
        from_config_dict(recipe(chats, train__init_from=""), complete)
    with pytest.raises(ConfigError, match=r"nowhere"):
        from_config_dict(recipe(chats, train__init_from="nowhere"), complete)


# --- A run


def run(config, workdir):
    with runs.on_one_device():
        return loop.run(config, workdir, build_objective)


@pytest.fixture(scope="module")
def finished(chats, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = from_config_dict(recipe(chats, schedule__peak_lr=1e-2), complete)
    assert run(config, workdir) == 0
    return workdir, config


def test_a_run_passes_its_data_as_often_as_planned_and_learns(finished):
    workdir, config = finished
    rows = runs.rows(workdir)
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["train"]["num_steps"] == max(row["step"] for row in rows) > 4
    assert saved["train"]["num_epochs"] == config.train.num_epochs == 3
    validated = [row for row in rows if "validation_loss" in row]
    assert validated[-1]["validation_loss"] < validated[0]["validation_loss"]
    assert 0 <= validated[-1]["validation_token_accuracy"] <= 1
    trained = [row for row in rows if "loss" in row]
    assert {"mean_token_accuracy", "entropy", "num_tokens"} <= trained[-1].keys()
    assert trained[-1]["entropy"] <= np.log(config.model.vocab_size)
    assert trained[-1]["num_tokens"] <= 2 * 64


def test_a_run_is_chatted_with_by_the_tokenizer_and_template_of_its_base(finished):
    lm = load(str(finished[0]))
    assert lm.tokenizer.chat_template == (FOLDER / "chat_template.jinja").read_text()
    assert lm.tokenizer.fingerprint() == load(str(FOLDER)).tokenizer.fingerprint()


@pytest.mark.heavy
def test_a_stopped_run_continues_to_the_same_bits(finished, tmp_path):
    workdir, config = finished
    first = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, num_epochs=0.0, num_steps=4),
        schedule=dataclasses.replace(config.schedule, num_steps=_num_steps(workdir)),
    )
    assert run(first, tmp_path / "parts") == 0
    assert run(config, tmp_path / "parts") == 0
    whole, parts = runs.losses(workdir), runs.losses(tmp_path / "parts")
    assert whole == parts


def _num_steps(workdir):
    return json.loads((workdir / "config.json").read_text())["train"]["num_steps"]


def test_the_data_of_a_run_may_not_change(finished, tmp_path):
    workdir, config = finished
    text = (
        Path(config.data.source).read_text()
        + json.dumps({"prompt": "a", "completion": "b"})
        + "\n"
    )
    (tmp_path / "more.jsonl").write_text(text)
    data = dataclasses.replace(config.data, source=str(tmp_path / "more.jsonl"))
    with pytest.raises(ConfigError, match=r"the text of config\.data has changed"):
        run(dataclasses.replace(config, data=data), workdir)


def test_a_recipe_takes_its_model_from_another_recipe_to_be_planned():
    preset = str(paths.ROOT / "configs/a52b.py")
    config = recipes.config_of("sft", "chats.jsonl", train__init_from=preset)
    assert config.model.hidden_size == 6400 and config.model.moe.aux_loss_weight == 0.01
    assert config.model.hidden_dropout == 0.2 and config.train.seq_len == 4096
    assert config.data.tokenizer == "hy.tiktoken"
    with pytest.raises(ConfigError, match=r"a52b\.py' is a recipe, which has no weights; set"):
        read_weights(preset, config.model, single_device_mesh())
    with pytest.raises(ConfigError, match=r"init_from = 'none\.py': no such file"):
        recipes.config_of("sft", "chats.jsonl", train__init_from="none.py")


# --- The loss


def config_for(**train):
    return Config(
        model=MODEL,
        data=DataConfig(validation_fraction=0.0),
        objective=ObjectiveConfig(name="sft"),
        schedule=ScheduleConfig(warmup_steps=0),
        train=TrainConfig(**{"num_steps": 2, "batch_size": 8, "seq_len": LENGTH} | train),
    )


def stream_of(config, max_examples=99):
    rng = np.random.default_rng(0)

    def text():
        ids = rng.integers(0, 300, rng.integers(3, 9))
        return examples.text_of(ids, rng.random(len(ids)) < 0.6)

    kept = [examples.Example(str(i), (text(),)) for i in range(16)]
    found = examples.Examples(kept, 0, ("", 0), None)
    return examples.PackedExamples(found, config.data, config.train, 0, max_examples)


def gradients(config, batch):
    program = build_program(config, single_device_mesh(), build_objective)
    compute = fast_jit(functools.partial(step.gradients, program))
    placed = step.place_batch(program, batch)
    return compute(params(), placed, jax.random.key(0))


@functools.cache
def params():
    program = build_program(config_for(), single_device_mesh(), build_objective)
    return jax.tree.map(np.asarray, init_state(program).params)


@pytest.mark.heavy
def test_packed_rows_and_micro_batches_give_the_gradient_of_one_example_a_row():
    packed, padded = config_for(), config_for(batch_size=16)
    one_a_row = stream_of(padded, max_examples=1).batch(0)
    rows = stream_of(packed).training
    assert len(rows) <= 8
    together = stream_of(packed).stack([*rows, *[[]] * (8 - len(rows))])
    counts = together["loss_weights"].sum(1)
    assert len(set(counts.tolist())) > 3  # a mean of the rows' means would be another loss
    whole = gradients(padded, one_a_row)
    for other in (
        gradients(packed, together),
        gradients(config_for(grad_accum_steps=8), together),
    ):
        np.testing.assert_allclose(other[1], whole[1], rtol=1e-6)
        jax.tree.map(functools.partial(assert_close, tolerance=1e-5), other[0], whole[0])
        for name in ("mean_token_accuracy", "entropy", "num_tokens"):
            np.testing.assert_allclose(other[2].sums[name], whole[2].sums[name], rtol=1e-5)
