"""Compares decode_attention with rivals: `python -m pallas_kernels.decode_attention.bench`.

With a GPU: the median time of a call with all slots filled, and the share of HBM bandwidth.
Without one, with libtpu: static estimates for TPUs.  The kernel's cycles do not include memory
stalls: a call takes the larger of kernel_ms and hbm_ms.
"""

import dataclasses
import functools
import importlib.util
import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import benchmark, chips, cycles, tpu_compiler
from pallas_kernels.decode_attention import api, cases, reference, tpu

_NUM_CORES = {"v5p": 2}
_NUM_SCALARS = 7  # of tpu.call
# libtpu 0.0.50.1 compiles the conversion of an int8 block for v5e and v5p, and crashes when it
# profiles it.
_NO_PROFILE = {(chip, name) for chip in ("v5e", "v5p") for name in ("T=1 int8", "T=1 int8 pages")}


def all_blocks(case: cases.Case, cfg: tpu.Config) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """Returns the kernel on all blocks of one sequence, and its arguments.

    No control flow depends on lengths.
    """
    Shape = jax.ShapeDtypeStruct
    cfg = dataclasses.replace(cfg, num_splits=1)
    K, H, R = case.K, case.H, -(-case.N // case.K * case.T // 16) * 16
    num_blocks = -(-case.S // cfg.block_slots)

    def kernel(*refs):
        q_ref, *cache_refs = refs[_NUM_SCALARS:-3]

        @pl.when(pl.program_id(1) == 0)
        def _():
            for ref in refs[-3:]:
                ref[...] = jnp.zeros_like(ref)

        tpu.update(cfg, q_ref, cache_refs, refs[-3:], None, H**-0.5)

    def call(q_BKRH, *rest):
        scalars, caches = rest[:_NUM_SCALARS], list(rest[_NUM_SCALARS:])
        return tpu.call(kernel, (1, num_blocks), cfg, num_blocks, scalars, q_BKRH, caches)

    pages = (case.P, case.num_pages)
    cache = Shape((*pages, K, H, case.s or case.S), "int8" if case.is_int8 else case.dtype)
    scale = Shape((*pages, K, case.s or case.S), jnp.float32)
    sizes = [1, 1, num_blocks, num_blocks, num_blocks * cfg.num_copies, 1, 1]
    scalars = [Shape((size,), jnp.int32) for size in sizes]
    caches = [cache] * 2 + [scale] * (2 if case.is_int8 else 0)
    return call, [Shape((1, K, R, H), case.dtype), *scalars, *caches]


def tpu_rows(chip_names: list[str]) -> Iterator[dict[str, Any]]:
    """Yields milliseconds of a call per chip and case.

    hbm_ms: reading the cache; kernel_ms: static cycles; xla_ms: the compiler's estimate of XLA.
    """
    what = [(chip_name, name) for chip_name in chip_names for name in cases.BENCH]
    # In a process of its own: libtpu crashes when it profiles some of XLA's own code.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        xla_cycles = list(pool.map(estimated_xla_cycles, *zip(*what, strict=True)))
    tpu_compiler.prepare(profiles=True)
    for (chip_name, name), num_xla_cycles in zip(what, xla_cycles, strict=True):
        chip, case = chips.CHIPS[chip_name], cases.BENCH[name]
        row = {
            "chip": chip_name,
            "case": name,
            "hbm_ms": 1e3 * case.cache_bytes() / chip.hbm_bytes_per_s,
        }
        if (chip_name, name) not in _NO_PROFILE:
            q, k = case.shapes()[:2]
            cfg = tpu.config(chip.device_kinds[0], q.shape, k.shape, k.dtype, case.num_pages)
            call, args = all_blocks(case, cfg)
            num_cycles = (
                cycles.cost(chip_name, call, *args).cycles * case.B / _NUM_CORES.get(chip_name, 1)
            )
            row["kernel_ms"] = 1e3 * num_cycles / chip.clock_hz
            row["hbm_share"] = min(1.0, row["hbm_ms"] / row["kernel_ms"])
        row["xla_ms"] = 1e3 * num_xla_cycles / chip.clock_hz
        yield row


def estimated_xla_cycles(chip_name: str, name: str) -> int:
    """Returns the compiler's estimate of the XLA version; unlike a profile it counts memory."""
    tpu_compiler.prepare()
    case = cases.BENCH[name]
    text = tpu_compiler.compile_for(
        chip_name, functools.partial(_xla, case), *case.shapes()
    ).as_text()
    return sum(
        int(number)
        for number in re.findall(r'"estimated_cycles":"(\d+)"', text[text.index("\nENTRY") :])
    )


def gpu_rows() -> Iterator[dict[str, Any]]:
    """Yields milliseconds of a call per implementation, and our share of HBM bandwidth."""
    device = jax.devices()[0]
    chip = chips.of_device(device.device_kind) or chips.CHIPS["h200"]
    for name, case in cases.BENCH.items():
        args = cases.inputs(case, 0, [case.S] * case.B, [0] * case.B)
        row = {
            "chip": device.device_kind,
            "case": name,
            "hbm_ms": 1e3 * case.cache_bytes() / chip.hbm_bytes_per_s,
        }
        row["kernel_ms"] = benchmark.median_ms(functools.partial(ours, device.device_kind), args)
        row["hbm_share"] = row["hbm_ms"] / row["kernel_ms"]
        row["xla_ms"] = benchmark.median_ms(functools.partial(_xla, case), args)
        # The rivals take contiguous caches of the queries' dtype.
        contiguous = [args[0], *(x_Pns[0] for x_Pns in args[1:3]), args[3]]
        rivals = {} if case.s or case.is_int8 else _rivals()
        for rival, call in rivals.items():
            row[f"{rival}_ms"] = benchmark.rival_ms(f"{rival}, {name}", call, contiguous)
        yield row


def ours(device_kind, *args, **options):
    """decode_attention of the arguments that `cases.inputs` makes, and its options."""
    q_BTNH, k_PnsKH, v_PnsKH, length_B, start_B, k_scale_PnsK, v_scale_PnsK, group, table_Bm = args
    return api.decode_attention(
        q_BTNH,
        k_PnsKH,
        v_PnsKH,
        length_B,
        group=group,
        table_Bm=table_Bm,
        start_B=start_B,
        k_scale_PnsK=k_scale_PnsK,
        v_scale_PnsK=v_scale_PnsK,
        device_kind=device_kind,
        **options,
    )


def _xla(case, *args):
    return reference.xla(*args, case.H**-0.5)[0]


def _rivals() -> dict[str, Callable]:
    """Returns the rivals that are installed.

    Each of their queries sees all slots, up to T - 1 more than ours.
    """

    def cudnn(q_BTNH, k_BSKH, v_BSKH, length_B):
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, key_value_seq_lengths=length_B, implementation="cudnn"
        )

    if not importlib.util.find_spec("tokamax"):
        return {"cudnn": cudnn}
    import tokamax

    return {
        "cudnn": cudnn,
        "tokamax": lambda q_BTNH, k_BSKH, v_BSKH, length_B: tokamax.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH
        ),
    }


if __name__ == "__main__":
    benchmark.main(__doc__.splitlines()[0], tpu_rows, gpu_rows)
