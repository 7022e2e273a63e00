"""The operations of `reference.py` in XLA, with products in the rows' dtype: what runs on CPUs.

The options (device_kind, interpret) concern kernels only.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.expert_matmul.quantized import dequantized, is_valid


def refuse(device_kind, x_shape, w_shape, dtype, is_quantized):
    """Serves everything."""
    del device_kind, x_shape, w_shape, dtype, is_quantized


def _fusion_barrier(x):
    """Prevents XLA from fusing x with its neighbours.

    The TPU compiler otherwise recomputes a matrix product's inputs for each of its blocks, and
    makes the blocks smaller for what follows: 4.0 and 3.1 instead of 2.3 + 0.2 ms for 4096 x 18304
    x 6400 on v5p by its own estimate (libtpu 0.0.50.1).
    """
    return jax.lax.optimization_barrier(x)


def _valid_rows(x_eCI, count_es):
    return (
        x_eCI
        if count_es is None
        else jnp.where(is_valid(count_es, x_eCI.shape[:2])[..., None], x_eCI, 0)
    )


def _product(spec, x, w):
    if x.shape[0] == 1:
        # As matrices: the TPU compiler then chooses a layout in which a weight's gradient can be
        # reduce-scattered by rows instead of all-reduced.
        return jnp.einsum(spec.replace("e", ""), x[0], w[0])[None]
    return jnp.einsum(spec, x, w)


def _gated(gate_eCF, up_eCF, row_weight_eC):
    h_eCF = jax.nn.silu(gate_eCF) * up_eCF
    return row_weight_eC[..., None].astype(h_eCF.dtype) * h_eCF


def gate_up(x_eCD, w_gate, w_up, row_weight_eC, count_es, *, save, **options):
    """As `reference.gate_up`."""
    del options
    x_eCD = _valid_rows(x_eCD, count_es)
    gate_eCF, up_eCF = (
        _fusion_barrier(_product("eCD,eDF->eCF", x_eCD, dequantized(w, x_eCD.dtype)))
        for w in (w_gate, w_up)
    )
    h_eCF = _fusion_barrier(_valid_rows(_gated(gate_eCF, up_eCF, row_weight_eC), count_es))
    return (h_eCF, gate_eCF, up_eCF) if save else (h_eCF, None, None)


def matmul(x_eCI, w, count_es, **options):
    """As `reference.matmul`."""
    del options
    return _fusion_barrier(
        _product("eCI,eIO->eCO", _valid_rows(x_eCI, count_es), dequantized(w, x_eCI.dtype))
    )


def gated_gradient(dy_eCD, w_down_eFD, gate_eCF, up_eCF, row_weight_eC, count_es, **options):
    """As `reference.gated_gradient`."""
    del options
    dh_eCF = _fusion_barrier(_product("eCD,eFD->eCF", _valid_rows(dy_eCD, count_es), w_down_eFD))
    if count_es is not None:
        row_weight_eC = jnp.where(is_valid(count_es, row_weight_eC.shape), row_weight_eC, 0.0)
    h_eCF, pullback = jax.vjp(_gated, gate_eCF, up_eCF, row_weight_eC)
    return _fusion_barrier((h_eCF, *pullback(dh_eCF)))


def input_gradient(dgate_eCF, w_gate_eDF, dup_eCF, w_up_eDF, count_es, **options):
    """As `reference.input_gradient`."""
    del options
    pairs = ((dgate_eCF, w_gate_eDF), (dup_eCF, w_up_eDF))
    return sum(_product("eCF,eDF->eCD", _valid_rows(d, count_es), w) for d, w in pairs)


def weight_gradient(x_eCI, dy_eCO, count_es, dtype, **options):
    """As `reference.weight_gradient`."""
    del options
    return _product(
        "eCI,eCO->eIO", _valid_rows(x_eCI, count_es), _valid_rows(dy_eCO, count_es)
    ).astype(dtype)
