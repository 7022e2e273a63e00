"""Counts static cycles of many small experts on one TPU: `python -m
pallas_kernels.expert_matmul.bench_small`.

Hy3 on 16 expert shards: 12 experts of 4096 x 1536 a chip.  The rows of each are full to the last
granule of 32; "uneven" are our kernels with experts that have 0.5 to 1.5 of the mean.  libtpu
counts nothing for tpu7x.  Letters: e experts, C rows of an expert, D model, F ffn, s senders.
"""

import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import benchmark, chips, cycles, tpu_compiler
from pallas_kernels.expert_matmul import tpu

_E, _D, _F = 12, 4096, 1536
# Rows of a chip, and of each expert in whole granules.
_ROWS = {4096: 352, 65536: 5472}
_CHIPS = ("v5p", "v6e")
_LOADS = np.linspace(0.5, 1.5, _E)
_SENDERS = 16
_GRANULE = 32


def _shape(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _ours(name: str, C: int, device_kind: str) -> tuple[Any, list]:
    options = {"device_kind": device_kind}
    if name == "gate_up":

        def gate_up(x, g, u, r):
            return tpu.gate_up(x, g, u, r, None, save=False, **options)[0]

        weight = _shape(_E, C, dtype=jnp.float32)
        return gate_up, [_shape(_E, C, _D), *[_shape(_E, _D, _F)] * 2, weight]
    # w_down lies in memory as [D, F] (api.py).
    return lambda h, w: tpu.matmul(h, w.swapaxes(1, 2), None, **options), [
        _shape(_E, C, _F),
        _shape(_E, _D, _F),
    ]


def _rival(who: str, name: str, C: int) -> tuple[Any, list]:
    """The bare product, without silu and row weights."""
    I, O = (_D, 2 * _F) if name == "gate_up" else (_F, _D)  # noqa: E741
    shapes = [_shape(_E * C, I), _shape(_E, I, O), _shape(_E, dtype=jnp.int32)]
    if who == "ragged_dot":
        return jax.lax.ragged_dot, shapes
    if who == "tokamax":
        import tokamax

        return lambda *a: tokamax.ragged_dot(*a, implementation="mosaic_tpu"), shapes
    if who == "xla":
        return lambda x, w, _: jnp.einsum("eCI,eIO->eCO", x.reshape(_E, C, I), w), shapes
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    tiling = (512 if C % 512 == 0 else 32, 1024, 1024)
    return lambda *a: gmm(*a, preferred_element_type=jnp.bfloat16, tiling=tiling), shapes


def _uneven_rows(rows: int) -> tuple[int, int, np.ndarray]:
    """(rows in use, C, used granules [e, granules of C]) of experts with 0.5 to 1.5 of the mean.

    A sender's share of a buffer has room for the busiest expert, and is used from its start.
    """
    used_e = np.ceil(_LOADS * rows / _E / _SENDERS).astype(int)
    granules = math.ceil(used_e.max() / _GRANULE)
    is_used = np.arange(granules) < np.ceil(used_e / _GRANULE)[:, None]
    return (
        int(used_e.sum()) * _SENDERS,
        _SENDERS * granules * _GRANULE,
        np.tile(is_used, (1, _SENDERS)),
    )


def _uneven_cycles(chip_name: str, name: str, rows: int, device_kind: str) -> float:
    """Cycles of our kernel: those of one group of rows, and of a block, times their numbers.

    Both come from blocks with one and with two groups of rows in use.
    """
    _, C, is_used = _uneven_rows(rows)
    weights, width, depth = (2, _F, _D) if name == "gate_up" else (1, _D, _F)
    blocks = tpu.fit_blocks(
        tpu.config_of(device_kind), C, depth, width, itemsize=2, num_weights=weights, num_tiles=1
    )
    block = min(blocks.rows, C)
    per_block = block // _GRANULE
    padded = np.pad(is_used, ((0, 0), (0, -is_used.shape[1] % per_block)))
    used_b = padded.reshape(-1, per_block).sum(-1)
    trips_b = -(-used_b // (blocks.group_rows // _GRANULE))
    counted = []
    for trips in (1, 2):
        options = {"device_kind": device_kind, "trips": trips}
        count = _shape(_E, _SENDERS, dtype=jnp.int32)
        if name == "gate_up":
            weight = _shape(_E, block, dtype=jnp.float32)
            shapes = [_shape(_E, block, _D), *[_shape(_E, _D, _F)] * 2, weight, count]

            def fn(x, g, u, r, c, options=options):
                return tpu.gate_up(x, g, u, r, c, save=False, **options)[0]
        else:
            shapes = [_shape(_E, block, _F), _shape(_E, _D, _F), count]

            def fn(h, w, c, options=options):
                return tpu.matmul(h, w.swapaxes(1, 2), c, **options)

        counted.append(cycles.kernels_alone(chip_name, fn, *shapes) / _E)
    group = counted[1] - counted[0]
    return float(np.where(trips_b, counted[0] - group + trips_b * group, 0).sum())


def _share(chip_name: str, who: str, name: str, rows: int) -> float:
    """Share of the chip's peak; runs in a process of its own."""
    tpu_compiler.prepare(profiles=True)
    chip, C = chips.CHIPS[chip_name], _ROWS[rows]
    rows_in_use = _E * C
    if who == "ours, uneven":
        rows_in_use, _, _ = _uneven_rows(rows)
        counted = _uneven_cycles(chip_name, name, rows, chip.device_kinds[0])
    elif who == "ours":
        fn, shapes = _ours(name, C, chip.device_kinds[0])
        counted = cycles.kernels_alone(chip_name, fn, *shapes)
    else:
        fn, shapes = _rival(who, name, C)
        counted = cycles.cost(chip_name, fn, *shapes).cycles
    width = 2 * _F if name == "gate_up" else _F
    return 2 * rows_in_use * _D * width / (chip.peak_flops / chip.clock_hz) / counted


def main() -> None:
    """Prints a line for each chip, number of rows, product and implementation."""
    rivals = ("xla", "ragged_dot", "megablox")
    rivals += ("tokamax",) if importlib.util.find_spec("tokamax") else ()
    for who in ("ours", "ours, uneven", *rivals):
        for chip_name in _CHIPS:
            for rows in _ROWS:
                for name in ("gate_up", "down"):
                    share = benchmark.in_subprocess(_share, chip_name, who, name, rows)
                    shown = "-" if share is None else f"{share:.1%}"
                    print(f"| {chip_name} | {rows} | {name} | {who} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
