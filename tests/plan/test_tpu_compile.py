"""The real train step, compiled for a TPU pod slice by the TPU compiler; no TPU is needed, only
libtpu.
"""

import dataclasses
import importlib.util
import re

import pytest

from hunyuan_jax import presets
from hunyuan_jax.config import (
    Config,
    LatentConfig,
    MeshConfig,
    MoeConfig,
    SparkConfig,
    TrainConfig,
)
from hunyuan_jax.plan import aot, topology

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install '.[tpu]'",
)


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
def test_other_kinds_of_layers_compile_for_v5p(kind):
    model = dataclasses.replace(
        presets.tiny(), num_layers=2, dtype="bfloat16", remat="full", moe=MoeConfig(), **kind
    )
    config = Config(
        model, mesh=MeshConfig(data=2, tensor=2), train=TrainConfig(batch_size=4, seq_len=128)
    )
    compiled = aot.compile_step(config, topology.topology_devices("v5p:2x2x1")).compiled
    assert compiled.memory_analysis().temp_size_in_bytes > 0
