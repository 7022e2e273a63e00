"""Parameters of a run without its optimizer: the same arrays, straight onto a mesh, and no more
memory than they take.
"""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from hunyuan_jax.checkpoint import manifest, store
from hunyuan_jax.config import (
    Config,
    LoraConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
)
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.layers import lora
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.params import abstract
from hunyuan_jax.params.tree import split
from hunyuan_jax.quant.scaled import load_params
from hunyuan_jax.report import page
from hunyuan_jax.storage import Place
from hunyuan_jax.train.state import build_program, to_items
from hunyuan_jax.weights.run import Run
from support import paths, processes
from support.models import assert_close, mesh_of

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    max_position=256,
    cla_share_factor=2,
    moe=MoeConfig(num_experts=2, num_shared_experts=1, dispatch="recycle"),
)


def save(workdir, config):
    """A checkpoint of random numbers; returns its parameters."""
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda a: jax.device_put(rng.normal(size=a.shape).astype(a.dtype), a.sharding),
        build_program(config, single_device_mesh()).state,
    )
    store.claim_workdir(workdir, config)
    saving = store.Store(workdir, config.checkpoint, print)
    saving.save(3, to_items(state), manifest.facts(config, {}, {"row": 7}, None))
    saving.close()
    return state.params


@pytest.mark.cases(2)
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "fp8_lm"])
def test_parameters_are_read_onto_a_mesh_without_the_optimizer(tmp_path, state_dtype, rank):
    model = dataclasses.replace(MODEL, lora=LoraConfig(rank=rank))
    params = save(tmp_path, Config(model, optimizer=OptimizerConfig(state_dtype=state_dtype)))
    (tmp_path / "checkpoints" / "3" / "optimizer").rename(tmp_path / "unread")
    assert Run(Place(tmp_path)).cfg == MODEL
    expected = lora.merge(model, load_params(params))[1]
    shardings = abstract.shardings(abstract_model(MODEL, mesh_of(data=2, expert=2, tensor=2))[1])
    for dtype in ("float32", "bfloat16"):
        run = Run(Place(tmp_path), dtype)
        read = run.read(shardings)
        for (path, leaf), want, sharding in zip(
            jax.tree.leaves_with_path(read),
            jax.tree.leaves(expected),
            jax.tree.leaves(shardings),
            strict=True,
        ):
            is_router = "router" in jax.tree_util.keystr(path)
            want = np.asarray(want.astype("float32" if is_router else dtype))
            assert leaf.dtype == want.dtype
            # Adapters are merged by a sharded product, which may add up in another order.
            rounding = {"float32": 1e-6, "bfloat16": 4e-3}[dtype] if rank else 0
            assert_close(leaf, want, rounding)
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)

    if not rank:
        with pytest.raises(ConfigError, match=r"has trained all parameters .* no adapter"):
            run.read_adapters()
        return
    cfg, adapters = run.read_adapters()
    assert cfg == model
    jax.tree.map(
        np.testing.assert_array_equal,
        adapters,
        load_params(split(params, abstract_model(model, single_device_mesh())[1])[0]),
    )


PEAK = """
import sys
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.params import abstract
from hunyuan_jax.storage import Place
from hunyuan_jax.weights.run import Run

def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return 1024 * int(line.split()[1])

run = Run(Place(sys.argv[1]))
shardings = abstract.shardings(abstract_model(run.cfg, single_device_mesh())[1])
before = status("VmRSS")
params = run.read(shardings)
print("grown by", status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_memory_grows_by_the_parameters_and_not_by_the_moments(tmp_path):
    """0.11 GB of parameters; the state with both moments has 0.33 GB."""
    model = dataclasses.replace(MODEL, hidden_size=512, intermediate_size=4096, head_dim=256)
    params = save(tmp_path, Config(model))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert num_bytes > 1e8
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(paths.ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grown = int(re.search(r"grown by (\d+)", done.stdout)[1])
    assert num_bytes <= grown < 2 * num_bytes, (grown / num_bytes, num_bytes)


def test_a_workdir_without_checkpoints_is_refused(tmp_path):
    store.claim_workdir(tmp_path, Config(MODEL))
    with pytest.raises(
        ConfigError,
        match=r"holds no finished checkpoint yet; train until config.checkpoint.every = 100 steps",
    ):
        Run(Place(tmp_path))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # orbax's coroutines
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_readers_of_a_run_that_trains_never_see_half_a_checkpoint(tmp_path):
    """The run saves after every step and keeps one; it deletes what is being read."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    training = processes.start(
        processes.write_corpus(corpus),
        tmp_path / "run",
        **{
            "checkpoint.every": 1,
            "checkpoint.keep": 1,
            "checkpoint.keep_best": 0,
            "train.num_steps": 60,
        },
    )
    fingerprints = []
    try:
        while training.poll() is None:
            try:
                run = Run(Place(tmp_path / "run"))
            except ConfigError as error:
                is_early = "is not a run" in str(error) or "no finished" in str(error)
                if fingerprints or not is_early:
                    raise
                continue
            shardings = abstract.shardings(abstract_model(run.cfg, single_device_mesh())[1])
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.read(shardings)))
            fingerprints.append(run.fingerprint)
            assert page.write(tmp_path / "run").is_file()
    finally:
        training.kill()
    status, error = processes.finished(training)
    assert status == 0, error
    assert len(set(fingerprints)) > 3
