"""Counts static cycles of many small experts on one TPU: `python -m
pallas_kernels.expert_matmul.bench_small`.

Hy3 on 16 expert shards: 12 experts of 4096 x 1536 a chip.  The rows of each are full to the last
granule of 32.  Letters: e experts, C rows of an expert, D model, F ffn.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import benchmark, chips, cycles, tpu_compiler
from pallas_kernels.expert_matmul import tpu

_E, _D, _F = 12, 4096, 1536
# Rows of a chip, and of each expert in whole granules.
_ROWS = {4096: 352, 65536: 5472}
_CHIPS = ("v5p", "v6e")


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
    if who == "xla":
        return lambda x, w, _: jnp.einsum("eCI,eIO->eCO", x.reshape(_E, C, I), w), shapes
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    tiling = (512 if C % 512 == 0 else 32, 1024, 1024)
    return lambda *a: gmm(*a, preferred_element_type=jnp.bfloat16, tiling=tiling), shapes


def _share(chip_name: str, who: str, name: str, rows: int) -> float:
    """Share of the chip's peak; runs in a process of its own."""
    tpu_compiler.prepare(profiles=True)
    chip, C = chips.CHIPS[chip_name], _ROWS[rows]
    if who == "ours":
        fn, shapes = _ours(name, C, chip.device_kinds[0])
        counted = cycles.kernels_alone(chip_name, fn, *shapes)
    else:
        fn, shapes = _rival(who, name, C)
        counted = cycles.cost(chip_name, fn, *shapes).cycles
    width = 2 * _F if name == "gate_up" else _F
    return 2 * _E * C * _D * width / (chip.peak_flops / chip.clock_hz) / counted


def main() -> None:
    """Prints a line for each chip, number of rows, product and implementation."""
    for who in ("ours", "xla", "ragged_dot", "megablox"):
        for chip_name in _CHIPS:
            for rows in _ROWS:
                for name in ("gate_up", "down"):
                    share = benchmark.in_subprocess(_share, chip_name, who, name, rows)
                    shown = "-" if share is None else f"{share:.1%}"
                    print(f"| {chip_name} | {rows} | {name} | {who} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
