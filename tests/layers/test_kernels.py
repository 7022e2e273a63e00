"""The kernels inside the model: which are chosen, and that a model trains the same with each of
them.
"""

import dataclasses
import functools

import numpy as np
import pytest

from hunyuan_jax.config import Config, MeshConfig, ModelConfig, MoeConfig, TrainConfig
from hunyuan_jax.flags import exit_with_message
from hunyuan_jax.layers import kernels
from hunyuan_jax.layers.ffn import swiglu as mlp
from hunyuan_jax.layers.ffn.moe import layer as moe
from hunyuan_jax.layers.mixer import attention
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.state import build_program, init_state
from support.models import COMPILER_OPTIONS, mesh_of

MODEL = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=32,
    cla_share_factor=1,
    remat="full",
    moe=MoeConfig(num_experts=2, num_shared_experts=1, dispatch="recycle"),
)


def losses(mesh, **changes):
    """Of three train steps."""
    config = Config(
        model=dataclasses.replace(MODEL, **changes),
        mesh=MeshConfig(data=-1, expert=mesh.shape["expert"]),
        train=TrainConfig(num_steps=100, batch_size=4, seq_len=32),
    )
    program = build_program(config, mesh)
    state = init_state(program)
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(1, 48, (4, 33)).astype(np.int32)
    segments_BT = np.repeat([[1] * 20 + [2] * 9 + [0] * 3], 4, axis=0).astype(np.int32)
    positions_BT = np.broadcast_to(np.arange(32, dtype=np.int32), (4, 32))
    batch = {
        "tokens": tokens_BT[:, :-1],
        "targets": tokens_BT[:, 1:],
        "segment_ids": segments_BT,
        "positions": positions_BT,
        "loss_weights": (segments_BT > 0).astype(np.float32),
    }
    train_step = (
        step_lib.make_train_step(program)
        .lower(state, batch)
        .compile(compiler_options=COMPILER_OPTIONS)
    )
    found = []
    for _ in range(3):
        state, metrics = train_step(state, batch)
        found.append(float(metrics["loss"]))
    return found


@functools.cache
def xla_losses():
    return losses(mesh_of(1))


@pytest.mark.slow
def test_the_reference_trains_the_same():
    np.testing.assert_allclose(losses(mesh_of(1), kernels="reference"), xla_losses(), rtol=1e-5)


@pytest.mark.slow
def test_the_tpu_kernels_train_the_same(monkeypatch):
    # Interpreted: without a TPU, what is chosen for one has to be asked for.
    options = {"device_kind": "TPU v5", "implementation": "pallas_tpu", "interpret": True}
    for module in (attention, mlp, moe):
        monkeypatch.setattr(module, "kernel_options", lambda cfg, mesh: dict(options))
    found = losses(mesh_of(1, 2))
    np.testing.assert_allclose(found, xla_losses(), rtol=1e-5)
    assert found[0] != found[1] != found[2]


def test_the_choice_follows_the_mesh_and_the_config():
    mesh = mesh_of(1)
    assert kernels.kernel_options(MODEL, mesh) == {"device_kind": "cpu", "implementation": None}
    chosen = kernels.kernel_options(dataclasses.replace(MODEL, kernels="pallas_gpu,xla"), mesh)
    assert chosen == {"device_kind": "cpu", "implementation": ["pallas_gpu", "xla"]}


def test_a_kernel_that_cannot_run_here_is_refused_with_the_reason():
    with pytest.raises(
        ValueError, match=r"flash_attention on 'cpu': pallas_tpu: needs a device of the family TPU"
    ):
        losses(mesh_of(1), kernels="pallas_tpu")
    with pytest.raises(ValueError, match=r"no implementation 'palas'; it has pallas_tpu"):
        losses(mesh_of(1), kernels="palas")


def test_the_command_line_says_so_in_one_line(capsys):
    with pytest.raises(SystemExit) as status:
        exit_with_message(lambda: losses(mesh_of(1), kernels="pallas_tpu"))
    assert status.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: flash_attention on 'cpu': pallas_tpu: needs a device"
    )
