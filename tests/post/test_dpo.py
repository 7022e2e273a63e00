"""Preferences: their rows, the losses, and runs that begin at exactly ln 2.

Letters: B batch, T tokens, Q pairs of a row.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DpoConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    ScheduleConfig,
    TrainConfig,
)
from hunyuan_jax.data import examples, pairs
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.params import abstract
from hunyuan_jax.post.build import build_objective
from hunyuan_jax.post.dpo import preference_loss
from hunyuan_jax.tokenizer import ByteTokenizer
from hunyuan_jax.train import loop, step
from hunyuan_jax.train.state import build_program, from_items, init_state, to_items
from hunyuan_jax.weights.open import open_model
from support import runs
from support.models import assert_close, fast_jit

LENGTH = 64
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


# --- Rows

USER = {"role": "user", "content": "q"}


def tokenizer():
    found = ByteTokenizer()
    found.named_tokens = {}
    found.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }}<|eos|>{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    return found


def said(content):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [said("A")], "rejected": [said("BC")]},
        {"prompt": [USER], "chosen": "A", "rejected": "BC"},
        {"chosen": [USER, said("A")], "rejected": [USER, said("BC")]},
    ],
)
def test_every_spelling_of_a_pair_is_one_prompt_and_two_answers(row):
    answers = pairs.pair_of(row, tokenizer())
    assert [tokenizer().decode(text.ids) for text in answers] == [
        "uq<|eos|>aA<|eos|>",
        "uq<|eos|>aBC<|eos|>",
    ]
    assert [tokenizer().decode(text.ids[text.is_learned]) for text in answers] == [
        "A<|eos|>",
        "BC<|eos|>",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "a row has 'prompt', 'chosen' and 'rejected'; this one has"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
        ({"chosen": "a", "rejected": "b"}, "there is no prompt"),
        ({"chosen": [USER], "rejected": [said("a")]}, "begin with different messages"),
        ({"chosen": [USER, said("a")], "rejected": [USER]}, "the chat is empty"),
    ],
)
def test_a_pair_that_cannot_be_used_says_why(row, message):
    with pytest.raises(ValueError, match=message):
        pairs.pair_of(row, tokenizer())


# --- Losses


def test_losses_are_those_of_the_papers():
    ratio = np.array([[[2.0, -1.0], [-3.0, 0.5]]], np.float32)
    length = np.array([[[2.0, 4.0], [3.0, 1.0]]], np.float32)
    margin = 0.5 * (ratio[..., 0] - ratio[..., 1])
    log_sigmoid = -np.log1p(np.exp(-margin))
    for cfg, expected in (
        (DpoConfig(beta=0.5), -log_sigmoid),
        (
            DpoConfig(beta=0.5, label_smoothing=0.2),
            -0.8 * log_sigmoid + 0.2 * np.log1p(np.exp(margin)),
        ),
        (DpoConfig(beta=0.5, loss="hinge"), np.maximum(1 - margin, 0)),
        (
            DpoConfig(beta=0.5, loss="ipo"),
            (ratio[..., 0] / length[..., 0] - ratio[..., 1] / length[..., 1] - 1.0) ** 2,
        ),
    ):
        np.testing.assert_allclose(preference_loss(cfg, ratio, length), expected, rtol=1e-5)


PLAIN = DpoConfig()


def config_for(dpo=PLAIN, model=MODEL, source="stdlib", **train):
    return Config(
        model=model,
        data=DataConfig(source=str(source), validation_fraction=0.2),
        objective=ObjectiveConfig(name="dpo", dpo=dpo),
        schedule=ScheduleConfig(warmup_steps=0, peak_lr=1e-2),
        train=TrainConfig(
            **{"num_steps": 4, "batch_size": 4, "seq_len": LENGTH, "log_every": 1} | train
        ),
        checkpoint=CheckpointConfig(every=2, keep=2),
    )


def stream_of(config, rows_of_one=False):
    rng = np.random.default_rng(0)

    def text():
        ids = rng.integers(0, 256, rng.integers(4, 16))
        return examples.text_of(ids, np.arange(len(ids)) >= 2)

    kept = [examples.Example(str(i), (text(), text())) for i in range(12)]
    found = examples.Examples(kept, 0, ("", 0), None)
    data = dataclasses.replace(config.data, validation_fraction=0.0)
    stream = pairs.PackedPairs(found, data, config.train, 0, pairs.max_pairs(LENGTH))
    rows = [row for row in stream.training if row]
    return stream, [[pair] for row in rows for pair in row] if rows_of_one else rows


@functools.cache
def params(rank=0):
    model = dataclasses.replace(MODEL, lora=LoraConfig(rank=rank))
    program = build_program(config_for(model=model), single_device_mesh(), build_objective)
    return jax.tree.map(np.asarray, init_state(program).params)


def gradients(config, batch, rank=0):
    program = build_program(config, single_device_mesh(), build_objective)
    compute = fast_jit(functools.partial(step.gradients, program))
    return compute(params(rank), step.place_batch(program, batch), jax.random.key(0))


@pytest.mark.heavy
def test_packed_pairs_and_micro_batches_give_the_gradient_of_one_pair_a_row():
    dpo = DpoConfig(sft_weight=0.3, beta=0.7)
    padded, packed = config_for(dpo, batch_size=16), config_for(dpo, batch_size=8)
    stream, rows = stream_of(padded, rows_of_one=True)
    rng = np.random.default_rng(1)
    reference = {row[0].name: rng.normal(-5, 0.3, (2, 16)) for row in rows}

    def with_reference(batch, rows):
        for r, row in enumerate(rows):
            start = 0
            for pair in row:
                for side, text in enumerate(pair.texts):
                    here = slice(start, start + len(text.ids) - 1)
                    values = reference[pair.name][side, : len(text.ids) - 1]
                    batch["reference"][r, here] = values * batch["loss_weights"][r, here]
                    start = here.stop
        return batch

    one_a_row = with_reference(stream.stack([*rows, *[[]] * (16 - len(rows))]), rows)
    stream, rows = stream_of(packed)
    assert 3 <= len(rows) <= 8 and max(map(len, rows)) == 2
    together = with_reference(stream.stack([*rows, *[[]] * (8 - len(rows))]), rows)
    whole = gradients(padded, one_a_row)
    split = dataclasses.replace(packed.train, grad_accum_steps=8)
    for other in (
        gradients(packed, together),
        gradients(dataclasses.replace(packed, train=split), together),
    ):
        np.testing.assert_allclose(other[1], whole[1], rtol=1e-5)
        jax.tree.map(functools.partial(assert_close, tolerance=1e-4), other[0], whole[0])
        assert other[2].sums.keys() == whole[2].sums.keys()
        for name, value in whole[2].sums.items():
            np.testing.assert_allclose(other[2].sums[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.heavy
def test_the_reference_with_adapters_off_is_the_frozen_model():
    model = dataclasses.replace(MODEL, lora=LoraConfig(rank=2))
    off = config_for(DpoConfig(reference="adapter_off"), model, batch_size=8)
    stream, rows = stream_of(off)
    _, loss, metrics = gradients(off, stream.stack([*rows, *[[]] * (8 - len(rows))]), rank=2)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(metrics.sums["rewards/chosen"], 0, atol=1e-5)


# --- A run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rows = [
        {"prompt": f"{i}?", "chosen": "yes", "rejected": "no " * (1 + i % 5)} for i in range(20)
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(config, workdir):
    with runs.on_one_device():
        assert loop.run(config, workdir, build_objective) == 0


@pytest.mark.heavy
def test_a_run_begins_at_ln_2_learns_and_is_used_by_its_moving_average(source, tmp_path):
    config = config_for(source=source, ema_decay=0.5, eval_every=2)
    run(config, tmp_path / "whole")
    [stored] = source.parent.glob(".reference-*.npy")
    assert np.load(stored).shape[1] == LENGTH
    first, *_, last = [row for row in runs.rows(tmp_path / "whole") if "loss" in row]
    assert first["loss"] == np.float32(np.log(2))
    for name in ("chosen", "rejected", "margins"):
        assert abs(first[f"rewards/{name}"]) < 1e-7  # exactly 0 without the tests' XLA flags
    assert last["rewards/margins"] > 0 and last["rewards/accuracies"] > 0.5
    validated = [row for row in runs.rows(tmp_path / "whole") if "validation_loss" in row]
    assert validated[-1]["validation_margin"] > validated[0]["validation_margin"]

    before = stored.stat().st_mtime_ns
    plain = config_for(source=source, eval_every=2)
    run(plain, tmp_path / "plain")
    assert runs.losses(tmp_path / "plain") == runs.losses(tmp_path / "whole")
    assert stored.stat().st_mtime_ns == before  # the same weights and data: not computed again
    read = [open_model(str(tmp_path / name)) for name in ("plain", "whole")]
    assert read[0].cfg == read[1].cfg
    mesh = single_device_mesh()
    shardings = abstract.shardings(abstract_model(read[0].cfg, mesh)[1])
    raw, mean = (jax.tree.leaves(model.read(shardings)) for model in read)
    assert any(not np.array_equal(a, b) for a, b in zip(raw, mean, strict=True))


@pytest.mark.slow  # three runs
def test_a_stopped_run_continues_to_the_same_bits(source, tmp_path):
    config = config_for(source=source, ema_decay=0.5)
    run(config, tmp_path / "whole")
    shorter = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, num_steps=2),
        schedule=dataclasses.replace(config.schedule, num_steps=4),
    )
    run(shorter, tmp_path / "parts")
    run(config, tmp_path / "parts")
    assert runs.losses(tmp_path / "parts") == runs.losses(tmp_path / "whole")


def test_the_moving_average_changes_places_with_the_weights_in_a_checkpoint():
    config = config_for(model=dataclasses.replace(MODEL, lora=LoraConfig(rank=2)), ema_decay=0.9)
    state = init_state(build_program(config, single_device_mesh(), build_objective))
    state = state._replace(ema=jax.tree.map(lambda a: a + 1, state.ema))
    items = to_items(state)
    jax.tree.map(np.testing.assert_array_equal, from_items(items), state)
    total = lambda tree: float(sum(jnp.abs(a).sum() for a in jax.tree.leaves(tree)))  # noqa: E731
    assert total(items["params"]) != total(state.params)
    assert "ema" not in to_items(state._replace(ema={}))["optimizer"]
