"""swiglu: SwiGLU of experts on rows sorted by expert, forward and backward.

Letters: e experts on this shard, C rows of an expert's buffer, s source blocks (one per shard that
sends rows), D model, F ffn.
"""

import functools
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.expert_matmul import reference, tpu, xla
from pallas_kernels.expert_matmul.quantized import Quantized, Weights
from pallas_kernels.select import Implementation, choose, only_on_hopper


def _gpu() -> types.ModuleType:
    """The module for Hopper GPUs, imported only for them: Pallas' Mosaic GPU takes 0.2 s."""
    from pallas_kernels.expert_matmul import gpu

    return gpu


# In order of preference; `run` returns the module that computes.
_CANDIDATES = [
    Implementation("pallas_tpu", tpu.refuse, lambda: tpu),
    Implementation(
        "pallas_gpu",
        lambda kind, *problem: only_on_hopper(kind) or _gpu().refuse(kind, *problem),
        _gpu,
    ),
    Implementation("xla", xla.refuse, lambda: xla),
    Implementation("reference", reference.refuse, lambda: reference),
]


def swiglu(
    x_eCD: jax.Array,
    row_weight_eC: jax.Array | None,
    count_es: jax.Array | None,
    w_gate_eDF: Weights,
    w_up_eDF: Weights,
    w_down_eFD: Weights,
    *,
    device_kind: str,
    implementation: str | Sequence[str] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Computes (row_weight * silu(x @ w_gate) * (x @ w_up)) @ w_down of each expert on its rows.

    Products accumulate in float32.  Differentiable in x, row_weight and the weights; gradients
    have the dtype of their argument.  The residuals have the checkpoint name "product", so that a
    remat policy can recompute them.

    Args:
      x_eCD: rows, float32 or bfloat16.
      row_weight_eC: float32 factor of each row, or None for 1.
      count_es: int32 numbers of valid rows, or None if all rows are valid.  An expert's buffer
        consists of s equal blocks; the first count_es[e, i] rows of block i are valid.  The others
        may hold anything, NaN too, and return zeros.
      w_gate_eDF, w_up_eDF, w_down_eFD: arrays in x's dtype, or `Quantized` (without gradients).
      device_kind: jax's name of the mesh's devices, such as "TPU v5" or "cpu".
      implementation: None, a name ("pallas_tpu", "pallas_gpu", "xla", "reference") or a list of
        names in order of preference.
      interpret: parameters of Pallas' interpreters, for tests.

    Returns:
      [e, C, D] in x's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or that no named implementation can
        serve.
    """
    _check(x_eCD, row_weight_eC, count_es, w_gate_eDF, w_up_eDF, w_down_eFD)
    is_quantized = isinstance(w_gate_eDF, Quantized)
    problem = (x_eCD.shape, w_gate_eDF.shape, x_eCD.dtype, is_quantized)
    module = choose("expert_matmul", _CANDIDATES, implementation, device_kind, *problem).run()
    ops = _Ops(module, device_kind, interpret)
    if row_weight_eC is None:
        row_weight_eC = jnp.ones(x_eCD.shape[:2], jnp.float32)
    if is_quantized:
        h_eCF, _, _ = ops.module.gate_up(
            x_eCD, w_gate_eDF, w_up_eDF, row_weight_eC, count_es, save=False, **ops.options
        )
        return ops.module.matmul(h_eCF, w_down_eFD, count_es, **ops.options)
    return _swiglu(ops, x_eCD, row_weight_eC, count_es, w_gate_eDF, w_up_eDF, w_down_eFD)


class _Ops(NamedTuple):
    """The module that computes, and the options of its functions."""

    module: types.ModuleType
    device_kind: str
    interpret: Any

    @property
    def options(self) -> dict[str, Any]:
        return {"device_kind": self.device_kind, "interpret": self.interpret}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(ops: "_Ops", x_eCD, row_weight_eC, count_es, w_gate_eDF, w_up_eDF, w_down_eFD):
    h_eCF, _, _ = ops.module.gate_up(
        x_eCD, w_gate_eDF, w_up_eDF, row_weight_eC, count_es, save=False, **ops.options
    )
    return ops.module.matmul(h_eCF, w_down_eFD, count_es, **ops.options)


def _swiglu_fwd(ops, x_eCD, row_weight_eC, count_es, w_gate_eDF, w_up_eDF, w_down_eFD):
    h_eCF, gate_eCF, up_eCF = ops.module.gate_up(
        x_eCD, w_gate_eDF, w_up_eDF, row_weight_eC, count_es, save=True, **ops.options
    )
    gate_eCF, up_eCF = checkpoint_name(gate_eCF, "product"), checkpoint_name(up_eCF, "product")
    y_eCD = ops.module.matmul(h_eCF, w_down_eFD, count_es, **ops.options)
    return y_eCD, (
        x_eCD,
        row_weight_eC,
        count_es,
        w_gate_eDF,
        w_up_eDF,
        w_down_eFD,
        gate_eCF,
        up_eCF,
    )


def _swiglu_bwd(ops, residuals, dy_eCD):
    x_eCD, row_weight_eC, count_es, w_gate_eDF, w_up_eDF, w_down_eFD, gate_eCF, up_eCF = residuals
    # h is recomputed, which is cheaper than keeping it.
    h_eCF, dgate_eCF, dup_eCF, drow_weight_eC = ops.module.gated_gradient(
        dy_eCD, w_down_eFD, gate_eCF, up_eCF, row_weight_eC, count_es, **ops.options
    )
    dx_eCD = ops.module.input_gradient(
        dgate_eCF, w_gate_eDF, dup_eCF, w_up_eDF, count_es, **ops.options
    )
    dw_gate_eDF = ops.module.weight_gradient(
        x_eCD, dgate_eCF, count_es, w_gate_eDF.dtype, **ops.options
    )
    dw_up_eDF = ops.module.weight_gradient(x_eCD, dup_eCF, count_es, w_up_eDF.dtype, **ops.options)
    # Computed as [D, F].  A kernel's result lies row by row in memory, and FSDP reduce-scatters it
    # by D, which needs whole rows: of [F, D] the TPU compiler would make an all-reduce.
    dw_down_eFD = ops.module.weight_gradient(
        dy_eCD, h_eCF, count_es, w_down_eFD.dtype, **ops.options
    ).swapaxes(1, 2)
    # Integer arguments have the empty cotangent type.
    dcount = None if count_es is None else np.zeros(count_es.shape, jax.dtypes.float0)
    return (
        dx_eCD,
        drow_weight_eC.astype(row_weight_eC.dtype),
        dcount,
        dw_gate_eDF,
        dw_up_eDF,
        dw_down_eFD,
    )


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def _check(x_eCD, row_weight_eC, count_es, w_gate_eDF, w_up_eDF, w_down_eFD):
    e, num_rows, D = x_eCD.shape
    F = w_gate_eDF.shape[-1]
    shapes = {
        "w_gate": (w_gate_eDF, (e, D, F)),
        "w_up": (w_up_eDF, (e, D, F)),
        "w_down": (w_down_eFD, (e, F, D)),
    }
    for name, (w, shape) in shapes.items():
        if w.shape != shape:
            raise ValueError(
                f"{name} has shape {w.shape}; with x {x_eCD.shape} and {F} ffn columns it must be "
                f"{shape}."
            )
        if isinstance(w, Quantized) != isinstance(w_gate_eDF, Quantized):
            raise ValueError(
                "some of w_gate, w_up and w_down are Quantized and some are not; quantise all "
                "three, or none."
            )
        if isinstance(w, Quantized):
            groups = w.scale_eGO.shape[1]
            if w.scale_eGO.shape != (e, groups, shape[2]) or shape[1] % groups:
                raise ValueError(
                    f"{name}: scales {w.scale_eGO.shape} do not fit values {shape}; they are [e, "
                    f"G, O] where G divides {shape[1]}."
                )
        elif w.dtype != x_eCD.dtype:
            raise ValueError(
                f"{name} is {w.dtype} and x is {x_eCD.dtype}; cast the weights, or pass them as "
                "Quantized."
            )
    if row_weight_eC is not None and row_weight_eC.shape != (e, num_rows):
        raise ValueError(
            f"row_weight has shape {row_weight_eC.shape}; with x {x_eCD.shape} it must be "
            f"{(e, num_rows)}."
        )
    if count_es is not None and (
        count_es.ndim != 2 or count_es.shape[0] != e or num_rows % count_es.shape[1]
    ):
        raise ValueError(
            f"count has shape {count_es.shape}; it is [{e}, s], where s blocks divide the "
            f"{num_rows} rows of x."
        )
