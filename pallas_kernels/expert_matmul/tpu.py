"""The products on TPUs: whole contractions in vector memory, and only the rows that hold
something.

A program step multiplies a block of rows [block_rows, K] with a block of columns [K, block_cols]:
all of K at once, so nothing is added up in memory between steps.  Experts are few and huge, so the
weights stream past the rows: read once for each block of rows.

Rows are picked in granules of 32: those that hold a valid row are listed ahead (scalar prefetch)
and gathered, a group of them at a time, into the operand of one product.  So work is proportional
to the rows in use, wherever they lie; the gather costs nothing, since the rows are loaded into
registers anyway.  A block without rows is not even fetched.

Letters: e experts, C rows of an expert's buffer, s source blocks, D model, F ffn, I inputs and O
outputs of a product, G groups of scales, R rows of a group of granules, c columns of a block, b
row blocks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.expert_matmul.quantized import Quantized, Weights, is_valid
from pallas_kernels.select import only_on

_GRANULE = 32  # rows; whole tiles of every dtype down to 8 bits
_LANES = 128
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of one TPU generation.

    group_rows: rows of one product, a multiple of the granule.
    block_rows, block_cols: rows and columns of a grid step's block, for contractions up to 8192
      and above; smaller where they do not fit.
    whole_blocks: whether a block with more than one group of rows in use is one product, which
      suits larger matrix units.
    contraction_part: longest contraction of one product; a longer one becomes a sum of products,
      because its gathered rows would not fit.
    gradient_rows, gradient_in, gradient_out: rows, inputs and outputs of a block of the weight
      gradient.
    vmem_bytes: vector memory that a kernel may take.
    """

    group_rows: int = 256
    block_rows: tuple[int, int] = (1024, 512)
    block_cols: tuple[int, int] = (512, 256)
    whole_blocks: bool = False
    contraction_part: int = 2048
    gradient_rows: int = 4096
    gradient_in: int = 1280
    gradient_out: int = 1152
    vmem_bytes: int = 60 * _MIB


# Found by static cycles of the a52b shapes ([4096, 6400] x [6400, 18304] and back, bfloat16),
# libtpu 0.0.50.1, 2026-11-23 (v6e: 2026-11-25); docs/kernels.md.
CONFIGS = {
    "v4": Config(
        block_rows=(256, 128),
        block_cols=(256, 128),
        gradient_rows=1024,
        gradient_in=512,
        gradient_out=512,
        vmem_bytes=14 * _MIB,
    ),
    "v5e": Config(vmem_bytes=110 * _MIB),
    "v5p": Config(),
    "v6e": Config(
        group_rows=512, block_rows=(1024, 1024), whole_blocks=True, vmem_bytes=110 * _MIB
    ),
    "tpu7x": Config(),
}


def config_of(device_kind: str) -> Config:
    """Returns the block sizes of a jax device_kind; v5p's for a TPU that is not in the table."""
    chip = chips.of_device(device_kind)
    return CONFIGS.get(chip.name if chip else "v5p", CONFIGS["v5p"])


def refuse(
    device_kind: str,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    dtype: Any,
    is_quantized: bool,
) -> str | None:
    """Returns why these sizes cannot be served, or None."""
    del is_quantized  # quantised weights take less room
    if reason := only_on("TPU", device_kind):
        return reason
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"rows are float32 or bfloat16, not {jnp.dtype(dtype).name}"
    cfg, longest = config_of(device_kind), max(x_shape[2], w_shape[2])
    # The narrowest blocks: 128 rows, and 128 columns of gate, up or the two incoming gradients.
    if 2 * longest * jnp.dtype(dtype).itemsize * (128 + 2 * 128) > cfg.vmem_bytes:
        room = cfg.vmem_bytes // _MIB
        return f"a contraction over {longest} does not fit the vector memory ({room} MiB)"
    return None


def gate_up(
    x_eCD, w_gate, w_up, row_weight_eC, count_es, *, save, device_kind, interpret=False, trips=None
):
    """As `reference.gate_up`, in one pass over x for both weights; trips: see `_multiply`."""

    def epilogue(products, tiles, weight_R1):
        del tiles
        gate, up = products
        h = weight_R1 * gate * jax.nn.sigmoid(gate) * up
        return [h, gate, up] if save else [h]

    options = {
        "name": "expert_gate_up",
        "num_out": 3 if save else 1,
        "device_kind": device_kind,
        "interpret": interpret,
        "trips": trips,
    }
    out, _ = _multiply(x_eCD, [w_gate, w_up], [], row_weight_eC, count_es, epilogue, **options)
    return tuple(out) if save else (out[0], None, None)


def matmul(x_eCI, w, count_es, *, device_kind, interpret=False, trips=None):
    """As `reference.matmul`; trips: see `_multiply`."""
    options = {
        "name": "expert_matmul",
        "device_kind": device_kind,
        "interpret": interpret,
        "trips": trips,
    }
    if not isinstance(w, Quantized):
        # Read as [O, I]: w_down was gathered over its O = D, so it lies in memory like this
        # without a copy; see api.py.
        options["transposed"], w = True, w.swapaxes(1, 2)
    (y_eCO,), _ = _multiply(
        x_eCI, [w], [], None, count_es, lambda products, tiles, weight_R1: products, **options
    )
    return y_eCO


def gated_gradient(
    dy_eCD, w_down_eFD, gate_eCF, up_eCF, row_weight_eC, count_es, *, device_kind, interpret=False
):
    """As `reference.gated_gradient`, in one pass over dy."""

    def epilogue(products, tiles, weight_R1):
        (dh,), (gate, up) = products, tiles
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        dproduct = weight_R1 * dh
        return [
            weight_R1 * silu * up,
            dproduct * up * (sigmoid + silu * (1.0 - sigmoid)),
            dproduct * silu,
            silu * up * dh,
        ]

    outs, drow_weight_eC = _multiply(
        dy_eCD,
        [w_down_eFD.swapaxes(1, 2)],  # as it lies in memory, see `matmul`
        [gate_eCF, up_eCF],
        row_weight_eC,
        count_es,
        epilogue,
        num_out=3,
        has_row_sum=True,
        name="expert_gated_gradient",
        device_kind=device_kind,
        interpret=interpret,
    )
    return (*outs, drow_weight_eC)


def input_gradient(
    dgate_eCF, w_gate_eDF, dup_eCF, w_up_eDF, count_es, *, device_kind, interpret=False
):
    """As `reference.input_gradient`, in two calls with a float32 sum between them.

    The operands of both products do not fit the vector memory together.
    """
    options = {
        "name": "expert_input_gradient",
        "transposed": True,
        "device_kind": device_kind,
        "interpret": interpret,
    }
    (first,), _ = _multiply(
        dgate_eCF,
        [w_gate_eDF],
        [],
        None,
        count_es,
        lambda products, tiles, weight_R1: products,
        out_dtype=jnp.float32,
        **options,
    )
    (dx_eCD,), _ = _multiply(
        dup_eCF,
        [w_up_eDF],
        [first],
        None,
        count_es,
        lambda products, tiles, weight_R1: [products[0] + tiles[0]],
        **options,
    )
    return dx_eCD


class _Granules:
    """The granules of each block of rows that hold a valid row, int32, for scalar prefetch.

    num: [e * b], number of such granules in a block.
    offset: [e * b * granules of a block], their first rows within the block in order, padded with
      the last one.
    source: [e * b], the block to fetch: the block itself; if it is empty, the last block before it
      that is not; if there is none, the first that is not.
    is_full: [e * b], 1 if every row of the block is valid and within the buffer.
    """

    def __init__(self, count_es: jax.Array, num_experts: int, num_rows: int, block_rows: int):
        num_blocks, per_block = -(-num_rows // block_rows), block_rows // _GRANULE
        valid_eC = is_valid(count_es, (num_experts, num_rows))
        padded_eC = jnp.pad(valid_eC, ((0, 0), (0, num_blocks * block_rows - num_rows)))
        used_bg = padded_eC.reshape(num_experts * num_blocks, per_block, _GRANULE).any(-1)
        num_b = used_bg.sum(-1, dtype=jnp.int32)
        order_bg = jnp.argsort(~used_bg, axis=-1, stable=True).astype(jnp.int32)
        last_b1 = jnp.maximum(num_b - 1, 0)[:, None]
        position_g = jnp.arange(per_block)[None]
        order_bg = jnp.take_along_axis(order_bg, jnp.minimum(position_g, last_b1), axis=1)
        block_b = jnp.arange(num_experts * num_blocks, dtype=jnp.int32)
        last_used_b = jax.lax.cummax(jnp.where(num_b > 0, block_b, -1))
        self.source = jnp.where(
            last_used_b < 0, jnp.argmax(num_b > 0).astype(jnp.int32), last_used_b
        )
        self.num, self.offset = num_b, (order_bg * _GRANULE).reshape(-1)
        self.is_full = (
            padded_eC.reshape(num_experts * num_blocks, block_rows).all(-1).astype(jnp.int32)
        )

    def arrays(self) -> tuple[jax.Array, ...]:
        """Returns the arrays in the order in which kernels read them."""
        return self.num, self.offset, self.source, self.is_full


def _pick(ref, block_offset: Callable | None, group, group_rows: int, cols=slice(None)):
    """Returns a group's rows [R, cols]: consecutive ones, or the granules of `block_offset`."""
    if block_offset is None:
        return ref[pl.ds(pl.multiple_of(group * group_rows, group_rows), group_rows), cols]
    granules = range(group_rows // _GRANULE)
    return jnp.concatenate(
        [ref[pl.ds(block_offset(group * len(granules) + j), _GRANULE), cols] for j in granules],
        axis=0,
    )


def _put(ref, value, block_offset: Callable | None, group, group_rows: int):
    """Writes rows where `_pick` found them."""
    if block_offset is None:
        ref[pl.ds(pl.multiple_of(group * group_rows, group_rows), group_rows), :] = value
        return
    for j in range(group_rows // _GRANULE):
        ref[pl.ds(block_offset(group * (group_rows // _GRANULE) + j), _GRANULE), :] = value[
            j * _GRANULE : (j + 1) * _GRANULE
        ]


def _multiply(
    x_eCI: jax.Array,
    weights: list[Weights],
    tiles_eCO: list[jax.Array],
    row_weight_eC: jax.Array | None,
    count_es: jax.Array | None,
    epilogue: Callable,
    *,
    num_out: int = 1,
    out_dtype: Any = None,
    has_row_sum: bool = False,
    transposed: bool = False,
    device_kind: str,
    interpret: Any,
    name: str,
    trips: int | None = None,
) -> tuple[list[jax.Array], jax.Array | None]:
    """Computes epilogue([x @ w for w in weights], tiles, row_weight) for every block.

    Args:
      x_eCI: rows.
      weights: [e, I, O], or [e, O, I] if transposed; all arrays or all Quantized.
      tiles_eCO: further inputs, of which the epilogue gets the same rows and columns.
      row_weight_eC, count_es: as in api.py.
      epilogue: (products, tiles, row_weight [R, 1]) -> rows of the outputs, all float32.  Invalid
        rows are zeroed afterwards.
      num_out: number of outputs.
      out_dtype: dtype of the outputs; x's if None.
      has_row_sum: whether the epilogue returns one more array, to be summed over all columns.
      name: name of the kernel in profiles and compiled programs.
      trips: groups of rows of each block instead of those that hold data; only for counting static
        cycles.

    Returns:
      (outputs [e, C, O], row sums float32 [e, C] or None).
    """
    e, num_rows, K = x_eCI.shape
    N = weights[0].shape[1 if transposed else 2]
    dtype, out_dtype = x_eCI.dtype, out_dtype or x_eCI.dtype
    padding = ((0, 0), (0, -num_rows % _GRANULE), (0, 0))
    x_eCI, tiles_eCO = jnp.pad(x_eCI, padding), [jnp.pad(tile, padding) for tile in tiles_eCO]
    C = x_eCI.shape[1]
    blocks = fit_blocks(
        config_of(device_kind),
        C,
        K,
        N,
        dtype.itemsize,
        num_weights=len(weights),
        num_tiles=len(tiles_eCO) + num_out,
    )
    R, block_rows, block_cols = blocks.group_rows, blocks.rows, blocks.cols
    num_blocks, num_cols = pl.cdiv(C, block_rows), pl.cdiv(N, block_cols)
    is_quantized = isinstance(weights[0], Quantized)

    valid_eC = jnp.pad(is_valid(count_es, (e, num_rows)), padding[:2])
    row_weight_eC = (
        jnp.ones((e, C)) if row_weight_eC is None else jnp.pad(row_weight_eC, padding[:2])
    )
    info_eC2 = jnp.stack(
        [row_weight_eC.astype(jnp.float32), valid_eC.astype(jnp.float32)], axis=-1
    )
    listed = (
        ()
        if count_es is None
        else _Granules(valid_eC.astype(jnp.int32), e, C, block_rows).arrays()
    )
    num_lists = len(listed)

    def body(*refs):
        lists, (x_ref, info_ref), refs = (
            refs[:num_lists],
            refs[num_lists : num_lists + 2],
            refs[num_lists + 2 :],
        )
        w_refs, refs = (
            refs[: len(weights) * (1 + is_quantized)],
            refs[len(weights) * (1 + is_quantized) :],
        )
        tile_refs, out_refs = refs[: len(tiles_eCO)], refs[len(tiles_eCO) :]
        block, col_block = pl.program_id(0) * num_blocks + pl.program_id(1), pl.program_id(2)
        per_block = block_rows // _GRANULE
        offset = None
        num_groups = block_rows // R if trips is None else trips
        if lists:
            num_ref, offset_ref, *_ = lists

            def offset(j):
                return pl.multiple_of(offset_ref[block * per_block + j], _GRANULE)

            num_groups = _cdiv(num_ref[block], R // _GRANULE) if trips is None else trips

            @pl.when(num_ref[block] < per_block)
            def _():
                for ref in out_refs[:num_out]:
                    ref[...] = jnp.zeros(ref.shape, ref.dtype)

        if has_row_sum:

            @pl.when(col_block == 0)
            def _():
                out_refs[-1][...] = jnp.zeros(out_refs[-1].shape, jnp.float32)

        def one_group(group, carry, R=R):
            pick = functools.partial(_pick, block_offset=offset, group=group, group_rows=R)
            products = [0.0] * len(weights)
            for part in _parts(
                K, w_refs[1].shape[0] if is_quantized else 1, blocks.contraction_part
            ):
                x_RI = pick(x_ref, cols=part)
                for i in range(len(weights)):
                    w_ref = w_refs[i * (1 + is_quantized)]
                    product = _dot(
                        x_RI, w_ref[:, part] if transposed else w_ref[part, :], transposed
                    )
                    if is_quantized:
                        scale_ref = w_refs[2 * i + 1]
                        product *= scale_ref[pl.ds(part.start * scale_ref.shape[0] // K, 1), :]
                    products[i] += product
            info_R2 = pick(info_ref)
            outs = epilogue(
                products, [pick(ref).astype(jnp.float32) for ref in tile_refs], info_R2[:, :1]
            )
            is_valid_R1 = info_R2[:, 1:] > 0.0
            for ref, out in zip(out_refs[:num_out], outs, strict=False):
                _put(
                    ref,
                    (jnp.where(is_valid_R1, out, 0.0) if lists else out).astype(ref.dtype),
                    offset,
                    group,
                    R,
                )
            if has_row_sum:
                # The last block's columns beyond the array hold anything.
                col_1c = col_block * block_cols + jax.lax.broadcasted_iota(
                    jnp.int32, (1, block_cols), 1
                )
                terms = jnp.where(is_valid_R1 & (col_1c < N), outs[num_out], 0.0)
                _add_row_sums(
                    out_refs[-1],
                    terms.sum(-1, keepdims=True),
                    offset,
                    group,
                    lists[0][block] if lists else None,
                )
            return carry

        def groups():
            jax.lax.fori_loop(0, num_groups, one_group, 0)

        def whole_block():
            one_group(0, 0, block_rows)

        if not blocks.is_whole or trips is not None:
            groups()
        elif lists:
            pl.when(num_groups > 1)(whole_block)
            pl.when(num_groups <= 1)(groups)
        else:
            whole_block()

    def source(expert, block, col, *lists):
        """Expert, row block and column block to fetch."""
        if not lists:
            return expert, block, col
        num_ref, _, source_ref, _ = lists
        own = expert * num_blocks + block
        src = source_ref[own]
        # An empty block names the last fetch of the used block before it, or the first fetch of
        # the used block after it, so that nothing is fetched for it.
        col = jnp.where(num_ref[own] > 0, col, jnp.where(src < own, num_cols - 1, 0))
        return jax.lax.div(src, num_blocks), jax.lax.rem(src, num_blocks), col

    def spec(shape, index):
        return pl.BlockSpec((None, *shape), lambda *at: index(*source(*at)))

    rows_of = spec((block_rows, K), lambda expert, block, col: (expert, block, 0))
    info_of = spec((block_rows, 2), lambda expert, block, col: (expert, block, 0))
    if transposed:
        w_specs = [spec((block_cols, K), lambda expert, block, col: (expert, col, 0))]
    else:
        w_specs = [spec((K, block_cols), lambda expert, block, col: (expert, 0, col))]
    if is_quantized:
        w_specs.append(
            spec(
                (weights[0].scale_eGO.shape[1], block_cols),
                lambda expert, block, col: (expert, 0, col),
            )
        )
    tile_of = spec((block_rows, block_cols), lambda expert, block, col: (expert, block, col))
    out_of = pl.BlockSpec(
        (None, block_rows, block_cols), lambda expert, block, col, *_: (expert, block, col)
    )
    sum_of = pl.BlockSpec((None, block_rows, 1), lambda expert, block, col, *_: (expert, block, 0))
    out = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=num_lists,
            grid=(e, num_blocks, num_cols),
            in_specs=[rows_of, info_of, *w_specs * len(weights), *[tile_of] * len(tiles_eCO)],
            out_specs=[out_of] * num_out + [sum_of] * has_row_sum,
        ),
        out_shape=[jax.ShapeDtypeStruct((e, C, N), out_dtype)] * num_out
        + [jax.ShapeDtypeStruct((e, C, 1), jnp.float32)] * has_row_sum,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * e * C * K * N * len(weights),
            bytes_accessed=sum(w.nbytes for w in jax.tree.leaves(weights))
            + e * C * (K + N * num_out) * dtype.itemsize,
            transcendentals=e * C * N if len(weights) > 1 or has_row_sum else 0,
        ),
        name=name,
        interpret=interpret,
    )(*listed, x_eCI, info_eC2, *jax.tree.leaves(weights), *tiles_eCO)
    outs = [a[:, :num_rows] for a in out[:num_out]]
    return outs, out[-1][:, :num_rows, 0] if has_row_sum else None


def _cdiv(a, b: int):
    # Not // and %: on traced numbers they ask jax for the device, which is wrong when a CPU
    # compiles for a pod.
    return jax.lax.div(a + b - 1, b)


def _dot(x_RI, w, transposed: bool):
    # HIGHEST: by default a TPU multiplies float32 in one bfloat16 pass.
    precision = jax.lax.Precision.HIGHEST if x_RI.dtype == jnp.float32 else None
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(
        x_RI,
        w.astype(x_RI.dtype),
        contract,
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _parts(K: int, num_groups: int, longest: int) -> list[slice]:
    """Cuts the contraction into parts of at most `longest`, each within one group of scales."""
    group = K // num_groups
    starts = [
        start for first in range(0, K, group) for start in range(first, first + group, longest)
    ]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], K], strict=True)]


def _add_row_sums(ref, sums_R1, block_offset: Callable | None, group, num_granules):
    if block_offset is None:
        R = sums_R1.shape[0]
        ref[pl.ds(pl.multiple_of(group * R, R), R), :] += sums_R1
        return
    per_group = sums_R1.shape[0] // _GRANULE
    for j in range(per_group):

        @pl.when(group * per_group + j < num_granules)  # the others repeat the last one
        def _(j=j):
            ref[pl.ds(block_offset(group * per_group + j), _GRANULE), :] += sums_R1[
                j * _GRANULE : (j + 1) * _GRANULE
            ]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of `Config` cut down to one problem and to the vector memory."""

    group_rows: int
    rows: int
    cols: int
    is_whole: bool
    contraction_part: int
    vmem_bytes: int


def fit_blocks(
    cfg: Config, C: int, K: int, N: int, itemsize: int, num_weights: int, num_tiles: int
) -> Blocks:
    """Returns the block sizes of a product [C, K] x [K, N] with num_weights weights and num_tiles
    further arrays [C, N], inputs or outputs.
    """
    size = int(K > 8192)
    group = min(cfg.group_rows, C)
    rows, cols = max(min(cfg.block_rows[size], C) // group * group, group), cfg.block_cols[size]

    def used(group, rows, cols):
        columns, product = min(cols, N), rows if cfg.whole_blocks else group
        blocks = rows * K + num_weights * K * columns + num_tiles * rows * columns
        return (
            2 * itemsize * blocks
            + product * (itemsize * min(K, cfg.contraction_part) + 16 * columns)
            + rows * 1024
        )

    while used(group, rows, cols) > cfg.vmem_bytes - 2 * _MIB and (
        cols > 128 or rows > group or group > _GRANULE
    ):
        if cols > 128 and cols * num_weights >= rows:
            cols //= 2
        elif rows > group:
            rows = max(rows // 2 // group * group, group)
        elif cols > 128:
            cols //= 2
        else:
            group = rows = max(group // 2 // _GRANULE * _GRANULE, _GRANULE)
    return Blocks(
        group,
        rows,
        min(cols, N),
        cfg.whole_blocks and rows > group,
        cfg.contraction_part,
        cfg.vmem_bytes,
    )


def weight_gradient(x_eCI, dy_eCO, count_es, dtype, *, device_kind, interpret=False):
    """As `reference.weight_gradient`, summed in float32.

    A full block is one product; of other blocks the valid granules are multiplied in groups.
    """
    cfg = config_of(device_kind)
    e, num_rows, num_in = x_eCI.shape
    num_out, itemsize = dy_eCO.shape[2], x_eCI.dtype.itemsize
    padding = ((0, 0), (0, -num_rows % _GRANULE), (0, 0))
    x_eCI, dy_eCO = jnp.pad(x_eCI, padding), jnp.pad(dy_eCO, padding)
    C = x_eCI.shape[1]
    rows, block_in, block_out = _fit_gradient(cfg, C, num_in, num_out, itemsize)
    R, width = (
        min(cfg.group_rows, rows),
        math.gcd(block_in, 256) if block_in % _LANES == 0 else block_in,
    )
    num_blocks, per_block, per_group = pl.cdiv(C, rows), rows // _GRANULE, R // _GRANULE
    valid_eC = jnp.pad(is_valid(count_es, (e, num_rows)), padding[:2])
    # If the last block reaches beyond the array, its rows there have to be left out.
    is_dense = count_es is None and C % rows == 0
    listed = () if is_dense else _Granules(valid_eC.astype(jnp.int32), e, C, rows).arrays()
    info_eC1 = valid_eC[..., None].astype(jnp.float32)
    contract = (((0,), (0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x_eCI.dtype == jnp.float32 else None

    def body(*refs):
        lists, (x_ref, dy_ref, info_ref, dw_ref), scratch = (
            refs[: len(listed)],
            refs[len(listed) : len(listed) + 4],
            refs[len(listed) + 4 :],
        )
        block = pl.program_id(0) * num_blocks + pl.program_id(3)

        def whole_block(put):
            """Calls put(inputs, product) for `width` inputs at a time, in a loop: unrolled
            it takes long to compile.
            """

            def some_inputs(part, carry):
                inputs = pl.ds(pl.multiple_of(part * width, width), width)
                product = jax.lax.dot_general(
                    x_ref[:, inputs],
                    dy_ref[...],
                    contract,
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )
                put(inputs, product)
                return carry

            jax.lax.fori_loop(0, block_in // width, some_inputs, 0)

        if is_dense and num_blocks == 1:

            def write(inputs, product):
                dw_ref[inputs, :] = product.astype(dw_ref.dtype)

            whole_block(write)
            return
        (acc_ref,) = scratch

        @pl.when(pl.program_id(3) == 0)
        def _():
            acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

        def add(inputs, product):
            acc_ref[inputs, :] += product

        def add_whole_block():
            whole_block(add)

        def add_groups(num_ref, offset_ref):
            def offset(j):
                return pl.multiple_of(offset_ref[block * per_block + j], _GRANULE)

            def one_group(group, carry):
                pick = functools.partial(_pick, block_offset=offset, group=group, group_rows=R)
                # The granules that pad the last group repeat one that is counted already.
                position_R1 = group * R + jax.lax.broadcasted_iota(jnp.int32, (R, 1), 0)
                is_valid_R1 = (pick(info_ref) > 0.0) & (position_R1 < num_ref[block] * _GRANULE)
                x_RI, dy_RO = (jnp.where(is_valid_R1, pick(ref), 0) for ref in (x_ref, dy_ref))
                acc_ref[...] += jax.lax.dot_general(
                    x_RI, dy_RO, contract, precision=precision, preferred_element_type=jnp.float32
                )
                return carry

            jax.lax.fori_loop(0, _cdiv(num_ref[block], per_group), one_group, 0)

        if lists:
            num_ref, offset_ref, _, is_full_ref = lists
            pl.when(is_full_ref[block] == 1)(add_whole_block)
            pl.when(is_full_ref[block] == 0)(lambda: add_groups(num_ref, offset_ref))
        else:
            add_whole_block()

        @pl.when(pl.program_id(3) == num_blocks - 1)
        def _():
            dw_ref[...] = acc_ref[...].astype(dw_ref.dtype)

    def spec(width, index):
        return pl.BlockSpec(
            (None, rows, width), lambda expert, i, o, block, *_: (expert, block, index(i, o))
        )

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(listed),
            grid=(e, pl.cdiv(num_in, block_in), pl.cdiv(num_out, block_out), num_blocks),
            in_specs=[
                spec(block_in, lambda i, o: i),
                spec(block_out, lambda i, o: o),
                spec(1, lambda i, o: 0),
            ],
            out_specs=pl.BlockSpec(
                (None, block_in, block_out), lambda expert, i, o, *_: (expert, i, o)
            ),
            scratch_shapes=[]
            if is_dense and num_blocks == 1
            else [pltpu.VMEM((block_in, block_out), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((e, num_in, num_out), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=cfg.vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * e * C * num_in * num_out,
            bytes_accessed=x_eCI.nbytes
            + dy_eCO.nbytes
            + e * num_in * num_out * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        name="expert_weight_gradient",
        interpret=interpret,
    )(*listed, x_eCI, dy_eCO, info_eC1)


def _fit_gradient(
    cfg: Config, C: int, num_in: int, num_out: int, itemsize: int
) -> tuple[int, int, int]:
    """Returns (rows, inputs, outputs) of a block of the weight gradient."""
    group = min(cfg.group_rows, C)
    rows, block_in, block_out = (
        min(cfg.gradient_rows, C) // group * group,
        min(cfg.gradient_in, num_in),
        min(cfg.gradient_out, num_out),
    )

    def used():
        return (
            2 * itemsize * (rows * (block_in + block_out) + block_in * block_out)
            + 4 * block_in * block_out
            + rows * 1024
        )

    while used() > cfg.vmem_bytes - 2 * _MIB:
        if rows > group and rows * itemsize > 2048:
            rows = max(rows // 2 // group * group, group)
        elif block_out >= block_in:
            block_out = max(block_out // 2 // 128 * 128, 128)
        else:
            block_in = max(block_in // 2 // 128 * 128, 128)
    return rows, block_in, block_out
