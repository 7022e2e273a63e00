"""What the code does for a compiler and not for the maths: one named function for each case.

Every function returns its argument, at most rearranged.  The versions are those with which the
need was seen, in the compiled program of a TPU v5p.  Remove a function when the program is as good
without it (tests/plan/test_budget.py).
"""

from typing import Any

import jax
import jax.numpy as jnp

# Bytes of float32 logits of one vocabulary chunk on one shard.  With twice as many, the chunk's
# gradient is larger than what libtpu 0.0.50 turns into a reduce-scatter: it all-reduces.
MAX_LOGITS_BYTES = 2**28

# Columns of a weight whose rows are gathered: an even number of tiles of 128.  With an odd number
# libtpu 0.0.50 makes the reduce-scatter of its gradient a padded all-reduce on the TensorCore, on
# v5p, v6e and tpu7x, and computes nothing meanwhile.
LANES_BESIDE_GATHERED_ROWS = 256

_MAX_GROUPS = 2**30


def fusion_barrier(x: Any) -> Any:
    """Prevents XLA from fusing x with its neighbours.

    libtpu 0.0.50: otherwise what comes before a matrix product is computed again for each of its
    blocks, and what comes after makes the blocks smaller: 4.0 and 3.1 instead of 2.3 + 0.2 ms for
    4096 x 18304 x 6400 on v5p, as the compiler estimates.
    """
    return jax.lax.optimization_barrier(x)


def cast_where_used(w: jax.Array, dtype: Any) -> jax.Array:
    """w in dtype, converted inside the loop that uses it.

    libtpu 0.0.50: otherwise all layers' weights are converted before the loop over layers, which
    is a second copy of the model.
    """
    return w if w.dtype == dtype else jax.lax.optimization_barrier(w).astype(dtype)


def cast_inside_loop(w: jax.Array, dtype: Any, index: jax.Array | None) -> jax.Array:
    """w in dtype, converted in the loop whose index this is; None: outside of a loop.

    As `cast_where_used`, where a barrier does not help: libtpu 0.0.50 moves a plain conversion
    past barriers, but not a product with a factor of one that it cannot know before the loop.
    """
    if w.dtype == dtype:
        return w
    if index is not None:
        w = w * jnp.where(index < _MAX_GROUPS, 1.0, 0.0)
    return w.astype(dtype)


def keep_reduce_scatter(x: jax.Array) -> jax.Array:
    """x before it is gathered; the reduce-scatter of its gradient stays one.

    libtpu 0.0.50: merged with what follows, it becomes an all-reduce.
    """
    return jax.lax.optimization_barrier(x)


def keep_padding_separate(x: jax.Array) -> jax.Array:
    """x after padding and before it is gathered.

    libtpu 0.0.50 fails when it merges the reduce-scatter of the gradient with the slice that
    undoes the padding.
    """
    return jax.lax.optimization_barrier(x)


def one_expert_as_matrix(w_eIO: jax.Array) -> jax.Array:
    """[I, O] of the only expert of a shard; the caller restores the dim after gathering.

    libtpu 0.0.50 then lays the gradient out so that its rows can be reduce-scattered, not
    all-reduced.
    """
    assert w_eIO.shape[0] == 1, w_eIO.shape
    return w_eIO[0]


def rows_as_columns(w_vd: jax.Array) -> jax.Array:
    """[d, v], to be gathered along v: the columns of a shard become rows.

    libtpu 0.0.50 reduce-scatters the gradient of rows, where it all-reduces that of columns.
    """
    return w_vd.T
