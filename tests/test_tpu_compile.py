"""The real train step, compiled for a TPU pod slice by the TPU compiler; no TPU is needed, only libtpu."""

import dataclasses
import importlib.util
import os

import jax
import pytest

from hunyuan_jax import presets
from hunyuan_jax.config import Config, MeshConfig, TrainConfig
from hunyuan_jax.parallel.mesh import make_mesh
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.state import abstract_state, build_program

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install '.[tpu]'")


@pytest.fixture(scope="module")
def v5p_devices():
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    os.environ.update(settings)
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices)


@pytest.mark.parametrize("dispatch", ["recycle", "dropless"])
def test_train_step_compiles_for_v5p(v5p_devices, dispatch):
    model = presets.tiny()
    model = dataclasses.replace(model, num_layers=4, dtype="bfloat16", remat="full", moe=dataclasses.replace(model.moe, dispatch=dispatch))
    config = Config(model=model, mesh=MeshConfig(data=2, expert=2), train=TrainConfig(batch_size=4, seq_len=256))
    program = build_program(config, make_mesh(config.mesh, v5p_devices))
    sharding = step_lib.batch_sharding(program)
    dtypes = {"tokens": "int32", "targets": "int32", "segment_ids": "int32", "positions": "int32", "loss_weights": "float32"}
    batch = {name: jax.ShapeDtypeStruct((4, 256), dtype, sharding=sharding) for name, dtype in dtypes.items()}
    compiled = step_lib.make_train_step(program).lower(abstract_state(program), batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes > 0
    text = compiled.as_text()
    if dispatch == "recycle":
        # Tokens travel to their experts and back; the gradient of an expert weight returns as a reduce-scatter over `data`.
        assert "all-to-all" in text
        assert "reduce-scatter" in text
