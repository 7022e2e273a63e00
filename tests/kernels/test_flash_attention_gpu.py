"""flash_attention in Pallas Triton: numbers in the interpreter, lowering at the real sizes;
nothing runs on a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import testing
from pallas_kernels.flash_attention import cases, dropout, reference, triton

# jax 0.12 says so whenever such a kernel is lowered.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)

# Compiling for the CPU is what takes the time of these tests.
FAST_COMPILE = {"xla_backend_optimization_level": 0}
QUICK = ("packed", "many blocks", "dropout")
HEAD_DIMS = [case for case in cases.TIMED if case.name in ("hunyuan 4k", "d128 4k")]
BF16 = jnp.bfloat16


def kernel(*args, **options):
    return triton.attention(*args, device_kind="NVIDIA H200", **options)


def all_results(attention, case, arrays, cotangents):
    """out, lse and the gradients of q, k, v; 0 instead of -inf in lse."""
    *q_k_v, query_segment, key_segment = arrays
    seed = dropout.head_seeds(jnp.array([3, 5], jnp.uint32), case.B, case.N)

    def run(q, k, v, dout, dlse):
        (out, lse), pullback = jax.vjp(
            lambda q, k, v: attention(q, k, v, query_segment, key_segment, seed, case.static),
            q,
            k,
            v,
        )
        has_keys = ~jnp.isneginf(lse)
        return (
            out,
            jnp.where(has_keys, lse, 0.0),
            has_keys,
            pullback((dout, jnp.where(has_keys, dlse, 0.0))),
        )

    args = (*q_k_v, *cotangents)
    return jax.jit(run).lower(*args).compile(compiler_options=FAST_COMPILE)(*args)


def as_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == BF16 else x, tree)


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow)
        for case in cases.TESTED
    ],
)
def test_results_and_gradients(case):
    rng = np.random.default_rng()
    arrays = case.arrays(rng)
    dout, dlse = (rng.normal(size=shape) for shape in (arrays[0].shape, (case.B, case.N, case.T)))
    cotangents = jnp.asarray(dout, case.dtype), jnp.asarray(dlse, jnp.float32)
    *actual, grads = all_results(
        functools.partial(kernel, interpret=True), case, arrays, cotangents
    )
    *expected, expected_grads = all_results(
        reference.attention, case, as_float32(arrays), as_float32(cotangents)
    )
    testing.assert_close(actual[:2], expected[:2], case.dtype)
    assert (actual[2] == expected[2]).all()
    testing.assert_close(grads, expected_grads, case.dtype)
    assert {x.dtype for x in (actual[0], *grads)} == {jnp.dtype(case.dtype)}


@pytest.mark.parametrize("by_query", [True, False])
@pytest.mark.parametrize(
    "case",
    [case for case in cases.TESTED if case.documents > 1 or case.T > case.S],
    ids=lambda case: case.name,
)
def test_ranges_are_exact(case, by_query):
    """Blocks in the ranges are those with a visible pair, and those that go without a mask have
    nothing but.
    """
    _, _, _, query_segment, key_segment = case.arrays(np.random.default_rng())
    blocks = triton.Blocks(32, 16, 4, 1)
    query_segment, key_segment = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % 32))) for x in (query_segment, key_segment)
    )
    problem = triton._Problem(case.static, case.S - case.T, None, None)
    ranges = jax.jit(triton.ranges_of, static_argnums=(2, 3), static_argnames="by_query")(
        query_segment, key_segment, blocks, problem, by_query=by_query
    )
    position = np.arange(query_segment.shape[1])[:, None] + case.S - case.T
    key = np.arange(key_segment.shape[1])
    visible = reference.is_visible(
        position, key, query_segment[:, :, None], key_segment[:, None], case.causal
    )
    visible = (
        np.asarray(visible)
        .reshape(case.B, len(position) // 32, 32, -1, 16)
        .transpose(0, 1, 3, 2, 4)
    )
    visible = visible if by_query else visible.swapaxes(1, 2)
    index = np.arange(visible.shape[2])
    start, full_start, full_stop, stop = (np.asarray(ranges[..., i, None]) for i in range(4))
    assert (
        (start <= full_start).all()
        and (full_start <= full_stop).all()
        and (full_stop <= stop).all()
    )
    assert ((start <= index) & (index < stop) | ~visible.any((3, 4))).all()
    assert visible.all((3, 4))[(full_start <= index) & (index < full_stop)].all()
    # A block that holds a document's end and padding spans every segment, so blocks may visit it,
    # and those before it, in vain.  Without padding nothing is.
    if case.padding == 0:
        visited = (start <= index) & (index < stop)
        np.testing.assert_array_equal(visited, visible.any((3, 4)))


def test_blocks_that_nothing_sees_are_not_read():
    case = cases.Case("poisoned", 1, 256, 256, 1, 1, 16, dtype="float32")
    q, k, v, *_ = case.arrays(np.random.default_rng())
    query_segment = jnp.repeat(jnp.array([[0, 2]], jnp.int32), 128, axis=1)
    key_segment = jnp.maximum(query_segment, 1)  # the last 128 queries see no key before 128
    k, v = (x.at[:, :128].set(jnp.nan) for x in (k, v))
    args = (q, k, v, query_segment, key_segment, jnp.zeros((1, 1), jnp.uint32))
    run = jax.jit(lambda *args: kernel(*args, case.static, interpret=True))
    out, lse = run.lower(*args).compile(compiler_options=FAST_COMPILE)(*args)
    assert np.isfinite(out).all()
    assert np.isfinite(lse[..., 128:]).all()


@pytest.mark.parametrize("size", [8, 16, 24, 40, 64, 80, 96, 128, 256])
def test_pieces_cover_the_head_dim(size):
    pieces = triton._pieces(size + -size % 16)
    assert [piece.start for piece in pieces] == np.cumsum(
        [0, *(piece.size for piece in pieces)]
    ).tolist()[:-1]
    assert sum(piece.size for piece in pieces) == size + -size % 16
    assert all(piece.size >= 16 and piece.size & (piece.size - 1) == 0 for piece in pieces)


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    "case", [*HEAD_DIMS, cases.LONG, *cases.TESTED[-3:]], ids=lambda case: case.name
)
def test_lowers_for_h200(case):
    def gradients(q, k, v, query_segment, key_segment, seed):
        def loss(q, k, v):
            out, lse = kernel(q, k, v, query_segment, key_segment, seed, case.static)
            return out.astype(jnp.float32).sum() + lse.sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    text = testing.lower_for_gpu(
        gradients, *case.shapes(), jax.ShapeDtypeStruct((case.B, case.N), jnp.uint32)
    )
    for name in ("forward", "dq", "dkv"):
        assert text.count(f'name = "flash_attention_{name}"') == 1


def test_refusals():
    q, k = (jax.ShapeDtypeStruct((1, 128, 2, 80), BF16),) * 2
    settings = cases.TESTED[0].static
    assert triton.refuse("NVIDIA H200", q, k, settings) is None
    assert "family NVIDIA" in triton.refuse("TPU v5", q, k, settings)
    assert "at most 256, not 264" in triton.refuse(
        "NVIDIA H200", jax.ShapeDtypeStruct((1, 128, 2, 264), BF16), k, settings
    )
