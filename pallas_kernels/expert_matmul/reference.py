"""Defines the operations of swiglu: float32, one line each.

Letters as in api.py.  The options (device_kind, interpret) concern kernels only.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.expert_matmul.quantized import dequantized, is_valid

_F32 = jnp.float32


def refuse(device_kind, x_shape, w_shape, dtype, is_quantized):
    """Serves everything."""
    del device_kind, x_shape, w_shape, dtype, is_quantized


def _rows(x_eCI, count_es):
    """Returns x in float32 with zeros in invalid rows."""
    return jnp.where(is_valid(count_es, x_eCI.shape[:2])[..., None], x_eCI.astype(_F32), 0.0)


def _product(spec, x, w):
    return jnp.einsum(spec, x, w, precision="highest")


def _gated(gate_eCF, up_eCF, row_weight_eC):
    return row_weight_eC[..., None] * jax.nn.silu(gate_eCF) * up_eCF


def gate_up(x_eCD, w_gate, w_up, row_weight_eC, count_es, *, save, **options):
    """Returns (h, gate, up), the latter two None without `save`; [e, C, F] in x's dtype."""
    del options
    x, row_weight = (
        _rows(x_eCD, count_es),
        jnp.where(is_valid(count_es, x_eCD.shape[:2]), row_weight_eC.astype(_F32), 0.0),
    )
    gate, up = (_product("eCD,eDF->eCF", x, dequantized(w, _F32)) for w in (w_gate, w_up))
    h, gate, up = (a.astype(x_eCD.dtype) for a in (_gated(gate, up, row_weight), gate, up))
    return (h, gate, up) if save else (h, None, None)


def matmul(x_eCI, w, count_es, **options):
    """Returns x @ w, [e, C, O] in x's dtype."""
    del options
    return _product("eCI,eIO->eCO", _rows(x_eCI, count_es), dequantized(w, _F32)).astype(
        x_eCI.dtype
    )


def gated_gradient(dy_eCD, w_down_eFD, gate_eCF, up_eCF, row_weight_eC, count_es, **options):
    """Returns h and the gradients of gate, up [e, C, F] and row_weight (float32 [e, C])."""
    del options
    dh = _product("eCD,eFD->eCF", _rows(dy_eCD, count_es), w_down_eFD.astype(_F32))
    row_weight = jnp.where(
        is_valid(count_es, row_weight_eC.shape), row_weight_eC.astype(_F32), 0.0
    )
    h, pullback = jax.vjp(_gated, _rows(gate_eCF, count_es), _rows(up_eCF, count_es), row_weight)
    dgate, dup, drow_weight = pullback(dh)
    return (*(a.astype(dy_eCD.dtype) for a in (h, dgate, dup)), drow_weight)


def input_gradient(dgate_eCF, w_gate_eDF, dup_eCF, w_up_eDF, count_es, **options):
    """Returns dgate @ w_gate^T + dup @ w_up^T, [e, C, D] in their dtype."""
    del options
    pairs = ((dgate_eCF, w_gate_eDF), (dup_eCF, w_up_eDF))
    return sum(
        _product("eCF,eDF->eCD", _rows(d, count_es), w.astype(_F32)) for d, w in pairs
    ).astype(dgate_eCF.dtype)


def weight_gradient(x_eCI, dy_eCO, count_es, dtype, **options):
    """Returns x^T @ dy, [e, I, O] in `dtype`."""
    del options
    return _product("eCI,eCO->eIO", _rows(x_eCI, count_es), _rows(dy_eCO, count_es)).astype(dtype)
