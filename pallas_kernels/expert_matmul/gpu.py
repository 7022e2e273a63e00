"""Expert matmuls on Hopper GPUs in Pallas Mosaic GPU; never ran on a GPU.

Shape letters: e experts, C rows of an expert's buffer, s source blocks of C/s rows, D model, F
ffn, I and O any two dims of a matmul.

One kernel structure serves all five operations (`_persistent`).  A block of three warp-groups owns
tiles of 128 x 256 outputs.  One warp-group only issues copies into a ring of stages, 64 deep along
the contraction.  The two others hold 64 x 256 float32 sums each in registers and multiply; one
matmul is in flight while the next is issued.

Two blocks, one tile below the other, form a cluster and share the right operand: each fetches one
half for both, since the L2 cache cannot feed 132 multiprocessors with 48 bytes a cycle each.  The
kernel runs one block per multiprocessor.  The order of tiles keeps a wave's operands in L2, and
copies run ahead into the next tile while the last one is written.

Tiles of 128 rows with a valid row are listed first (`_row_tiles`), so that clusters can pair any
two of them; tiles without one do no steps and write zeros.  The sum over rows in `weight_gradient`
lists blocks of 64 rows: full ones, then partial ones, which are cleaned in shared memory before
they are multiplied.  Invalid rows may hold anything.

Arguments of all functions: x and weights bfloat16 [e, ., .], row_weight any float [e, C], count
int32 [e, s] or None (all rows valid), in shapes that `refuse` accepts.  device_kind is not used:
all Hopper GPUs share one configuration.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, select
from pallas_kernels.expert_matmul.quantized import is_valid

_ROWS, _COLUMNS, _DEPTH = 128, 256, 64  # one tile, and one step of its contraction
_CONSUMERS = 2  # warp-groups that multiply, 64 rows of the tile each; the third one copies
_CHUNK = 64  # columns of one store
_SWIZZLE = 128  # bytes
_SHARED_BYTES = 224 * 2**10  # for operands and staging, of 227 KiB


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels use the chip; chosen 2026-11 from published facts, not measured.

    ptxas 12.9 compiles them for sm_90a.
    cluster: blocks that share the right operand.
    clusters: clusters that run at once; cluster * clusters is the number of multiprocessors.
    group: row tiles (times cluster) of a wave: 66 clusters read 8 x 256 rows and about 8 x 256
      columns.
    """

    cluster: int = 2
    clusters: int = 66
    group: int = 8


HOPPER = Config()


def refuse(
    device_kind: str,
    x_shape: Sequence[int],
    w_gate_shape: Sequence[int],
    dtype: Any,
    is_quantized: bool,
) -> str | None:
    """Returns why these kernels cannot serve x [e, C, D] with w_gate [e, D, F], or None."""
    if reason := select.only_on_hopper(device_kind):
        return reason
    if is_quantized:
        return "has no quantised weights"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"needs bfloat16, not {jnp.dtype(dtype).name}"
    (_, rows, dim), (_, _, ffn) = x_shape, w_gate_shape
    if rows % (_ROWS * HOPPER.cluster):
        return f"needs rows that are a multiple of {_ROWS * HOPPER.cluster}, not {rows}"
    for size in (dim, ffn):
        if size % _DEPTH or size < _ROWS * HOPPER.cluster:
            return (
                f"needs model and ffn dims that are multiples of {_DEPTH} and at least "
                f"{_ROWS * HOPPER.cluster}, not {size}"
            )
    return None


def gate_up(
    x_eCD: jax.Array,
    w_gate_eDF: jax.Array,
    w_up_eDF: jax.Array,
    row_weight_eC: jax.Array,
    count_es: jax.Array | None,
    *,
    save: bool,
    device_kind: str,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """As `reference.gate_up`; zero in invalid rows."""
    del device_kind

    def finish(tile: "_Tile", products: list[jax.Array], refs: Any, staging: "_Staging") -> None:
        weight, validity = (
            _spread(ref.at[tile.expert, tile.rows]) for ref in (refs.row_weight, refs.is_valid)
        )
        for chunk in range(_COLUMNS // 2 // _CHUNK):
            gate, up = (_columns(product, chunk) for product in products)
            for out, value in zip(
                refs.outputs, (weight * gate * jax.nn.sigmoid(gate) * up, gate, up), strict=False
            ):
                staging.store(out, tile, chunk, jnp.where(validity > 0, value, 0.0))

    out = jax.ShapeDtypeStruct((*x_eCD.shape[:2], w_gate_eDF.shape[-1]), x_eCD.dtype)
    outputs = _by_rows(
        [(x_eCD, [w_gate_eDF, w_up_eDF])],
        row_weight_eC,
        (),
        count_es,
        finish,
        [out] * (3 if save else 1),
        transposed=False,
        interpret=interpret,
    )
    return (*outputs, None, None)[:3]


def matmul(
    x_eCI: jax.Array,
    w_eIO: jax.Array,
    count_es: jax.Array | None,
    *,
    device_kind: str,
    interpret: Any = False,
) -> jax.Array:
    """As `reference.matmul`; zero in invalid rows."""
    del device_kind
    out = jax.ShapeDtypeStruct((*x_eCI.shape[:2], w_eIO.shape[-1]), x_eCI.dtype)
    (y_eCO,) = _by_rows(
        [(x_eCI, [w_eIO])],
        None,
        (),
        count_es,
        _store_valid,
        [out],
        transposed=False,
        interpret=interpret,
    )
    return y_eCO


def input_gradient(
    dgate_eCF: jax.Array,
    w_gate_eDF: jax.Array,
    dup_eCF: jax.Array,
    w_up_eDF: jax.Array,
    count_es: jax.Array | None,
    *,
    device_kind: str,
    interpret: Any = False,
) -> jax.Array:
    """As `reference.input_gradient`, summed in float32; zero in invalid rows."""
    del device_kind
    out = jax.ShapeDtypeStruct((*dgate_eCF.shape[:2], w_gate_eDF.shape[1]), dgate_eCF.dtype)
    terms = [(dgate_eCF, [w_gate_eDF]), (dup_eCF, [w_up_eDF])]
    (dx_eCD,) = _by_rows(
        terms, None, (), count_es, _store_valid, [out], transposed=True, interpret=interpret
    )
    return dx_eCD


def gated_gradient(
    dy_eCD: jax.Array,
    w_down_eFD: jax.Array,
    gate_eCF: jax.Array,
    up_eCF: jax.Array,
    row_weight_eC: jax.Array,
    count_es: jax.Array | None,
    *,
    device_kind: str,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `reference.gated_gradient`; zero in invalid rows."""
    del device_kind

    def finish(tile: "_Tile", products: list[jax.Array], refs: Any, staging: "_Staging") -> None:
        num_chunks = _COLUMNS // _CHUNK
        weight, validity = (
            _spread(ref.at[tile.expert, tile.rows]) for ref in (refs.row_weight, refs.is_valid)
        )
        for chunk in range(num_chunks):
            if 0 < chunk < num_chunks - 1:
                staging.fetch(refs.extra, tile, chunk + 1)
            gate, up = staging.fetched(chunk)
            dh = _columns(products[0], chunk)
            sigmoid = jax.nn.sigmoid(gate)
            silu = gate * sigmoid
            values = (
                weight * silu * up,
                weight * dh * up * sigmoid * (1.0 + gate - silu),
                weight * dh * silu,
            )
            staging.store_in_place(
                refs.outputs[:3],
                tile,
                chunk,
                [jnp.where(validity > 0, value, 0.0) for value in values],
            )
            drow = jnp.sum(jnp.where(validity > 0, dh * silu * up, 0.0), axis=1)

            @pl.when(tile.is_owned(chunk, _CHUNK))
            def _(chunk=chunk, drow=drow):  # XLA adds up these sums of 64 columns.
                refs.outputs[3][tile.expert, tile.column // _CHUNK + chunk, tile.rows] = drow

    experts, num_rows, ffn = gate_eCF.shape
    out = jax.ShapeDtypeStruct(gate_eCF.shape, gate_eCF.dtype)
    partial = jax.ShapeDtypeStruct((experts, ffn // _CHUNK, num_rows), jnp.float32)
    h_eCF, dgate_eCF, dup_eCF, drow_enC = _by_rows(
        [(dy_eCD, [w_down_eFD])],
        row_weight_eC,
        (gate_eCF, up_eCF),
        count_es,
        finish,
        [out, out, out, partial],
        transposed=True,
        interpret=interpret,
    )
    return h_eCF, dgate_eCF, dup_eCF, jnp.sum(drow_enC, axis=1)


def weight_gradient(
    x_eCI: jax.Array,
    dy_eCO: jax.Array,
    count_es: jax.Array | None,
    dtype: Any,
    *,
    device_kind: str,
    interpret: Any = False,
) -> jax.Array:
    """As `reference.weight_gradient`, summed in float32."""
    del device_kind
    config, (experts, num_rows, left), right = HOPPER, x_eCI.shape, dy_eCO.shape[-1]
    is_valid_eC = is_valid(count_es, (experts, num_rows)).astype(jnp.float32)
    bands, columns = pl.cdiv(left, _ROWS * config.cluster), pl.cdiv(right, _COLUMNS)
    out = jax.ShapeDtypeStruct((experts, left, right), dtype)

    def body(
        x_ref,
        dy_ref,
        is_valid_ref,
        blocks_ref,
        full_ref,
        some_ref,
        out_ref,
        ring_refs,
        staging_refs,
        cleaned,
    ):
        ring, staging = _Ring(config, *ring_refs), _Staging(*staging_refs)

        def locate(index: jax.Array) -> _Tile:
            expert = lax.div(index, bands * columns)
            band, column = _grouped(
                lax.rem(index, bands * columns), jnp.int32(bands), columns, config.group
            )
            row = _inside(band, _ROWS * config.cluster, left) + lax.axis_index("block") * _ROWS
            owned = band * (_ROWS * config.cluster), column * _COLUMNS
            return _Tile(expert, row, _inside(column, _COLUMNS, right), some_ref[expert], *owned)

        def fetch(tile: _Tile, step: jax.Array, slot: jax.Array) -> None:
            rows = pl.ds(blocks_ref[tile.expert, step] * _DEPTH, _DEPTH)
            ring.fetch_left(x_ref.at[tile.expert, rows, pl.ds(tile.row, _ROWS)], slot)
            ring.fetch_right(0, dy_ref.at[tile.expert, rows, pl.ds(tile.column, _COLUMNS)], slot)

        def multiply(tile: _Tile, step: jax.Array, slot: jax.Array, sums: Sequence[Any]) -> None:
            del tile, step
            plgpu.wgmma(
                sums[0], ring.left.at[slot, :, _half()].transpose((1, 0)), ring.rights[0].at[slot]
            )

        def clean_and_multiply(
            tile: _Tile, step: jax.Array, slot: jax.Array, sums: Sequence[Any]
        ) -> None:
            rows = pl.ds(blocks_ref[tile.expert, step] * _DEPTH, _DEPTH)
            is_kept = _spread(is_valid_ref.at[tile.expert, rows]) > 0
            for consumer, operand in enumerate((ring.left, ring.rights[0])):
                pl.when(lax.axis_index("warpgroup") == consumer)(
                    functools.partial(_zero_rows, operand.at[slot], is_kept)
                )
            plgpu.barrier_arrive(cleaned)
            plgpu.barrier_wait(cleaned)
            multiply(tile, step, slot, sums)

        def finish(tile: _Tile, products: Sequence[jax.Array]) -> None:
            for chunk in range(_COLUMNS // staging.width):
                staging.store(out_ref, tile, chunk, _columns(products[0], chunk, staging.width))

        phases = [
            (lambda tile: full_ref[tile.expert], multiply),
            (lambda tile: tile.steps, clean_and_multiply),
        ]
        _persistent(config, experts * bands * columns, ring, locate, fetch, phases, finish)

    staging = _Staging.scratch(2, dtype)
    ring = _Ring.scratch(config, (_DEPTH, _ROWS), [(_DEPTH, _COLUMNS)], x_eCI.dtype, staging)
    scratch = (ring, staging, plgpu.Barrier(num_arrivals=_CONSUMERS))
    (dw_eIO,) = _launch(body, [out], scratch, config, interpret)(
        x_eCI, dy_eCO, is_valid_eC, *_row_blocks(is_valid_eC)
    )
    return dw_eIO


def _by_rows(
    terms: Sequence[tuple[jax.Array, Sequence[jax.Array]]],
    row_weight_eC: jax.Array | None,
    extra: Sequence[jax.Array],
    count_es: jax.Array | None,
    finish: Callable,
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    transposed: bool,
    interpret: Any,
) -> Sequence[jax.Array]:
    """Sums left @ right over terms for the valid rows; `finish` writes outputs from the sums.

    There is one sum per right operand of a term.

    Args:
      terms: (left [e, C, K], rights [e, K, N], or [e, N, K] if `transposed`), with equal shapes.
      row_weight_eC: factor of each row, for `finish`.
      extra: arrays [e, C, N] that `finish` reads; their first chunks are fetched before the sums
        are ready.
      finish: (tile, sums, refs, staging) -> None.
    """
    config, num_terms, num_rights = HOPPER, len(terms), len(terms[0][1])
    (experts, num_rows, depth), width = terms[0][0].shape, _COLUMNS // num_rights
    num_columns = terms[0][1][0].shape[1 if transposed else 2]
    is_valid_eC = is_valid(count_es, (experts, num_rows)).astype(jnp.float32)
    groups, columns = experts * num_rows // (_ROWS * config.cluster), pl.cdiv(num_columns, width)
    operands = [operand for left, rights in terms for operand in (left, *rights)]
    steps_per_term = depth // _DEPTH

    def body(*all_refs):
        *refs, ring_refs, staging_refs = all_refs
        operand_refs, (tiles_ref, active_ref), refs = (
            refs[: len(operands)],
            refs[len(operands) :][:2],
            refs[len(operands) + 2 :],
        )
        vector_refs, extra_refs, output_refs = (
            refs[:2],
            refs[2 : 2 + len(extra)],
            refs[2 + len(extra) :],
        )
        refs = _Refs(*vector_refs, extra_refs, output_refs)
        ring, staging = _Ring(config, *ring_refs), _Staging(*staging_refs)

        def locate(index: jax.Array) -> _Tile:
            num_active = active_ref[0]
            is_active = index < num_active * columns
            skipped = lax.select(is_active, 0, num_active)
            height = lax.select(is_active, num_active, groups - num_active)
            group, column = _grouped(index - skipped * columns, height, columns, config.group)
            row_tile = tiles_ref[(group + skipped) * config.cluster + lax.axis_index("block")]
            expert, row = (
                lax.div(row_tile, num_rows // _ROWS),
                lax.rem(row_tile, num_rows // _ROWS) * _ROWS,
            )
            steps = lax.select(is_active, num_terms * steps_per_term, 0)
            return _Tile(
                expert, row, _inside(column, width, num_columns), steps, row, column * width
            )

        def fetch(tile: _Tile, step: jax.Array, slot: jax.Array) -> None:
            for term in range(num_terms):
                left, *rights = operand_refs[term * (1 + num_rights) :][: 1 + num_rights]

                @pl.when((step >= term * steps_per_term) & (step < (term + 1) * steps_per_term))
                def _(left=left, rights=rights, term=term):
                    inner = pl.ds((step - term * steps_per_term) * _DEPTH, _DEPTH)
                    ring.fetch_left(left.at[tile.expert, pl.ds(tile.row, _ROWS), inner], slot)
                    outer = pl.ds(tile.column, width)
                    for i, right in enumerate(rights):
                        ring.fetch_right(
                            i,
                            right.at[
                                (tile.expert, outer, inner)
                                if transposed
                                else (tile.expert, inner, outer)
                            ],
                            slot,
                        )

        def multiply(tile: _Tile, step: jax.Array, slot: jax.Array, sums: Sequence[Any]) -> None:
            del tile, step
            for total, right in zip(sums, ring.rights, strict=True):
                right = right.at[slot].transpose((1, 0)) if transposed else right.at[slot]
                plgpu.wgmma(total, ring.left.at[slot, _half()], right)

        def begin(tile: _Tile) -> None:
            for chunk in range(2 if extra else 0):
                staging.fetch(refs.extra, tile, chunk)

        _persistent(
            config,
            groups * columns,
            ring,
            locate,
            fetch,
            [(lambda tile: tile.steps, multiply)],
            lambda tile, products: finish(tile, products, refs, staging),
            begin,
        )

    staging = _Staging.scratch(2 * len(extra) + 1 if extra else 2, outputs[0].dtype)
    ring_rights = [(width, _DEPTH) if transposed else (_DEPTH, width)] * num_rights
    ring = _Ring.scratch(config, (_ROWS, _DEPTH), ring_rights, operands[0].dtype, staging)
    row_weight_eC = is_valid_eC if row_weight_eC is None else row_weight_eC.astype(jnp.float32)
    launched = _launch(body, outputs, (ring, staging), config, interpret)
    return launched(
        *operands, *_row_tiles(is_valid_eC, config.cluster), is_valid_eC, row_weight_eC, *extra
    )


def _store_valid(
    tile: "_Tile", products: Sequence[jax.Array], refs: "_Refs", staging: "_Staging"
) -> None:
    is_kept = _spread(refs.is_valid.at[tile.expert, tile.rows]) > 0
    for chunk in range(_COLUMNS // staging.width):
        staging.store(
            refs.outputs[0],
            tile,
            chunk,
            jnp.where(is_kept, _columns(products[0], chunk, staging.width), 0.0),
        )


# The structure of a kernel.


class _Tile(NamedTuple):
    """A block's tile of outputs: where it begins, its contraction steps, and what it owns.

    The last tile of a dim is moved back inside it, where it recomputes what a neighbour writes.
    It writes only from `owned_row` and `owned_column` on.
    """

    expert: jax.Array
    row: jax.Array
    column: jax.Array
    steps: jax.Array
    owned_row: jax.Array
    owned_column: jax.Array

    @property
    def rows(self) -> Any:
        """Rows of this consumer."""
        return pl.ds(
            self.row + lax.axis_index("warpgroup") * (_ROWS // _CONSUMERS), _ROWS // _CONSUMERS
        )

    def columns(self, chunk: int, width: int) -> Any:
        """Returns the columns of a chunk."""
        return pl.ds(self.column + chunk * width, width)

    def is_owned(self, chunk: int, width: int) -> jax.Array:
        """Returns whether this consumer writes a chunk."""
        return (self.rows.start >= self.owned_row) & (
            self.columns(chunk, width).start >= self.owned_column
        )


class _Refs(NamedTuple):
    is_valid: Any
    row_weight: Any
    extra: Sequence[Any]
    outputs: Sequence[Any]


def _persistent(
    config: Config,
    num_tiles: int,
    ring: "_Ring",
    locate: Callable[[jax.Array], _Tile],
    fetch: Callable,
    phases: Sequence[tuple[Callable, Callable]],
    finish: Callable,
    begin: Callable = lambda tile: None,
) -> None:
    """Runs the three warp-groups of one block over all of its tiles.

    Args:
      num_tiles: tiles of all clusters; cluster i takes tiles i, i + clusters, ..., and each of its
        blocks one tile of its own.
      locate: index -> tile.
      fetch: (tile, step, slot) -> None, starts the copies of a step into the ring.
      phases: (end(tile), multiply(tile, step, slot, sums)); `multiply` serves the steps from the
        end of the last phase up to its own.
      finish: (tile, sums) -> None, writes the tile.
      begin: (tile) -> None, starts to load what `finish` needs.
    """
    first = lax.axis_index("cluster")
    num_mine = lax.div(num_tiles - first + (config.clusters - 1), config.clusters)

    @pl.when(lax.axis_index("warpgroup") == _CONSUMERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        def produce(i: jax.Array, done: jax.Array) -> jax.Array:
            tile = locate(first + i * config.clusters)

            def step(k: jax.Array, done: jax.Array) -> jax.Array:
                pl.when(done >= ring.stages)(lambda: ring.wait_free(done))
                fetch(tile, k, ring.slot(done))
                return done + 1

            return lax.fori_loop(0, tile.steps, step, done)

        done = lax.fori_loop(0, num_mine, produce, jnp.int32(0))
        # The other block may still read or signal this one's memory: wait until all slots are
        # free.
        lax.fori_loop(lax.max(done - ring.stages, 0), done, lambda i, _: ring.wait_free(i), None)

    @pl.when(lax.axis_index("warpgroup") < _CONSUMERS)
    def _():
        plgpu.set_max_registers(240, action="increase")

        def consume(i: jax.Array, done: jax.Array) -> jax.Array:
            tile = locate(first + i * config.clusters)
            begin(tile)

            def accumulate(*sums):
                start, after = 0, done
                for end, multiply in phases:
                    stop = end(tile)
                    after = lax.fori_loop(
                        start, stop, functools.partial(step, multiply, sums), after
                    )
                    start = stop
                products = [total[...] for total in sums]
                pl.when(tile.steps > 0)(lambda: ring.release(after - 1))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # The last tile's stores.
                finish(tile, products)
                return after

            def step(
                multiply: Callable, sums: Sequence[Any], k: jax.Array, done: jax.Array
            ) -> jax.Array:
                ring.wait_full(done)
                multiply(tile, k, ring.slot(done), sums)
                # All but this step's products are complete, so the slot before is free.
                plgpu.wgmma_wait(len(sums))
                pl.when(k > 0)(lambda: ring.release(done - 1))
                return done + 1

            return pl.run_scoped(accumulate, *ring.sums())

        lax.fori_loop(0, num_mine, consume, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


class _Ring:
    """Stages of operands in shared memory, with barriers for full and free slots."""

    def __init__(self, config: Config, left: Any, rights: Sequence[Any], full: Any, free: Any):
        self.left, self.rights, self._full, self._free = left, rights, full, free
        self.stages = left.shape[0]
        self._sharers = "block" if config.cluster > 1 else None

    @staticmethod
    def scratch(
        config: Config,
        left: tuple[int, int],
        rights: Sequence[tuple[int, int]],
        dtype: Any,
        staging: Sequence[Any],
    ) -> tuple[Any, ...]:
        num_bytes = jnp.dtype(dtype).itemsize * sum(
            rows * columns for rows, columns in (left, *rights)
        )
        staging_bytes = jnp.dtype(staging[0].dtype).itemsize * math.prod(staging[0].shape)
        stages = (_SHARED_BYTES - staging_bytes) // num_bytes
        free = {"num_arrivals": _CONSUMERS, "num_barriers": stages}
        return (
            hopper.tiled_smem((stages, *left), dtype, _SWIZZLE),
            [hopper.tiled_smem((stages, *right), dtype, _SWIZZLE) for right in rights],
            plgpu.Barrier(num_arrivals=1 + len(rights), num_barriers=stages),
            plgpu.ClusterBarrier(collective_axes=("block",), **free)
            if config.cluster > 1
            else plgpu.Barrier(**free),
        )

    def sums(self) -> list[Any]:
        """Returns one accumulator per right operand."""
        return [plgpu.ACC((_ROWS // _CONSUMERS, _COLUMNS // len(self.rights)), jnp.float32)] * len(
            self.rights
        )

    def slot(self, done: jax.Array) -> jax.Array:
        return lax.rem(done, jnp.int32(self.stages))

    def fetch_left(self, source: Any, slot: jax.Array) -> None:
        plgpu.copy_gmem_to_smem(source, self.left.at[slot], self._full.at[slot])

    def fetch_right(self, i: int, source: Any, slot: jax.Array) -> None:
        plgpu.copy_gmem_to_smem(
            source, self.rights[i].at[slot], self._full.at[slot], collective_axes=self._sharers
        )

    def wait_full(self, done: jax.Array) -> None:
        plgpu.barrier_wait(self._full.at[self.slot(done)])

    def wait_free(self, done: jax.Array) -> None:
        plgpu.barrier_wait(self._free.at[self.slot(done)])

    def release(self, done: jax.Array) -> None:
        plgpu.barrier_arrive(self._free.at[self.slot(done)])


class _Staging:
    """Shared memory through which a consumer stores results and, with `loaded`, loads extras."""

    def __init__(self, buffer: Any, loaded: Any = None):
        self._buffer, self._loaded, self._num_stores = buffer, loaded, 0
        self.width = buffer.shape[-1]

    @staticmethod
    def scratch(slots: int, dtype: Any) -> tuple[Any, ...]:
        """Two slots take outputs in turn; five are two for each of two inputs, and one more."""
        width = _SWIZZLE // jnp.dtype(dtype).itemsize
        buffer = hopper.tiled_smem(
            (_CONSUMERS, slots, _ROWS // _CONSUMERS, width), dtype, _SWIZZLE
        )
        return (
            (buffer,)
            if slots == 2
            else (buffer, plgpu.Barrier(num_arrivals=2, num_barriers=2 * _CONSUMERS))
        )

    def store(self, out_ref: Any, tile: _Tile, chunk: int, value: jax.Array) -> None:
        """Writes a chunk of columns of a tile, once the slot's last store has left it."""
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        self._store([self._num_stores % 2], [out_ref], tile, chunk, [value])
        self._num_stores += 1

    def fetch(self, sources: Sequence[Any], tile: _Tile, chunk: int) -> None:
        """Starts to load a chunk of two arrays, once all stores have left the slots."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, source in enumerate(sources):
            target = self._buffer.at[lax.axis_index("warpgroup"), chunk % 2 * 2 + i]
            plgpu.copy_gmem_to_smem(
                source.at[tile.expert, tile.rows, tile.columns(chunk, self.width)],
                target,
                self._barrier(chunk),
            )

    def fetched(self, chunk: int) -> list[jax.Array]:
        """Returns the chunk of the two arrays, in float32."""
        plgpu.barrier_wait(self._barrier(chunk))
        return [
            self._buffer[lax.axis_index("warpgroup"), chunk % 2 * 2 + i].astype(jnp.float32)
            for i in range(2)
        ]

    def store_in_place(
        self, out_refs: Sequence[Any], tile: _Tile, chunk: int, values: Sequence[jax.Array]
    ) -> None:
        """Writes a chunk of three arrays: two through its own slots, one through the last."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self._store([chunk % 2 * 2, chunk % 2 * 2 + 1, 4], out_refs, tile, chunk, values)

    def _store(
        self,
        slots: Sequence[int],
        out_refs: Sequence[Any],
        tile: _Tile,
        chunk: int,
        values: Sequence[jax.Array],
    ) -> None:
        targets = [self._buffer.at[lax.axis_index("warpgroup"), slot] for slot in slots]
        for target, value in zip(targets, values, strict=True):
            target[...] = value.astype(self._buffer.dtype)
        plgpu.commit_smem()
        for target, out_ref in zip(targets, out_refs, strict=True):
            destination = out_ref.at[tile.expert, tile.rows, tile.columns(chunk, self.width)]
            pl.when(tile.is_owned(chunk, self.width))(
                functools.partial(plgpu.copy_smem_to_gmem, target, destination)
            )

    def _barrier(self, chunk: int) -> Any:
        return self._loaded.at[lax.axis_index("warpgroup") * 2 + chunk % 2]


def _launch(
    body: Callable,
    outputs: Sequence[jax.ShapeDtypeStruct],
    scratch: Any,
    config: Config,
    interpret: Any,
) -> Callable:
    return plgpu.kernel(
        body,
        out_type=tuple(outputs),
        scratch_types=scratch,
        grid=(config.clusters,),
        grid_names=("cluster",),
        cluster=(config.cluster,),
        cluster_names=("block",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
    )


# Helpers inside kernels.


def _half() -> Any:
    """Returns the rows of a tile that this consumer multiplies."""
    return pl.ds(lax.axis_index("warpgroup") * (_ROWS // _CONSUMERS), _ROWS // _CONSUMERS)


def _columns(value: jax.Array, chunk: int, width: int = _CHUNK) -> jax.Array:
    return value[:, chunk * width : (chunk + 1) * width]


def _spread(ref: Any, width: int = _CHUNK) -> jax.Array:
    """Broadcasts one number per row, in global memory, to `width` columns."""
    return lax.broadcast_in_dim(
        hopper.load(ref, plgpu.Layout.WGMMA.reduce(1)), (*ref.shape, width), [0]
    )


def _zero_rows(ref: Any, is_kept: jax.Array) -> None:
    """Zeroes rows in shared memory that are not kept; they may hold NaN."""
    for chunk in range(ref.shape[1] // _CHUNK):
        part = ref.at[:, pl.ds(chunk * _CHUNK, _CHUNK)]
        part[...] = jnp.where(is_kept, part[...].astype(jnp.float32), 0.0).astype(ref.dtype)
    plgpu.commit_smem()


def _inside(index: jax.Array, size: int, limit: int) -> jax.Array:
    """Returns where the index-th piece of `size` begins; the last is moved back inside `limit`."""
    return lax.min(index * (size // _DEPTH), (limit - size) // _DEPTH) * _DEPTH


def _grouped(
    index: jax.Array, num_rows: jax.Array, num_columns: int, group: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (row, column) of the index-th tile: strips of `group` rows, column by column."""
    strip = lax.div(index, group * num_columns)
    index = lax.rem(index, group * num_columns)
    height = lax.min(num_rows - strip * group, group)
    return strip * group + lax.rem(index, height), lax.div(index, height)


# The order of rows.


def _row_tiles(is_valid_eC: jax.Array, cluster: int) -> tuple[jax.Array, jax.Array]:
    """Returns the tiles of rows, int32 [tiles], and the number of clusters with a valid row, [1].

    The tiles of a cluster follow one another; clusters with a valid row come first.
    """
    experts = is_valid_eC.shape[0]
    is_empty_en = is_valid_eC.reshape(experts, -1, _ROWS).max(-1) == 0
    order_en = jnp.argsort(is_empty_en, axis=1, stable=True).astype(jnp.int32)
    tiles_gn = (
        order_en + jnp.arange(experts, dtype=jnp.int32)[:, None] * order_en.shape[1]
    ).reshape(-1, cluster)
    is_empty_g = jnp.take_along_axis(is_empty_en, order_en, axis=1).reshape(-1, cluster).all(1)
    tiles_gn = tiles_gn[jnp.argsort(is_empty_g, stable=True)]
    return tiles_gn.reshape(-1), jnp.sum(~is_empty_g, dtype=jnp.int32)[None]


def _row_blocks(is_valid_eC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns each expert's blocks of 64 rows, int32 [e, n], and how many are full and not empty.

    Full blocks come first, then partial ones, then empty ones; the counts are int32 [e].
    """
    valid_en = is_valid_eC.reshape(is_valid_eC.shape[0], -1, _DEPTH).sum(-1)
    is_full_en, is_some_en = valid_en == _DEPTH, valid_en > 0
    blocks_en = jnp.argsort(
        2 - is_full_en.astype(jnp.int32) - is_some_en.astype(jnp.int32), axis=1, stable=True
    )
    return (
        blocks_en.astype(jnp.int32),
        jnp.sum(is_full_en, 1, dtype=jnp.int32),
        jnp.sum(is_some_en, 1, dtype=jnp.int32),
    )
