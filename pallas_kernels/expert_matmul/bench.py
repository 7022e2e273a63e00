"""Compares expert matmuls with rivals: `python -m pallas_kernels.expert_matmul.bench`.

One expert of A52B on a chip, 16 sources of 256 rows.  With a GPU: TFLOP/s by the median.  Without
one, with libtpu: the share of a TPU's peak by static cycles.  Cycles are counted at two widths and
extrapolated, since all columns of a product cost the same.  Control flow that depends on data is
left out: all slots are full, or half of them by a fixed number of trips.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import benchmark, chips, cycles, tpu_compiler
from pallas_kernels.expert_matmul import cases, gpu, tpu

_CASE = cases.A52B
_C, _D, _F = _CASE.C, _CASE.D, _CASE.F
_BF16 = jnp.bfloat16


def _S(*shape: int, dtype: Any = _BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *shape), dtype)


_ROW_WEIGHT, _COUNT = _S(_C, dtype=jnp.float32), _S(_CASE.sources, dtype=jnp.int32)


def _operations(
    ops: Any, N: int, options: dict[str, Any]
) -> dict[str, tuple[Callable, list, int, int]]:
    """Returns {name: (function of (arrays, row weights, counts), their shapes with N columns,
    contraction length, number of all columns)}.
    """

    def as_stored(w):
        # On TPUs w_down lies in memory as [D, F] (api.py).
        return w.swapaxes(1, 2) if ops is tpu else w

    def gate_up(x, g, u, r, c):
        return ops.gate_up(x, g, u, r, c, save=False, **options)[0]

    def gate_up_kept(x, g, u, r, c):
        return ops.gate_up(x, g, u, r, c, save=True, **options)

    def down(h, w, r, c):
        return ops.matmul(h, as_stored(w), c, **options)

    def gated_gradient(dy, w, g, u, r, c):
        return ops.gated_gradient(dy, as_stored(w), g, u, r, c, **options)

    def input_gradient(dg, g, du, u, r, c):
        return ops.input_gradient(dg, g, du, u, c, **options)

    def weight_gradient(x, d, r, c):
        return ops.weight_gradient(x, d, c, _BF16, **options)

    w_in, x = [_S(_D, N)] * 2, _S(_C, _D)
    w_down = _S(N, _F) if ops is tpu else _S(_F, N)
    w_down_back = _S(_D, N) if ops is tpu else _S(N, _D)
    operations = {
        "gate_up": (gate_up, [x, *w_in], 2 * _D, _F),
        "gate_up, kept": (gate_up_kept, [x, *w_in], 2 * _D, _F),
        "down": (down, [_S(_C, _F), w_down], _F, _D),
        "gated gradient": (gated_gradient, [x, w_down_back, *[_S(_C, N)] * 2], _D, _F),
        "input gradient": (input_gradient, [_S(_C, _F), _S(N, _F)] * 2, 2 * _F, _D),
        "weight gradient": (weight_gradient, [x, _S(_C, N)], _D, _F),
    }
    return {
        name: (fn, [*shapes, _ROW_WEIGHT, _COUNT], length, width)
        for name, (fn, shapes, length, width) in operations.items()
    }


def _with_trips(name: str, N: int, device_kind: str) -> tuple[Callable, list]:
    """Returns a product with half of its slots empty, and its shapes.

    The loop that gathers rows makes half of its trips, as a fixed number.
    """
    cfg = tpu.config_of(device_kind)
    trips = cfg.block_rows[name.startswith("down")] // cfg.group_rows // 2
    options = {"device_kind": device_kind, "trips": trips}
    if name.startswith("gate_up"):

        def gate_up(x, g, u, r, c):
            return tpu.gate_up(x, g, u, r, c, save=False, **options)[0]

        return gate_up, [_S(_C, _D), *[_S(_D, N)] * 2, _ROW_WEIGHT, _COUNT]
    return lambda h, w, c: tpu.matmul(h, w.swapaxes(1, 2), c, **options), [
        _S(_C, _F),
        _S(N, _F),
        _COUNT,
    ]


def _xla(name: str, N: int) -> tuple[Callable, list]:
    """The product alone, as XLA computes it, with nothing around it: more than it would reach in
    the layer.
    """
    contract = {
        "gate_up": ([(_C, _D), (_D, 2 * N)], ((1,), (0,))),
        "down": ([(_C, _F), (_F, N)], ((1,), (0,))),
        "gated gradient": ([(_C, _D), (N, _D)], ((1,), (1,))),
        "input gradient": ([(_C, 2 * _F), (N, 2 * _F)], ((1,), (1,))),
        "weight gradient": ([(_C, _D), (_C, N)], ((0,), (0,))),
    }[name]
    shapes = [jax.ShapeDtypeStruct(shape, _BF16) for shape in contract[0]]
    return lambda a, b: jax.lax.dot_general(a, b, (contract[1], ((), ()))), shapes


def _ragged_dot(name: str, N: int) -> tuple[Callable, list]:
    """jax.lax.ragged_dot with one group."""
    S = jax.ShapeDtypeStruct
    rows, weight = {"gate_up": ((_C, _D), (1, _D, 2 * N)), "down": ((_C, _F), (1, _F, N))}[name]
    return lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes), [
        S(rows, _BF16),
        S(weight, _BF16),
        S((1,), jnp.int32),
    ]


def _megablox(name: str, N: int) -> tuple[Callable, list]:
    """jax's grouped matmul for TPUs, with the tiles that suit it here best of a few tried."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    fn, shapes = _ragged_dot(name, N)
    del fn
    return lambda x, w, sizes: gmm(
        x,
        w,
        sizes,
        preferred_element_type=_BF16,
        tiling=(512, 1280 if name == "gate_up" else 1408, 1024),
    ), shapes


def _tokamax(name: str, N: int, implementation: str | None = None) -> tuple[Callable, list]:
    """tokamax's grouped matmul with the tiles that it takes unless tuned on a chip: 128 x 128 x
    128 on TPUs before tpu7x.
    """
    import tokamax

    _, shapes = _ragged_dot(name, N)
    return functools.partial(tokamax.ragged_dot, implementation=implementation), shapes


_HALF = ", half empty"
_RIVALS = {
    "xla": _xla,
    "ragged_dot": _ragged_dot,
    "megablox": _megablox,
    "tokamax": functools.partial(_tokamax, implementation="mosaic_tpu"),
}


def _static_cycles(chip_name: str, who: str, name: str, N: int) -> int:
    """Returns the cycles of an operation with N columns; runs in a process of its own."""
    tpu_compiler.prepare(profiles=True)
    if who in _RIVALS:
        fn, shapes = _RIVALS[who](name, N)
        return cycles.cost(chip_name, fn, *shapes).cycles
    device_kind = chips.CHIPS[chip_name].device_kinds[0]
    if name.endswith(_HALF):
        fn, shapes = _with_trips(name, N, device_kind)
    else:
        # Without counts all rows are valid: no loop depends on data.
        with_counts, shapes, _, _ = _operations(tpu, N, {"device_kind": device_kind})[name]
        fn, shapes = (lambda *args: with_counts(*args, None)), shapes[:-1]
    # Listing the rows and preparing their weights is left out: it is small and happens once.
    return cycles.kernels_alone(chip_name, fn, *shapes)


def tpu_rows(chip_names: list[str]) -> Iterator[dict[str, Any]]:
    """Yields a row per chip and operation: share of peak, ours and the rivals'."""
    for chip_name in chip_names:
        chip = chips.CHIPS[chip_name]
        cfg = tpu.config_of(chip.device_kinds[0])
        full = {
            name: (length, width)
            for name, (_, _, length, width) in _operations(tpu, 128, {}).items()
        }
        full |= {name + _HALF: full[name] for name in ("gate_up", "down")}
        for name, (length, width) in full.items():
            block = (
                cfg.gradient_out
                if name == "weight gradient"
                else cfg.block_cols[name.startswith(("down", "input"))]
            )
            ideal = 2 * _C * length * width / (chip.peak_flops / chip.clock_hz)
            row = {"chip": chip_name, "operation": name, "ideal_ms": 1e3 * ideal / chip.clock_hz}
            for who in ("ours", *_rivals_of(name)):
                counted = [
                    benchmark.in_subprocess(_static_cycles, chip_name, who, name, num * block)
                    for num in (2, 4)
                ]
                if None in counted:
                    continue
                num_blocks = math.ceil(width / block) if who == "ours" else width / block
                total = counted[0] + (counted[1] - counted[0]) * (num_blocks - 2) / 2
                row[who] = ideal / total
                if who == "ours":
                    row["ours_ms"] = 1e3 * total / chip.clock_hz
            print(row, flush=True)
            yield row


def _rivals_of(name: str) -> list[str]:
    if "," in name:
        return []
    grouped = [who for who in _RIVALS if who != "tokamax" or importlib.util.find_spec("tokamax")]
    return grouped if name in ("gate_up", "down") else ["xla"]


def gpu_rows() -> Iterator[dict[str, Any]]:
    """Yields a row per operation: TFLOP/s, ours and the rivals'."""
    kind = jax.devices()[0].device_kind
    key = jax.random.key(0)
    widths = {name: width for name, (_, _, _, width) in _operations(gpu, 1, {}).items()}
    for name, columns in widths.items():
        fn, shapes, length, _ = _operations(gpu, columns, {"device_kind": kind})[name]
        count_es = jnp.full(_COUNT.shape, _CASE.rows_per_source, jnp.int32)
        args = [*(jax.random.normal(key, s.shape, s.dtype) for s in shapes[:-1]), count_es]
        tera = 2 * _C * length * columns / 1e9
        row = {"gpu": kind, "operation": name, "ours": tera / benchmark.median_ms(fn, args)}
        rivals = {"xla": _xla, "ragged_dot": _ragged_dot, "tokamax": _tokamax}
        for who in [who for who in rivals if who in _rivals_of(name)]:
            call, rival_shapes = rivals[who](name, columns)
            rival_args = [
                jnp.full(s.shape, _C, s.dtype)
                if s.dtype == jnp.int32
                else jax.random.normal(key, s.shape, s.dtype)
                for s in rival_shapes
            ]
            ms = benchmark.rival_ms(who, call, rival_args)
            row[who] = ms and tera / ms
        yield row


if __name__ == "__main__":
    benchmark.main(__doc__.splitlines()[0], tpu_rows, gpu_rows)
