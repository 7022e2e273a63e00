"""The routed experts' SwiGLU on buffers that are already sorted by expert.

Letters: e experts on this shard, R rows of an expert's buffer, D model, F ffn, n tiles, b rows a tile.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hunyuan_jax.model.linear import swiglu


def swiglu_buffers(x_eRD: jax.Array, weight_eR: jax.Array, w_gate_eDF: jax.Array, w_up_eDF: jax.Array, w_down_eFD: jax.Array) -> jax.Array:
    """down(weight * silu(gate(x)) * up(x)) of every expert on its own buffer [e, R, D]; empty rows are zero and stay zero."""
    return swiglu(_buffer_matmul, x_eRD, w_gate_eDF, w_up_eDF, w_down_eFD, weight_eR)


def _buffer_matmul(x_eRI: jax.Array, w_eIO: jax.Array) -> jax.Array:
    if x_eRI.shape[0] == 1:
        # For the same reason as in moe.serve.
        return (x_eRI[0] @ w_eIO[0])[None]
    return jnp.einsum("eRI,eIO->eRO", x_eRI, w_eIO)


def swiglu_tiles(
    x_nbD: jax.Array,
    weight_nb: jax.Array,
    tile_expert_n: jax.Array,
    num_tiles: jax.Array,
    w_gate_eDF: jax.Array,
    w_up_eDF: jax.Array,
    w_down_eFD: jax.Array,
) -> jax.Array:
    """The same on tiles of rows, tile i by expert tile_expert_n[i]; tiles from num_tiles on are skipped and come back zero."""
    return swiglu(tile_matmul, x_nbD, w_gate_eDF, w_up_eDF, w_down_eFD, weight_nb, (tile_expert_n, num_tiles))


@jax.custom_vjp
def tile_matmul(x_nbD: jax.Array, w_eDF: jax.Array, tile_expert_n: jax.Array, num_tiles: jax.Array) -> jax.Array:
    """x[i] @ w[tile_expert_n[i]] for the first num_tiles tiles, zero for the rest: [n, b, F] in x's dtype.

    Reads each tile's weights once and does no work for the rest, where a masked `lax.ragged_dot` on CPU multiplies every row with
    every expert.  The weight gradient accumulates tile by tile in float32.
    """
    return _tile_matmul(x_nbD, w_eDF, tile_expert_n, num_tiles, contract_w=0)


@functools.partial(jax.jit, static_argnames="contract_w", inline=True)
def _tile_matmul(x_nbD, w_eDF, tile_expert_n, num_tiles, contract_w):
    num_out = w_eDF.shape[2 - contract_w]

    def one_tile(i, y_nbF):
        w_DF = jax.lax.dynamic_index_in_dim(w_eDF, tile_expert_n[i], keepdims=False)
        x_bD = jax.lax.dynamic_index_in_dim(x_nbD, i, keepdims=False)
        y_bF = jax.lax.dot_general(x_bD, w_DF, (((1,), (contract_w,)), ((), ())))
        return jax.lax.dynamic_update_index_in_dim(y_nbF, y_bF, i, axis=0)

    return jax.lax.fori_loop(0, num_tiles, one_tile, jnp.zeros((*x_nbD.shape[:2], num_out), x_nbD.dtype))


def _tile_matmul_fwd(x_nbD, w_eDF, tile_expert_n, num_tiles):
    return tile_matmul(x_nbD, w_eDF, tile_expert_n, num_tiles), (x_nbD, w_eDF, tile_expert_n, num_tiles)


def _tile_matmul_bwd(residuals, dy_nbF):
    x_nbD, w_eDF, tile_expert_n, num_tiles = residuals
    dx_nbD = _tile_matmul(dy_nbF, w_eDF, tile_expert_n, num_tiles, contract_w=1)

    def one_tile(i, dw_eDF):
        x_bD = jax.lax.dynamic_index_in_dim(x_nbD, i, keepdims=False)
        dy_bF = jax.lax.dynamic_index_in_dim(dy_nbF, i, keepdims=False)
        dw_DF = jnp.einsum("bD,bF->DF", x_bD, dy_bF, preferred_element_type=jnp.float32)
        return dw_eDF.at[tile_expert_n[i]].add(dw_DF)

    dw_eDF = jax.lax.fori_loop(0, num_tiles, one_tile, jnp.zeros(w_eDF.shape, jnp.float32)).astype(w_eDF.dtype)
    # Integer arguments have the empty cotangent type.
    return dx_nbD, dw_eDF, np.zeros(tile_expert_n.shape, jax.dtypes.float0), np.zeros((), jax.dtypes.float0)


tile_matmul.defvjp(_tile_matmul_fwd, _tile_matmul_bwd)
