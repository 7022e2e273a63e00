"""Adapters beside a base in few bits: the loss of LoRA over the same numbers, and runs that stop,
continue and are read.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from hunyuan_jax import from_pretrained
from hunyuan_jax.config import Config, LoraConfig, ModelConfig, ScheduleConfig, TrainConfig
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.params.tree import join, split
from hunyuan_jax.post.build import build_objective
from hunyuan_jax.quant.array import is_quantized
from hunyuan_jax.quant.scaled import load_params
from hunyuan_jax.storage import Place
from hunyuan_jax.train import loop, step
from hunyuan_jax.train.start import read_weights
from hunyuan_jax.train.state import build_program, init_state
from hunyuan_jax.weights import few_bits, names
from hunyuan_jax.weights.open import export_model, open_model
from hunyuan_jax.weights.run import Run
from support import folders, recipes, runs
from support.models import assert_close, fast_jit, mesh_of

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"{i}?", "chosen": "yes", "rejected": "no " * (1 + i % 3)} for i in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(source, quantize="int4", **changes):
    return recipes.config_of(
        "dpo",
        source,
        **{
            "model__lora__rank": 2,
            "model__lora__targets": TARGETS,
            "model__lora__quantize": quantize,
            "model__remat": "full",
            "model__dtype": "float32",
            "objective__dpo__reference": "adapter_off",
            "data__tokenizer": "byte",
            "data__validation_fraction": 0.0,
            "train__seq_len": 64,
            "train__batch_size": 2,
            "train__num_epochs": 0.0,
            "train__num_steps": 2,
            "train__ema_decay": 0.0,
            "schedule__peak_lr": 1e-2,
            "checkpoint__every": 1,
            **changes,
        },
    )


MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=16,
    remat="full",
    lora=LoraConfig(rank=2, targets=TARGETS, quantize="int4"),
)


def small(**model):
    return Config(
        model=dataclasses.replace(MODEL, **model),
        train=TrainConfig(batch_size=2, seq_len=16, init_from="somewhere"),
        schedule=ScheduleConfig(warmup_steps=0),
    )


def gradients(config, params, batch, mesh):
    program = build_program(config, mesh)
    compute = fast_jit(lambda p, b: step.gradients(program, p, b, jax.random.key(0)))
    grads, loss, _ = compute(params, step.place_batch(program, batch))
    return grads, float(loss)


@pytest.mark.cases(1)
@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.heavy
def test_the_loss_is_that_of_adapters_over_the_same_numbers(num_shards):
    mesh, config = mesh_of(data=num_shards), small()
    program = build_program(config, mesh)
    cfg = dataclasses.replace(MODEL, lora=LoraConfig())
    tensor = few_bits.of_params(folders.random_params(cfg))
    specs = abstract_model(cfg, mesh)[1]
    entries = names.entries(cfg)
    weights = few_bits.read(
        entries, cfg.dtype, specs, "int4", tensor, lambda entry: None, is_frozen=True
    )
    state = init_state(program, weights)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), program.state)
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), state)
    adapters, base = split(state.params, program.specs)
    assert sum(map(is_quantized, jax.tree.leaves(base, is_leaf=is_quantized))) == 7
    # B is zero at first, and nothing would reach A.
    params = join(base, jax.tree.map(lambda a: a + 0.02, adapters))
    batch = program.objective.random_batch()
    grads, loss = gradients(config, params, batch, mesh)
    plain = small(lora=dataclasses.replace(MODEL.lora, quantize="none"))
    expected, expected_loss = gradients(plain, load_params(params), batch, mesh)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), grads, expected)


def log_probs(logits):
    return np.asarray(jax.nn.log_softmax(logits.astype(np.float32)))


def own_log_probs(workdir, ids_BS):
    """Those of the run's program: adapters beside codes."""
    run, mesh = Run(Place(workdir)), single_device_mesh()
    program = build_program(run.config, mesh, build_objective)
    params = run._restore(run._target(run.config.model, mesh))
    assert any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))

    positions_BS = np.broadcast_to(np.arange(ids_BS.shape[1], dtype=np.int32), ids_BS.shape)

    def logits(model, _):
        return model.logits(model(ids_BS, positions_BS, np.ones_like(ids_BS)).hidden_BTD)

    batch = step.place_batch(program, program.objective.random_batch())
    return log_probs(step.make_outputs_step(program, logits)(params, batch)[0][: len(ids_BS)])


@pytest.mark.slow
def test_a_run_is_stopped_continues_and_is_read(source, tmp_path, capsys):
    def run(workdir, **changes):
        with runs.on_one_device():
            assert loop.run(config_of(source, **changes), workdir, build_objective) == 0

    run(tmp_path / "whole")
    assert "base in int4" in capsys.readouterr().err
    run(tmp_path / "parts", train__num_steps=1, schedule__num_steps=2)
    run(tmp_path / "parts")
    assert runs.losses(tmp_path / "parts") == runs.losses(tmp_path / "whole")
    first, last = runs.losses(tmp_path / "whole").values()
    assert first != last

    opened = open_model(str(tmp_path / "whole"))
    assert opened.cfg.lora == LoraConfig()
    found = from_pretrained(tmp_path / "whole").params
    config = config_of(source)
    base = load_params(read_weights(config.train.init_from, config.model, single_device_mesh()))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found, base)
    assert moved["embed"]["embedding_VD"] == 0
    assert 0 < max(jax.tree.leaves(moved)) < 0.1

    ids_BS = np.random.default_rng(0).integers(1, 200, (2, 12), np.int32)
    export_model(str(tmp_path / "whole"), str(tmp_path / "folder"))
    exported = log_probs(from_pretrained(tmp_path / "folder").logits(ids_BS))
    np.testing.assert_allclose(exported, own_log_probs(tmp_path / "whole", ids_BS), atol=1e-4)
