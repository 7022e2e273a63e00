"""SwiGLU of the routed experts on tiles of rows (dropless routing), and with LoRA adapters.

Letters: e experts on this shard, D model, F ffn, n tiles, b rows per tile.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.layers.lora import Adapted
from hunyuan_jax.parallel.xla_workarounds import fusion_barrier
from hunyuan_jax.quant.array import QuantArray, is_quantized, product
from pallas_kernels.expert_matmul.quantized import Quantized


@jax.custom_vjp
def swiglu_tiles(
    x_nbD: jax.Array,
    weight_nb: jax.Array,
    tile_expert_n: jax.Array,
    num_tiles: jax.Array,
    w_gate_eDF: jax.Array,
    w_up_eDF: jax.Array,
    w_down_eFD: jax.Array,
) -> jax.Array:
    """Returns down(weight * silu(gate(x)) * up(x)) [n, b, D], tile i by expert tile_expert_n[i].

    Tiles from num_tiles on are skipped; their result is zero.

    The backward pass saves only x and the products gate(x) and up(x), and recomputes the rest.
    The weight is applied before the last product, so that its gradient does not need the result
    of that product.
    """
    return _swiglu_fwd(
        x_nbD, weight_nb, tile_expert_n, num_tiles, w_gate_eDF, w_up_eDF, w_down_eFD
    )[0]


def _swiglu_fwd(x_nbD, weight_nb, tile_expert_n, num_tiles, w_gate_eDF, w_up_eDF, w_down_eFD):
    product = functools.partial(tile_matmul, tile_expert_n=tile_expert_n, num_tiles=num_tiles)
    gate_nbF, up_nbF = (
        checkpoint_name(fusion_barrier(product(x_nbD, w)), "product")
        for w in (w_gate_eDF, w_up_eDF)
    )
    h_nbF = fusion_barrier(_gated(gate_nbF, up_nbF, weight_nb))
    weights = (w_gate_eDF, w_up_eDF, w_down_eFD)
    return fusion_barrier(product(h_nbF, w_down_eFD)), (
        x_nbD,
        gate_nbF,
        up_nbF,
        weight_nb,
        tile_expert_n,
        num_tiles,
        weights,
    )


def _swiglu_bwd(residuals, dy_nbD):
    (
        x_nbD,
        gate_nbF,
        up_nbF,
        weight_nb,
        tile_expert_n,
        num_tiles,
        (w_gate_eDF, w_up_eDF, w_down_eFD),
    ) = residuals
    product = functools.partial(tile_matmul, tile_expert_n=tile_expert_n, num_tiles=num_tiles)
    h_nbF, gated_vjp = jax.vjp(_gated, gate_nbF, up_nbF, weight_nb)
    dh_nbF, dw_down_eFD = jax.vjp(product, h_nbF, w_down_eFD)[1](dy_nbD)
    dgate_nbF, dup_nbF, dweight_nb = fusion_barrier(gated_vjp(fusion_barrier(dh_nbF)))
    dx_gate_nbD, dw_gate_eDF = jax.vjp(product, x_nbD, w_gate_eDF)[1](dgate_nbF)
    dx_up_nbD, dw_up_eDF = jax.vjp(product, x_nbD, w_up_eDF)[1](dup_nbF)
    # Integer arguments have the empty cotangent type.
    no_gradients = (
        np.zeros(index.shape, jax.dtypes.float0) for index in (tile_expert_n, num_tiles)
    )
    return dx_gate_nbD + dx_up_nbD, dweight_nb, *no_gradients, dw_gate_eDF, dw_up_eDF, dw_down_eFD


swiglu_tiles.defvjp(_swiglu_fwd, _swiglu_bwd)


def swiglu_adapted(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    x_ebD: jax.Array,
    weight_eb: jax.Array,
    projections: tuple[Adapted, Adapted, Adapted],
    kernels: dict[str, Any],
) -> jax.Array:
    """Returns down(weight * silu(gate(x)) * up(x)) [e, b, D]; each projection may have an adapter.

    Args:
      product: (rows [e, b, I], matrices [e, I, O]) -> [e, b, O].  e may be tiles, if the product
        knows their experts.
      x_ebD: rows of each expert or tile.
      weight_eb: combine weights.
      projections: gate, up and down.
      kernels: from `kernel_options`.

    Raises:
      ConfigError: expert kernels would run; they fuse gate, up and the activation, and cannot
        apply an adapter.
    """
    implementation = kernels["implementation"]
    if implementation != ["xla"] and (implementation or kernels["device_kind"] != "cpu"):
        raise ConfigError(
            f"config.model.kernels = {','.join(implementation or ['auto'])} on "
            f"{kernels['device_kind']} would run expert kernels, which "
            "have no place for config.model.lora.targets other than q, k, v, o; set "
            "config.model.kernels=xla, or take those targets."
        )

    def project(x_ebI, projection):
        y_ebO = product(x_ebI, projection.w)
        if projection.a is None:
            return y_ebO
        return y_ebO + product(product(x_ebI, projection.a), projection.b) * projection.scale

    gate, up, down = projections
    gate_ebF, up_ebF = (
        checkpoint_name(project(x_ebD, projection), "product") for projection in (gate, up)
    )
    return project(_gated(gate_ebF, up_ebF, weight_eb), down)


def suits_kernels(matrices: Sequence[jax.Array | QuantArray]) -> bool:
    """Whether the expert kernels can multiply with these quantised matrices [e, I, O].

    They have no place for outliers nor for activations in few bits; a CPU's layout is multiplied
    elsewhere.
    """
    return all(
        is_quantized(w) and w.outliers is None and not w.by_rows and not w.rounds_inputs
        for w in matrices
    )


def for_kernels(w: jax.Array | QuantArray) -> jax.Array | Quantized:
    """Matrices [e, I, O] as `expert_matmul` takes them; see `suits_kernels`."""
    return Quantized(w.values, w.scale) if is_quantized(w) else w


def row_product(x_ebI: jax.Array, w_eIO: jax.Array) -> jax.Array:
    """Multiplies each expert's rows with its matrix, [e, b, O]."""
    return jnp.einsum("ebI,eIO->ebO", x_ebI, w_eIO)


def _gated(gate_nbF, up_nbF, weight_nb):
    return weight_nb[..., None].astype(gate_nbF.dtype) * jax.nn.silu(gate_nbF) * up_nbF


@jax.custom_vjp
def tile_matmul(
    x_nbD: jax.Array, w_eDF: jax.Array | QuantArray, tile_expert_n: jax.Array, num_tiles: jax.Array
) -> jax.Array:
    """Returns x[i] @ w[tile_expert_n[i]], [n, b, F] in x's dtype; zero from num_tiles on.

    A quantised w has no gradient.

    Reads each tile's weights once and skips the tiles from num_tiles on.  `lax.ragged_dot` on CPU
    multiplies every row with every expert instead.  The weight gradient accumulates tile by tile
    in float32.
    """
    return _tile_matmul(x_nbD, w_eDF, tile_expert_n, num_tiles, contract_w=0)


@functools.partial(jax.jit, static_argnames="contract_w", inline=True)
def _tile_matmul(x_nbD, w_eDF, tile_expert_n, num_tiles, contract_w):
    is_out_first = is_quantized(w_eDF) and w_eDF.is_out_first
    num_out = w_eDF.shape[1 if is_out_first else 2 - contract_w]

    def one_tile(i, y_nbF):
        w_DF = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, tile_expert_n[i], keepdims=False), w_eDF
        )
        x_bD = jax.lax.dynamic_index_in_dim(x_nbD, i, keepdims=False)
        if is_quantized(w_DF):
            y_bF = product(x_bD, w_DF)
        else:
            y_bF = jax.lax.dot_general(x_bD, w_DF, (((1,), (contract_w,)), ((), ())))
        return jax.lax.dynamic_update_index_in_dim(y_nbF, y_bF, i, axis=0)

    return jax.lax.fori_loop(
        0, num_tiles, one_tile, jnp.zeros((*x_nbD.shape[:2], num_out), x_nbD.dtype)
    )


def _tile_matmul_fwd(x_nbD, w_eDF, tile_expert_n, num_tiles):
    return tile_matmul(x_nbD, w_eDF, tile_expert_n, num_tiles), (
        x_nbD,
        w_eDF,
        tile_expert_n,
        num_tiles,
    )


def _tile_matmul_bwd(residuals, dy_nbF):
    x_nbD, w_eDF, tile_expert_n, num_tiles = residuals
    dx_nbD = _tile_matmul(dy_nbF, w_eDF, tile_expert_n, num_tiles, contract_w=1)

    def one_tile(i, dw_eDF):
        x_bD = jax.lax.dynamic_index_in_dim(x_nbD, i, keepdims=False)
        dy_bF = jax.lax.dynamic_index_in_dim(dy_nbF, i, keepdims=False)
        dw_DF = jnp.einsum("bD,bF->DF", x_bD, dy_bF, preferred_element_type=jnp.float32)
        return dw_eDF.at[tile_expert_n[i]].add(dw_DF)

    dw_eDF = jax.lax.fori_loop(0, num_tiles, one_tile, jnp.zeros(w_eDF.shape, jnp.float32)).astype(
        w_eDF.dtype
    )
    # Integer arguments have the empty cotangent type.
    return (
        dx_nbD,
        dw_eDF,
        np.zeros(tile_expert_n.shape, jax.dtypes.float0),
        np.zeros((), jax.dtypes.float0),
    )


tile_matmul.defvjp(_tile_matmul_fwd, _tile_matmul_bwd)
