"""Compares flash_attention with rivals: `python -m pallas_kernels.flash_attention.bench`.

With a GPU: median times and TFLOP/s.  Without one, with libtpu: the TPU compiler's static cycles
of dense attention (no mask, one group of query heads), since static cycles mean nothing where data
decides what runs.  Ours are the cycles of the kernels' steps over a static grid, without skipping,
masks and the transposes around them; a rival's are those of its whole program.
"""

import functools
import importlib.util
import itertools
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import benchmark, chips, cycles, tpu_compiler
from pallas_kernels.flash_attention import cases, tpu
from pallas_kernels.flash_attention.api import flash_attention
from pallas_kernels.flash_attention.reference import Settings

_GROUP, _LENGTH = 8, 4096  # query heads of one kv head; T = S


def measure_static(chip_names: list[str]) -> list[dict]:
    """Returns one row per chip, head dim, pass and implementation.

    Each is compiled in a process of its own, because libtpu may crash it.
    """
    rows = []
    for chip, H, backward in itertools.product(chip_names, (80, 128), (False, True)):
        ideal = (
            cases.Case("", 1, _LENGTH, _LENGTH, _GROUP, 1, H, causal=False).flops(backward)
            / chips.CHIPS[chip].peak_flops
        )
        for name in ("ours", "splash", "xla"):
            num_cycles = benchmark.in_subprocess(static_cycles, chip, H, backward, name)
            row = {
                "chip": chip,
                "head_dim": H,
                "pass": "backward" if backward else "forward",
                "implementation": name,
            }
            if num_cycles:
                row |= {
                    "kcycles": round(num_cycles / 1e3),
                    "of_peak": ideal * chips.CHIPS[chip].clock_hz / num_cycles,
                }
            rows.append(row)
            print(*row.values(), flush=True)
    return rows


def static_cycles(chip: str, H: int, backward: bool, name: str) -> int:
    """Returns the cycles of one pass of dense attention over [_LENGTH, _GROUP, H]."""
    tpu_compiler.prepare(profiles=True)
    if name == "ours":
        return _cycles(chip, *(_our_backward if backward else _our_forward)(chip, H))
    q, kv = (jax.ShapeDtypeStruct((heads, _LENGTH, H), jnp.bfloat16) for heads in (_GROUP, 1))
    attend = _splash if name == "splash" else _plain
    if not backward:
        return _cycles(chip, attend, q, kv, kv)
    both = _cycles(chip, lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout), q, kv, kv, q)
    # What XLA keeps for the backward pass it must compute in the forward pass; splash's forward
    # kernel runs as it is.
    return both - _cycles(chip, attend, q, kv, kv)


def _cycles(chip, fn, *shapes) -> int:
    return sum(cycles.cost(chip, fn, *shapes).by_op.values())


def _problem(chip: str, H: int) -> tpu.Problem:
    settings = Settings(False, H**-0.5, 0.0)
    return tpu.Problem(
        settings, tpu.CONFIGS[chip], chips.CHIPS[chip].vmem_bytes, _LENGTH, _LENGTH, False
    )


def _our_forward(chip, H):
    problem = _problem(chip, H)
    bq, bk, G, f32 = problem.config.block_q, problem.config.block_k, _GROUP, jnp.float32

    def kernel(q_ref, k_ref, v_ref, out_ref, *scratch):
        @pl.when(pl.program_id(1) == 0)
        def _():
            for ref in scratch:
                ref[...] = jnp.zeros(ref.shape, f32)

        tpu.forward_step(problem, q_ref, k_ref, v_ref, *scratch)

        @pl.when(pl.program_id(1) == _LENGTH // bk - 1)
        def _():
            out_ref[...] = (scratch[0][...] / scratch[2][...]).astype(out_ref.dtype)

    by_query = pl.BlockSpec((G, H, bq), lambda i, j: (0, 0, i))
    fn = pl.pallas_call(
        kernel,
        grid=(_LENGTH // bq, _LENGTH // bk),
        in_specs=[
            by_query,
            pl.BlockSpec((bk, H), lambda i, j: (j, 0)),
            pl.BlockSpec((H, bk), lambda i, j: (0, j)),
        ],
        out_specs=by_query,
        out_shape=jax.ShapeDtypeStruct((G, H, _LENGTH), jnp.bfloat16),
        scratch_shapes=[
            pltpu.VMEM((G, H, bq), f32),
            pltpu.VMEM((G, 1, bq), f32),
            pltpu.VMEM((G, 1, bq), f32),
        ],
        compiler_params=_params(chip),
    )
    return fn, *(
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((G, H, _LENGTH), (_LENGTH, H), (H, _LENGTH))
    )


def _our_backward(chip, H):
    problem = _problem(chip, H)
    bq, bk, G = problem.config.block_q_backward, problem.config.block_k_backward, _GROUP

    def kernel(*refs):
        @pl.when(pl.program_id(1) == 0)
        def _():
            for ref in refs[-2:]:
                ref[...] = jnp.zeros(ref.shape, jnp.float32)

        tpu.backward_step(problem, (0, G), *refs)

    def by_query(*dims):
        return pl.BlockSpec((*dims, bq), lambda i, j: (*(0,) * len(dims), j))

    rows, columns = (
        pl.BlockSpec((bk, H), lambda i, j: (i, 0)),
        pl.BlockSpec((H, bk), lambda i, j: (0, i)),
    )
    gradient = jax.ShapeDtypeStruct((H, _LENGTH), jnp.float32)
    fn = pl.pallas_call(
        kernel,
        grid=(_LENGTH // bk, _LENGTH // bq),
        in_specs=[
            *(by_query(G, H), by_query(G, H), by_query(G, 1), by_query(G, 1)),
            *(rows, columns, rows),
        ],
        out_specs=[by_query(G, H), columns, columns],
        out_shape=[jax.ShapeDtypeStruct((G, H, _LENGTH), jnp.float32), gradient, gradient],
        compiler_params=_params(chip),
    )
    bf16 = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((G, H, _LENGTH), (_LENGTH, H), (H, _LENGTH))
    ]
    row = jax.ShapeDtypeStruct((G, 1, _LENGTH), jnp.float32)
    return fn, bf16[0], bf16[0], row, row, bf16[1], bf16[2], bf16[1]


def _params(chip):
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=chips.CHIPS[chip].vmem_bytes // 2,
    )


def _splash(q_GTH, k_1SH, v_1SH):
    """jax's splash attention: blocks of 512 x 1024, positions minor, one kernel backward.

    Its steps are made unconditional, since the compiler counts what a condition guards as if it
    did not run (268% of peak).
    """
    from jax.experimental.pallas.ops.tpu import splash_attention
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    def when(condition):
        return lambda body: body() if body.__name__ == "run" else pl.when(condition)(body)

    splash_attention_kernel.pl = types.SimpleNamespace(**vars(pl) | {"when": when})
    layouts = dict.fromkeys(
        ("q_layout", "k_layout", "v_layout"), splash_attention.QKVLayout.SEQ_MINOR
    )
    sizes = dict.fromkeys(
        ("block_q", "block_kv_compute", "block_q_dkv", "block_kv_dkv_compute"), 512
    )
    blocks = splash_attention.BlockSizes(
        **sizes, block_kv=1024, block_kv_dkv=1024, use_fused_bwd_kernel=True, **layouts
    )
    mask = splash_attention.MultiHeadMask([splash_attention.FullMask((_LENGTH, _LENGTH))] * _GROUP)
    return splash_attention.make_splash_mqa_single_device(mask, block_sizes=blocks)(
        q_GTH, k_1SH[0], v_1SH[0]
    )


def _plain(q_GTH, k_1SH, v_1SH):
    """XLA's attention, which holds all scores."""
    q_TGH, k_SKH, v_SKH = (x.swapaxes(0, 1) for x in (q_GTH, k_1SH, v_1SH))
    return jax.nn.dot_product_attention(q_TGH, k_SKH, v_SKH, implementation="xla").swapaxes(0, 1)


def measure_gpu() -> Iterator[dict]:
    """Yields one row per case, pass and implementation, measured in this process."""
    device_kind = jax.devices()[0].device_kind
    for case in cases.TIMED:
        arrays = [jnp.nan_to_num(x) for x in case.arrays(np.random.default_rng(0))]
        for name, attend in _gpu_rivals(case, device_kind).items():
            for backward in (False, True):
                row = {
                    "device": device_kind,
                    "case": case.name,
                    "pass": "backward" if backward else "forward",
                    "implementation": name,
                }
                try:
                    seconds = _seconds(attend, arrays, backward)
                    row |= {"ms": seconds * 1e3, "tflops": case.flops(backward) / seconds / 1e12}
                # Rivals raise anything for what they do not support; the other rows are still
                # wanted.
                except Exception as error:
                    row["note"] = f"{type(error).__name__}: {error}"[:60]
                yield row


def _gpu_rivals(case, device_kind):
    """Returns {implementation: function of (q, k, v, query_segment, key_segment)}.

    The rivals do not know documents and attend across them.
    """

    def ours(*arrays):
        return flash_attention(*arrays, device_kind=device_kind, **case.settings)

    def of_jax(q, k, v, *_, implementation):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=case.causal, implementation=implementation
        )

    rivals = {"ours": ours} | {
        name: functools.partial(of_jax, implementation=name) for name in ("cudnn", "xla")
    }
    if importlib.util.find_spec("tokamax"):
        import tokamax

        rivals["tokamax"] = lambda q, k, v, *_: tokamax.dot_product_attention(
            q, k, v, is_causal=case.causal
        )
    return rivals


def _seconds(attend, arrays, backward) -> float:
    """Returns the median; the backward pass is both passes minus the forward pass."""
    forward = jax.jit(attend)

    @jax.jit
    def gradients(*arrays):
        out, pull = jax.vjp(lambda *q_k_v: attend(*q_k_v, *arrays[3:]), *arrays[:3])
        return pull(out)

    seconds = benchmark.median_ms(forward, arrays) / 1e3
    return benchmark.median_ms(gradients, arrays) / 1e3 - seconds if backward else seconds


if __name__ == "__main__":
    benchmark.main(
        "flash_attention against rivals: static cycles for TPUs, or times on a GPU",
        measure_static,
        measure_gpu,
    )
