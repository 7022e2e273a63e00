"""flash_attention's forward pass on Hopper (Mosaic GPU): numbers and races in the interpreter,
lowering at the real sizes; no GPU runs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import testing
from pallas_kernels.flash_attention import cases, gpu, reference

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)  # the backward pass

BF16 = jnp.bfloat16
CASES = (
    cases.Case("causal, pieces of two sizes", 1, 256, 256, 2, 1, 80),
    cases.Case("packed and padded", 1, 384, 384, 1, 1, 80, documents=3, padding=100),
    cases.Case("slots used again", 1, 512, 512, 1, 1, 128),
    cases.Case("not causal", 2, 128, 384, 2, 2, 16, causal=False),
    cases.Case("more queries than keys", 1, 300, 200, 1, 1, 40),
)


def kernel(case, *arrays, **options):
    return gpu.attention(
        *arrays,
        jnp.zeros((case.B, case.N), jnp.uint32),
        case.static,
        device_kind="NVIDIA H200",
        **options,
    )


def times_values(weights, values):
    """What `gpu._times_values` computes; the interpreter has no warp-group matmul with an operand
    in registers.
    """
    products = [
        lax.dot(weights, value[...], preferred_element_type=jnp.float32) for value in values
    ]
    plgpu.commit_smem()  # these were ordinary reads, unlike the tensor cores'
    return products


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward(case, monkeypatch):
    if jax.__version_info__ < (0, 11):
        pytest.skip("the GPU interpreter of jax 0.10 cannot run this kernel")
    monkeypatch.setattr(gpu, "_times_values", times_values)
    arrays = case.arrays(np.random.default_rng())
    out, lse = kernel(case, *arrays, interpret=plgpu.InterpretGPUParams(detect_races=True))
    arrays = [x.astype(jnp.float32) if x.dtype == BF16 else x for x in arrays]
    expected, expected_lse = reference.attention(
        *arrays, jnp.zeros((case.B, case.N), jnp.uint32), case.static
    )
    assert out.dtype == BF16
    testing.assert_close(out, expected, BF16)
    assert (jnp.isneginf(lse) == jnp.isneginf(expected_lse)).all()
    testing.assert_close(
        *(jnp.where(jnp.isneginf(x), 0.0, x) for x in (lse, expected_lse)), jnp.float32
    )


HEAD_DIMS = [case for case in cases.TIMED if case.name in ("hunyuan 4k", "d128 4k")]


@pytest.mark.cases(2)
@pytest.mark.parametrize("case", [*HEAD_DIMS, cases.LONG, CASES[-1]], ids=lambda case: case.name)
def test_lowers_for_h200(case):
    def gradients(q, k, v, query_segment, key_segment):
        def loss(q, k, v):
            out, lse = kernel(case, q, k, v, query_segment, key_segment)
            return out.astype(jnp.float32).sum() + lse.sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    text = testing.lower_for_gpu(gradients, *case.shapes())
    assert text.count("custom_call @mosaic_gpu") == 1
    for name in ("dq", "dkv"):
        assert text.count(f'name = "flash_attention_{name}"') == 1
    assert "flash_attention_forward" not in text


def test_refusals():
    q, k = (jax.ShapeDtypeStruct((1, 128, 2, 80), BF16),) * 2
    settings = CASES[0].static
    assert gpu.refuse("NVIDIA H200", q, k, settings) is None
    assert "family NVIDIA" in gpu.refuse("cpu", q, k, settings)
    assert "Hopper" in gpu.refuse("NVIDIA A100-SXM4-40GB", q, k, settings)
    assert "bfloat16, not float32" in gpu.refuse(
        "NVIDIA H200", jax.ShapeDtypeStruct(q.shape, jnp.float32), k, settings
    )
    assert "at most 128, not 136" in gpu.refuse(
        "NVIDIA H200", jax.ShapeDtypeStruct((1, 128, 2, 136), BF16), k, settings
    )
    assert "no dropout" in gpu.refuse("NVIDIA H200", q, k, settings._replace(dropout_rate=0.1))
