"""The real train step, compiled for a TPU pod slice by the TPU compiler; no TPU is needed, only
libtpu.
"""

import dataclasses
import importlib.util
import re
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hunyuan_jax import presets
from hunyuan_jax.config import (
    Config,
    LatentConfig,
    MeshConfig,
    MoeConfig,
    SparkConfig,
    TrainConfig,
)
from hunyuan_jax.parallel.mesh import make_mesh
from hunyuan_jax.plan import aot, hlo, hlo_text, topology
from pallas_kernels import tpu_compiler

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install '.[tpu]'",
)


@pytest.mark.slow  # test_plan.py has nearly the same step
@pytest.mark.parametrize("dispatch", ["recycle", "dropless"])
def test_train_step_compiles_for_v5p(dispatch):
    model = presets.tiny()
    # A layer a group and one block of attention: a step has each kernel once or twice;
    # tests/test_budget.py has two layers a group.
    moe = dataclasses.replace(model.moe, dispatch=dispatch)
    model = dataclasses.replace(
        model, num_layers=2, cla_share_factor=1, dtype="bfloat16", remat="full", moe=moe
    )
    config = Config(
        model=model,
        mesh=MeshConfig(data=2, expert=2),
        train=TrainConfig(batch_size=4, seq_len=128),
    )
    compiled = aot.compile_step(config, topology.topology_devices("v5p:2x2x1")).compiled
    assert compiled.memory_analysis().temp_size_in_bytes > 0
    text = compiled.as_text()
    if dispatch == "recycle":
        # Tokens travel to their experts and back; the gradient of an expert weight returns as a
        # reduce-scatter over `data`.
        assert "all-to-all" in text
        assert "reduce-scatter" in text
        for kernel in ("gate_up", "matmul", "gated_gradient", "input_gradient", "weight_gradient"):
            assert re.search(rf"%expert_{kernel}[.\d]* = .*tpu_custom_call", text), kernel
    for kernel in ("forward", "backward"):
        assert re.search(rf"%flash_attention_{kernel}[.\d]* = .*tpu_custom_call", text), kernel


@pytest.mark.parametrize(
    "kind",
    [
        {"spark": SparkConfig(neuron_share=0.1, attention_top_k=16)},
        {"latent": LatentConfig(32, 16, 16), "num_kv_heads": 8, "use_qk_norm": False},
    ],
    ids=lambda kind: next(iter(kind)),
)
@pytest.mark.slow
def test_other_kinds_of_layers_compile_for_v5p(kind):
    model = dataclasses.replace(
        presets.tiny(), num_layers=2, dtype="bfloat16", remat="full", moe=MoeConfig(), **kind
    )
    config = Config(
        model, mesh=MeshConfig(data=2, tensor=2), train=TrainConfig(batch_size=4, seq_len=128)
    )
    compiled = aot.compile_step(config, topology.topology_devices("v5p:2x2x1")).compiled
    assert compiled.memory_analysis().temp_size_in_bytes > 0


@pytest.mark.parametrize("form", [pytest.param("gather", marks=pytest.mark.slow), "ring"])
@pytest.mark.heavy
def test_a_row_over_several_chips_compiles_for_v5p(form):
    model = dataclasses.replace(
        presets.tiny(),
        num_layers=1,
        cla_share_factor=1,
        dtype="bfloat16",
        remat="full",
        context_attention=form,
        moe=MoeConfig(),
    )
    config = Config(
        model, mesh=MeshConfig(data=1, context=4), train=TrainConfig(batch_size=1, seq_len=1024)
    )
    compiled = aot.compile_step(config, topology.topology_devices("v5p:2x2x1")).compiled
    text = compiled.as_text()
    for kernel in ("forward", "backward"):
        assert re.search(rf"%flash_attention_{kernel}[.\d]* = .*tpu_custom_call", text), kernel
    if form == "ring":  # keys travel in the background, from neighbour to neighbour
        assert re.search(r"= \(bf16\[[^=]* collective-permute-start\(", text)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_compiler_knows_the_options_of_every_generation(name):
    device = topology.topology_devices(name)[0]
    expected = tpu_compiler.TRAIN_STEP_OPTIONS[name.split(":")[0]]
    assert tpu_compiler.train_step_options(device) == expected  # a warning is an error


def test_a_fast_compilation_leaves_the_sparse_cores_out(monkeypatch):
    devices = topology.topology_devices("v5p:2x2x1")
    mesh = make_mesh(MeshConfig(data=4), devices)
    rows = jax.ShapeDtypeStruct(
        (1024, 512), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )

    def make_train_step(program):
        """A step that gathers weights, and nothing else."""
        step = jax.shard_map(
            lambda w: jax.lax.all_gather(w, "data", tiled=True),
            mesh=mesh,
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        options = tpu_compiler.train_step_options(devices[0])
        return jax.jit(lambda state, batch: step(state), compiler_options=options)

    monkeypatch.setattr(aot.step_lib, "make_train_step", make_train_step)
    monkeypatch.setattr(aot.step_lib, "abstract_batch", lambda program: None)
    monkeypatch.setattr(aot, "build_program", lambda *args: types.SimpleNamespace(state=rows))
    config = Config(presets.tiny(), mesh=MeshConfig(data=4))
    for is_fast in (False, True):
        text = aot.compile_step(config, devices, is_fast).compiled.as_text()
        assert ('execution_thread="sparsecore"' in text) != is_fast


def test_an_option_that_the_compiler_does_not_know_is_left_out_and_named():
    device = topology.topology_devices("v5p:2x2x1")[0]
    known = {"xla_tpu_enable_async_all_to_all": "true"}
    with pytest.warns(UserWarning, match="no compiler option xla_tpu_of_tomorrow"):
        left = tpu_compiler.known_options(device, {"xla_tpu_of_tomorrow": "true"} | known)
    assert left == known
    with pytest.raises(jax.errors.JaxRuntimeError, match="Failed to parse"):
        tpu_compiler.known_options(device, {"xla_tpu_enable_async_all_to_all": "perhaps"})


@pytest.mark.slow
def test_weights_travel_in_the_background():
    """On v5p every large gather and reduce-scatter over `data` is asynchronous, none is an
    all-reduce on the TensorCore; with an odd number of tiles in an expert's columns some were.
    """
    model = dataclasses.replace(
        presets.a52b(),
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=4224,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        moe=dataclasses.replace(presets.a52b().moe, num_experts=4),
        pad_token_id=-1,
        eos_token_ids=(),
    )
    config = Config(
        model, mesh=MeshConfig(data=4, expert=4), train=TrainConfig(batch_size=16, seq_len=512)
    )
    compiled = aot.compile_step(config, topology.topology_devices("v5p:2x2x4")).compiled
    module = hlo_text.parse(compiled.as_text())
    mesh = {"replica": 1, "data": 4, "expert": 4, "tensor": 1}
    stopping = {
        (found.kind, found.bytes)
        for computation in module.computations.values()
        for op in computation
        if op.opcode in ("all-gather", "reduce-scatter", "all-reduce", "fusion")
        and (found := hlo.transfer_of(module, op, computation, mesh))
        and "data" in found.axes
        and found.bytes > 2**20
    }
    assert not stopping
