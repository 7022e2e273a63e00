"""Distillation: the losses, the teacher inside the step, and runs of students.

Letters: B batch, T tokens, D and E widths, V vocabulary.
"""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hunyuan_jax.config import DistillConfig, ObjectiveConfig, without_effect
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.post import distill, masks
from hunyuan_jax.post.build import build_objective
from hunyuan_jax.tokenizer import ByteTokenizer, load_tokenizer
from hunyuan_jax.train import loop, step
from hunyuan_jax.train.pretrain import Pretrain
from hunyuan_jax.train.state import build_program, to_items
from hunyuan_jax.weights.open import open_model
from support import paths, recipes, runs
from support.models import assert_close, fast_jit, mesh_of

# --- Losses


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(p, q):
    return (np.exp(p) * (p - q)).sum(-1)


def test_divergences_are_those_of_the_papers():
    ours, theirs = np.random.default_rng(0).normal(size=(2, 2, 3, 6)).astype(np.float32)
    p, q = log_softmax(theirs / 2), log_softmax(ours / 2)
    for cfg, expected in (
        (DistillConfig(temperature=2.0), 4 * kl(p, q)),
        (DistillConfig(temperature=2.0, divergence="reverse"), 4 * kl(q, p)),
        (DistillConfig(temperature=2.0, top_k=6), 4 * kl(p, q)),
    ):
        np.testing.assert_allclose(distill.divergence(cfg, ours, theirs), expected, rtol=1e-4)

    cfg = DistillConfig(top_k=2)
    p, q = log_softmax(theirs), log_softmax(ours)
    top = np.argsort(-p, -1)[..., :2]
    events = [np.take_along_axis(x, top, -1) for x in (p, q)]
    events = [np.concatenate([x, np.log1p(-np.exp(x).sum(-1, keepdims=True))], -1) for x in events]
    found = distill.divergence(cfg, ours, theirs)
    np.testing.assert_allclose(found, kl(*events), rtol=1e-4)
    assert (found <= kl(p, q)).all()


def test_hidden_states_match_up_to_a_linear_map_and_affinities_up_to_a_rotation():
    hidden, affinity = map(fast_jit, (distill.hidden_distance, distill.affinity_distance))
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=(2, 16, 6)).astype(np.float32)
    weights = np.ones((2, 16), np.float32)
    shifted = hidden(theirs + 1, theirs, weights)
    np.testing.assert_allclose(shifted, 6 / np.square(theirs).sum(-1), rtol=1e-5)
    wider = theirs @ rng.normal(size=(6, 9)).astype(np.float32)
    assert np.mean(hidden(wider, theirs, weights)) < 1e-3
    assert np.mean(hidden(theirs[..., :3], theirs, weights)) > 0.1

    segments = np.repeat([[1, 2, 2, 0]], 4, -1).reshape(1, 16).repeat(2, 0)
    rotated = 3 * theirs @ np.linalg.qr(rng.normal(size=(6, 6)))[0].astype(np.float32)
    np.testing.assert_allclose(affinity(rotated, theirs, segments), 0, atol=1e-5)
    assert np.mean(affinity(theirs[..., :3], theirs, segments)) > 0.1
    alone = affinity(theirs[:, :1, :3], theirs[:, :1], segments[:, :1])
    np.testing.assert_array_equal(alone, 0)


# --- Students

DENSE = paths.ROOT / "tests/golden/hf/dense_bias_untied"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return runs.write_corpus(tmp_path_factory.mktemp("text"))


def config_of(corpus="stdlib", teacher=recipes.FOLDER, **changes):
    """The recipe with a student of one of the teacher's two layers."""
    return recipes.config_of(
        "distill",
        corpus,
        **{
            "train__init_from": "",
            "objective__distill__teacher": str(teacher),
            "model__num_layers": 1,
            "data__validation_fraction": 0.1,
            "schedule__peak_lr": 3e-3,
            "train__num_steps": 4,
            "train__batch_size": 4,
            "train__seq_len": 32,
            "train__log_every": 1,
            "train__eval_every": 2,
            "train__eval_batches": 2,
            "checkpoint__every": 2,
        }
        | changes,
    )


def run(config, workdir):
    with runs.on_one_device():
        assert loop.run(config, workdir, build_objective) == 0


@pytest.mark.heavy
def test_a_student_learns_and_keeps_its_teacher(corpus, tmp_path):
    config = config_of(
        corpus,
        DENSE,
        model__hidden_size=24,
        train__grad_accum_steps=2,
        objective__distill__hidden_weight=0.1,
    )
    run(config, tmp_path)
    rows = runs.rows(tmp_path)
    first, *_, last = [row for row in rows if "loss" in row]
    assert last["divergence"] < first["divergence"]
    parts = 0.1 * first["next_token"] + 0.9 * first["divergence"] + 0.1 * first["hidden"]
    assert first["loss"] == pytest.approx(parts, rel=1e-5)
    first, last = [row for row in rows if "validation_loss" in row]
    assert last["validation_divergence"] < first["validation_divergence"]
    assert 0 <= last["validation_agreement"] <= 1
    assert last["validation_bits_per_byte"] > 0
    assert (open_model(tmp_path).cfg.num_layers, open_model(tmp_path).cfg.hidden_size) == (1, 24)

    (tmp_path / "teacher.txt").write_text("another")
    with pytest.raises(ConfigError, match="holds other weights than the run of .* they were ano"):
        run(config, tmp_path)


@pytest.mark.slow  # two runs
def test_a_stopped_run_continues_to_the_same_bits(corpus, tmp_path):
    changes = {"inherit": "mask", "mask_steps": 2, "inner_weight": 0.1}
    changes = {f"objective__distill__{name}": value for name, value in changes.items()}
    config = config_of(corpus, DENSE, model__hidden_size=24, **changes)
    run(config, tmp_path)
    losses = runs.losses(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/4")
    run(config, tmp_path)
    assert (tmp_path / "checkpoints/4").is_dir()
    assert runs.losses(tmp_path) == losses


def program_of(config, mesh=None, build=build_objective):
    program = build_program(config, mesh or single_device_mesh(), build)
    return program, step.place_batch(program, build_objective(config).random_batch())


def loss_of(config, build=build_objective):
    """The loss of one batch, and its metrics; of a random student."""
    program, batch = program_of(config, build=build)
    objective = program.objective

    def loss(params, batch):
        model = nnx.merge(program.graph_def, params)
        return objective.loss(model, batch, objective.totals(batch), jax.random.key(0))

    found, metrics = fast_jit(loss)(params_of(program), batch)
    return found, metrics.sums


def params_of(program):
    rng = np.random.default_rng(0)

    def fill(spec):
        return jnp.asarray((spec.role == "norm") + 0.3 * rng.normal(size=spec.shape), jnp.float32)

    return jax.tree.map(fill, program.specs)


ALL = {f"objective__distill__{name}_weight": 0.1 for name in ("hidden", "inner", "affinity")}


def test_the_loss_is_that_of_parts_of_rows_and_without_weight_that_of_the_data(monkeypatch):
    found, sums = loss_of(config_of(teacher=DENSE, **ALL))
    parts = {"next_token", "divergence", "agreement", "hidden", "inner", "affinity"}
    assert sums.keys() == parts
    monkeypatch.setattr(distill, "MAX_LOGITS_BYTES", 4 * 4 * 320 * 8)  # rows of 32 in 4 parts
    np.testing.assert_allclose(loss_of(config_of(teacher=DENSE, **ALL))[0], found, rtol=1e-5)
    config = config_of(teacher=DENSE)
    plain = dataclasses.replace(config, objective=ObjectiveConfig())
    expected, _ = loss_of(plain, Pretrain)
    np.testing.assert_allclose(sums["next_token"], expected, rtol=1e-5)

    def shapes(config):
        program = build_program(config, single_device_mesh(), build_objective)
        return jax.tree.map(lambda a: a.shape, to_items(program.state))

    assert shapes(config) == shapes(plain)  # nothing of the teacher is trained or saved


def test_the_layers_of_the_teacher_match_themselves_and_the_gradient_reaches_them_all():
    """The student is the teacher, then the teacher with halved weights."""

    def loss_of_layers(layers):
        config = config_of(
            teacher=DENSE,
            model__num_layers=2,
            objective__distill__inner_weight=2.0,
            objective__distill__weight=0.0,
            objective__distill__inner_layers=layers,
        )
        program, batch = program_of(config)
        objective = program.objective

        def loss(params, batch):
            model = nnx.merge(program.graph_def, params)
            found, metrics = objective.loss(
                model, batch, objective.totals(batch), jax.random.key(0)
            )
            return found - metrics.sums["next_token"]  # which has no gradient there

        return loss, batch

    loss, batch = loss_of_layers(())
    run, teacher = fast_jit(jax.value_and_grad(loss)), batch["teacher"]
    assert abs(run(teacher, batch)[0]) < 1e-5
    assert fast_jit(loss_of_layers((0, 0))[0])(teacher, batch) > 1e-2
    found, grads = run(jax.tree.map(lambda a: a / 2, teacher), batch)
    assert found > 1e-2
    for name in ("wq_DNH", "wo_NHD"):
        assert (np.abs(grads["groups"]["layer_0"]["attn"][name]).max((1, 2, 3)) > 0).all()


def test_layers_are_matched_with_those_that_they_were_or_evenly(tmp_path):
    (tmp_path / "another").symlink_to(DENSE)

    def layers_of(**changes):
        return list(build_objective(config_of(teacher=DENSE, **changes))._inner_layers)

    assert layers_of() == [0]
    assert layers_of(objective__distill__groups=(1,)) == [1]
    assert layers_of(objective__distill__inherit="none") == [1]
    assert layers_of(objective__distill__inherit_from=str(tmp_path / "another")) == [1]
    assert layers_of(objective__distill__inner_layers=(1,)) == [1]


@pytest.mark.slow  # 2 programs with two models each
def test_micro_batches_and_a_mesh_give_the_same_gradient():
    def gradients(mesh, **fields):
        program, batch = program_of(config_of(**fields), mesh)
        shapes = step.abstract_batch(program)
        jax.tree.map(lambda a, b: a.shape == b.shape or pytest.fail(f"{a}"), batch, shapes)
        params = jax.device_put(params_of(program), program.shardings.params)
        compute = fast_jit(functools.partial(step.gradients, program))
        return compute(params, batch, jax.random.key(0))

    whole = gradients(mesh_of(), **ALL)
    split = gradients(mesh_of(data=2), train__grad_accum_steps=2, **ALL)
    np.testing.assert_allclose(split[1], whole[1], rtol=1e-5)
    # Of all parameters together: a router of one expert a token has no gradient but noise.
    together = [
        np.concatenate([np.ravel(a) for a in jax.tree.leaves(x[0])]) for x in (split, whole)
    ]
    assert_close(*together, tolerance=1e-4)


@pytest.mark.slow  # two runs
def test_the_weights_that_matter_most_are_others_than_the_largest(corpus, tmp_path):
    fields = {"model__moe__num_experts": 2, "model__hidden_size": 16, "train__num_steps": 2}
    for rule in ("magnitude", "fisher"):
        run(config_of(corpus, objective__distill__inherit=rule, **fields), tmp_path / rule)
    losses = [runs.losses(tmp_path / rule)[1][0] for rule in ("magnitude", "fisher")]
    assert np.isfinite(losses).all() and losses[0] != losses[1]


def prepared(corpus, workdir, **changes):
    """The objective of a run whose student has fewer columns and groups, by masks."""
    fields = {"objective__distill__inherit": "mask", "model__intermediate_size": 24} | changes
    config = config_of(corpus, DENSE, **fields)
    program = build_program(config, single_device_mesh(), build_objective)
    program.objective.open_stream(load_tokenizer(config.data.tokenizer))
    program.objective.prepare(program, workdir, dict)
    return program.objective


@pytest.mark.heavy
def test_masks_are_learned_once_for_a_run(corpus, tmp_path, monkeypatch):
    changes = {"objective__distill__groups": (1,), "objective__distill__mask_steps": 2}
    found = prepared(corpus, tmp_path, **changes)._masks["groups"]
    assert found.keys() == {"layer_0"}
    dropped, kept = found["layer_0"]["columns"]
    assert np.ptp(dropped) == 0 < np.ptp(kept)  # those of a group that is not kept have no effect
    (file,) = tmp_path.glob("masks-*.npz")

    monkeypatch.setattr(masks, "learn", None)  # is not needed where they are stored
    again = prepared(corpus, tmp_path, **changes)._masks
    np.testing.assert_array_equal(again["groups"]["layer_0"]["columns"], [dropped, kept])
    with pytest.raises(TypeError):
        prepared(corpus, tmp_path, **changes | {"objective__distill__mask_steps": 3})
    assert list(tmp_path.glob("masks-*.npz")) == [file]


def test_the_units_with_the_largest_masks_are_inherited(corpus, tmp_path, monkeypatch):
    def learn(loss, rows, batches, num_steps, key):
        assert len(list(batches)) == num_steps == 3
        return jax.tree.map(
            lambda row: np.arange(np.prod(row.shape), dtype=np.float32).reshape(row.shape), rows
        )

    monkeypatch.setattr(masks, "learn", learn)
    objective = prepared(corpus, tmp_path, objective__distill__mask_steps=3)
    found = objective.initial_weights(single_device_mesh())["groups"]["layer_0"]["mlp"]
    theirs = objective.read_constants(single_device_mesh())["teacher"]["groups"]["layer_0"]["mlp"]
    np.testing.assert_array_equal(found["w_down_FD"][0], theirs["w_down_FD"][1][-24:])
    assert list(objective._inner_layers) == [1]


def test_chats_are_rows_too(tmp_path):
    rows = [{"prompt": f"say {i}", "completion": f"yes {i}"} for i in range(9)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(path, objective__distill__rows="chats")
    objective = build_objective(config)
    stream = objective.open_stream(load_tokenizer(config.data.tokenizer))
    batch = stream.batch(0, np.arange(4))
    assert 0 < batch["loss_weights"].sum() < (batch["segment_ids"] > 0).sum()
    assert objective.eval_spec == objective.batch_spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective__distill__teacher": ""}, "objective.distill.teacher is empty, and this reci"),
        ({"model__vocab_size": 400}, "has a vocabulary of 384, the student one of .* = 400"),
        ({"model__hidden_size": 64}, "hidden_size = 64 is above the 32 of config.objective.dis"),
        ({"train__seq_len": 65, "model__max_position": 80}, "seq_len = 65 is above the 64 posit"),
        ({"objective__distill__inherit_from": str(DENSE)}, "of 384, the student one of .* = 320"),
        (
            {"objective__distill__inner_layers": (2,)},
            r"inner_layers = \(2,\) must name one of the",
        ),
        ({"objective__distill__inner_layers": (0, 1)}, r"teacher's 2 layers, .* each of the stu"),
        ({"objective__distill__top_k": 385}, "top_k = 385 is above config.model.vocab_size = 384"),
    ],
)
def test_what_cannot_be_distilled_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_objective(config_of(**changes))


def test_a_recipe_of_its_own_has_a_teacher_with_its_tokenizer_and_may_inherit_nothing():
    config = config_of()
    unnamed = dataclasses.replace(config, objective=ObjectiveConfig(name="distill"))
    with pytest.raises(ConfigError, match=r"distill.teacher is empty; set it to a model folder"):
        build_objective(unnamed)
    assert config.objective.distill.inherit == "magnitude"
    random = DistillConfig(teacher=config.objective.distill.teacher, inherit="none")
    random = dataclasses.replace(config, objective=ObjectiveConfig(name="distill", distill=random))
    assert build_objective(random).initial_weights(single_device_mesh()) == {}
    with pytest.raises(ConfigError, match="has another tokenizer than config.data.tokenizer"):
        build_objective(config).open_stream(ByteTokenizer())


def test_fields_of_inheritance_that_nothing_reads_are_named():
    for field, changes, is_idle in (
        ("mask_steps", {}, True),
        ("mask_steps", {"objective__distill__inherit": "mask"}, False),
        ("inner_layers", {}, True),
        ("inner_layers", {"objective__distill__inner_weight": 0.1}, False),
    ):
        value = {"mask_steps": 3, "inner_layers": (1,)}[field]
        said = without_effect(config_of(**{f"objective__distill__{field}": value}, **changes))
        assert any(f"config.objective.distill.{field}" in line for line in said) == is_idle

    fields = {"objective__distill__groups": (1,)}
    for changes, is_idle in (
        ({}, False),
        ({"objective__distill__inherit": "none"}, True),
        ({"train__init_from": str(recipes.FOLDER), "model__num_layers": None}, True),
    ):
        said = without_effect(config_of(**fields, **changes))
        assert any("config.objective.distill.groups" in line for line in said) == is_idle
