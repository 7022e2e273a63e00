"""Attention of rows over several chips: results, gradients and dropout of one chip, in each form.

Letters: B batch, R tokens of a row, N query heads, K kv heads, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.layers.mixer import ring
from hunyuan_jax.parallel import context, island
from pallas_kernels.flash_attention import flash_attention, head_seeds
from support.models import assert_close, fast_jit, mesh_of

B, R, N, K, H = 2, 32, 8, 4, 8
_HEADS, _SEGMENTS = ("batch", "seq", "heads", "head_dim"), ("batch", "seq")
CPU = {"device_kind": "cpu"}


@functools.cache
def problem():
    """(q, k, v, segments, gradient of the result) of rows with documents that cross chips."""
    rng = np.random.default_rng(0)
    shapes = ((B, R, N, H), (B, R, K, H), (B, R, K, H), (B, R, N, H))
    q, k, v, dout = (rng.standard_normal(shape, np.float32) for shape in shapes)
    segment_BR = np.stack([np.ones(R), np.repeat([1, 2, 3, 0], [13, 6, 8, 5])]).astype(np.int32)
    return q, k, v, segment_BR, np.where((segment_BR > 0)[:, :, None, None], dout, np.float32(0))


def gathered(q, k, v, segment, seeds, **options):
    return ring.over_gathered(q, ring.gather_row(k), ring.gather_row(v), segment, seeds, **options)


def over_heads(q, k, v, segment, seeds, **options):
    rows = ring.heads_to_row(k), ring.heads_to_row(v)
    return ring.over_heads(q, *rows, segment, seeds, **options)


def around(q, k, v, segment, seeds, **options):
    del seeds
    return ring.over_ring(q, k, v, segment, **options)


def results(attend):
    """(out, gradients of q, k and v)."""
    *q_k_v, segment, dout = problem()

    def run(q_k_v):
        out, pullback = jax.vjp(lambda *q_k_v: attend(*q_k_v, segment), *q_k_v)
        return jnp.where((segment > 0)[:, :, None, None], out, 0.0), pullback(jnp.asarray(dout))

    return fast_jit(run)(q_k_v)


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("form", "num_chips", "dropout_rate"),
    [
        (gathered, 4, 0.2),
        (gathered, 8, 0.0),
        (over_heads, 2, 0.0),
        (over_heads, 4, 0.2),
        (around, 2, 0.0),
        (around, 4, 0.0),
        (around, 8, 0.0),
    ],
)
def test_a_row_over_chips_is_attended_to_as_on_one(form, num_chips, dropout_rate):
    mesh = mesh_of(2 if num_chips < 8 else 1, context=num_chips)
    # Of one row, used for both; a chip has one row, or both.
    num_rows = B // mesh.shape["data"]
    seeds = jnp.tile(head_seeds(jnp.array([3, 5], jnp.uint32), 1, N), (B, 1))

    def on_chips(q, k, v, segment):
        options = CPU | {"dropout_rate": dropout_rate} if dropout_rate else CPU
        fn = functools.partial(form, **options)
        dims = (*(_HEADS,) * 3, _SEGMENTS, ("row", "row"))
        run = island.island(lambda _, *xs: fn(*xs), mesh, {}, dims, _HEADS)
        arrays = (context.chip_order(x, num_chips) for x in (q, k, v, segment))
        return context.row_order(run({}, *arrays, seeds[:num_rows]), num_chips)

    def on_one(q, k, v, segment):
        options = {"dropout_rate": dropout_rate, "dropout_seed": seeds}
        return flash_attention(q, k, v, segment, segment, **CPU, **options)

    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), results(on_chips), results(on_one))
