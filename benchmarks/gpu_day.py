"""Checks and times every GPU kernel and a slice of the model, in one call (docs/gpu_day.md):

    benchmarks/gpu_day.sh WHEELS                        # on a machine with a Hopper GPU
    python benchmarks/gpu_day.py --dry_run --out=DIR    # every section, on a CPU

A section is a process with its own limit, so that one that raises, crashes or hangs costs its own
rows only.  Rows are written one by one: what a section found before it ended stays.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels import benchmark

REPO = Path(__file__).parents[1]
Rows = Iterator[dict[str, Any]]
# What cases are lowered for in a dry run.
_DRY_KIND = "NVIDIA H200"


def device(is_dry: bool) -> Rows:
    """The device, its software, and what copies and products reach on it."""
    import jax
    import jax.numpy as jnp

    found = jax.devices()[0]
    yield {"case": "device", "device": found.device_kind, "jax": jax.__version__}
    size = 2**8 if is_dry else 2**13
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    ms = benchmark.median_ms(jnp.matmul, [x, x])
    yield {"case": f"product {size}^3", "ms": ms, "tflops": 2e-9 * size**3 / ms}
    y = jnp.zeros((64, size, size), jnp.bfloat16)
    ms = benchmark.median_ms(lambda y: y + 1, [y])
    yield {"case": "copy", "ms": ms, "tb_per_s": 2e-9 * y.nbytes / ms}


def _compared(
    name: str, is_dry: bool, actual: Callable, expected: Callable, args: Any, shapes: Any
) -> dict[str, Any]:
    """A row: the norm-relative error of each result, or in a dry run whether `actual` lowers."""
    import jax
    import numpy as np

    from pallas_kernels import select, testing

    row = {"case": name}
    try:
        if is_dry:
            testing.lower_for_gpu(actual, *shapes, device_kind=_DRY_KIND)
            return row | {"is_ok": True}
        args = args()
        results, references = jax.jit(actual)(*args), jax.jit(expected)(*args)
        errors = []
        for a, e in zip(jax.tree.leaves(results), jax.tree.leaves(references), strict=True):
            # A norm of nothing says nothing.
            errors.append(testing.relative_error(a, e) if np.asarray(e).any() else 0.0)
        dtype = jax.tree.leaves(results)[0].dtype.name
        # Not `max`, which overlooks NaN.
        is_ok = all(error <= testing.TOLERANCE[dtype] for error in errors)
        return row | {"is_ok": is_ok, "error": float(np.max(errors)), "errors": errors}
    except select.Unsupported as error:
        return row | {"is_ok": True, "note": f"refused: {error}"[:200]}
    except Exception as error:  # the other cases are still wanted
        return row | {"is_ok": False, "note": f"{type(error).__name__}: {error}"[:300]}


def _kind(is_dry: bool) -> str:
    import jax

    return _DRY_KIND if is_dry else jax.devices()[0].device_kind


def check_expert_matmul(is_dry: bool) -> Rows:
    """swiglu in Mosaic GPU, forward and backward, against the reference."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.expert_matmul import cases, swiglu

    kind = _kind(is_dry)
    for case in [cases.A52B, cases.A52B_HALF, cases.A52B_DENSE, *cases.SMALL]:

        def both_passes(arrays, implementation):
            count_es = arrays["count_es"]
            trained = {name: x for name, x in arrays.items() if name != "count_es"}
            call = functools.partial(
                swiglu, count_es=count_es, device_kind=kind, implementation=implementation
            )
            y_eCD, pullback = jax.vjp(lambda trained: call(**trained), trained)
            return y_eCD, pullback(jnp.ones_like(y_eCD))

        yield _compared(
            case.name,
            is_dry,
            functools.partial(both_passes, implementation="pallas_gpu"),
            functools.partial(both_passes, implementation="reference"),
            lambda case=case: [case.arrays(0)],
            [case.shapes()],
        )


def check_flash_attention(is_dry: bool, implementation: str) -> Rows:
    """flash_attention's output and gradients against the reference."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.flash_attention import cases
    from pallas_kernels.flash_attention.api import flash_attention

    # The reference holds all scores: some heads of the large cases.
    large = [dataclasses.replace(case, N=16, K=2) for case in (*cases.TIMED[:2], cases.TIMED[3])]
    kind = _kind(is_dry)
    for case in [*cases.TESTED, *large]:

        def both_passes(*arrays, implementation, case=case):
            call = functools.partial(
                flash_attention, device_kind=kind, implementation=implementation, **case.settings
            )
            out, pullback = jax.vjp(lambda *q_k_v: call(*q_k_v, *arrays[3:]), *arrays[:3])
            return out, pullback(jnp.ones_like(out))

        yield _compared(
            case.name,
            is_dry,
            functools.partial(both_passes, implementation=implementation),
            functools.partial(both_passes, implementation="reference"),
            lambda case=case: case.arrays(np.random.default_rng(0)),
            case.shapes(),
        )


def check_decode_attention(is_dry: bool) -> Rows:
    """decode_attention in Triton, contiguous and paged, against the reference."""
    import numpy as np

    from pallas_kernels.decode_attention import bench, cases, reference

    for name, case in [*cases.SMALL.items(), *cases.BENCH.items()]:
        lengths = np.linspace(case.T, case.S, case.B).astype(int)
        yield _compared(
            name,
            is_dry,
            functools.partial(bench.ours, _kind(is_dry)),
            lambda *args, case=case: reference.reference(*args, case.H**-0.5)[0],
            lambda case=case, lengths=lengths: cases.inputs(case, 0, lengths, lengths // 3),
            case.shapes(),
        )


def time_expert_matmul(is_dry: bool) -> Rows:
    """Each product of the experts in TFLOP/s, beside XLA, lax.ragged_dot and tokamax."""
    from pallas_kernels.expert_matmul import bench

    if is_dry:
        yield {"case": "all", "note": "check expert_matmul lowers the kernels at these sizes"}
        return
    yield from bench.gpu_rows()


def time_flash_attention(is_dry: bool) -> Rows:
    """Attention's passes, beside cuDNN, XLA and tokamax."""
    from pallas_kernels.flash_attention import bench, cases

    if is_dry:
        cases.TIMED = cases.TESTED[:1]
    yield from bench.measure_gpu()


def time_decode_attention(is_dry: bool) -> Rows:
    """Decode attention, contiguous and paged, beside cuDNN, XLA and tokamax."""
    from pallas_kernels.decode_attention import bench, cases

    if is_dry:
        cases.BENCH = {name: cases.SMALL[name] for name in ("one", "pages")}
    yield from bench.gpu_rows()


def time_torch(is_dry: bool) -> Rows:
    """torch's scaled_dot_product_attention with its FlashAttention and cuDNN, both passes."""
    if is_dry and not importlib.util.find_spec("torch"):
        yield {"case": "all", "note": "torch is not installed"}
        return
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from pallas_kernels.decode_attention import cases as decode_cases
    from pallas_kernels.flash_attention import cases

    where = "cuda" if torch.cuda.is_available() else "cpu"
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    if where == "cpu":
        backends = {"math": SDPBackend.MATH}
    decode = [
        dataclasses.replace(
            cases.TIMED[0], name=f"decode {name}", B=c.B, T=c.T, S=c.S, causal=False
        )
        for name, c in decode_cases.BENCH.items()
        if c.H == cases.TIMED[0].H and not c.is_int8 and c.s is None
    ]
    if is_dry:
        decode = [dataclasses.replace(case, S=512) for case in decode]
    for case in [*(cases.TESTED[:1] if is_dry else cases.TIMED), *decode]:

        def draw(length, heads, case=case):
            return torch.randn(
                (case.B, heads, length, case.H),
                dtype=torch.bfloat16,
                device=where,
                requires_grad=case.T > 16,
            )

        q, k, v = draw(case.T, case.N), draw(case.S, case.K), draw(case.S, case.K)

        def forward(q=q, k=k, v=v, case=case):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=case.causal, enable_gqa=True
            )

        def both_passes(forward=forward, leaves=(q, k, v)):
            return torch.autograd.grad(forward().sum(), leaves)

        for name, backend in backends.items():
            row = {"case": case.name, "implementation": f"torch {name}"}
            try:
                with sdpa_kernel(backend):
                    ms = _torch_ms(forward, where)
                    row |= {"ms": ms, "tflops": case.flops(False) / ms / 1e9}
                    yield row | {"pass": "forward"}
                    if case.T > 16:
                        ms = _torch_ms(both_passes, where) - ms
                        row |= {"ms": ms, "tflops": case.flops(True) / ms / 1e9}
                        yield row | {"pass": "backward"}
            except Exception as error:  # a backend refuses what it does not support
                yield row | {"note": f"{type(error).__name__}: {error}"[:100]}


def _torch_ms(call: Callable, where: str) -> float:
    import torch

    def wait():
        if where == "cuda":
            torch.cuda.synchronize()

    call()
    wait()
    times, end = [], time.perf_counter() + 1
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(10):
            call()
        wait()
        times.append((time.perf_counter() - begin) / 10)
    return 1e3 * statistics.median(times)


def _slice(is_dry: bool, num_experts: int) -> Any:
    """A run of two CLA groups of a52b at full width; one example of 4096 tokens a step."""
    from hunyuan_jax import presets
    from hunyuan_jax.config import Config, MeshConfig, OptimizerConfig, TrainConfig

    model = presets.tiny() if is_dry else presets.a52b()
    moe = dataclasses.replace(model.moe, num_experts=num_experts)
    model = dataclasses.replace(model, num_layers=2 * model.cla_share_factor, moe=moe)
    return Config(
        model=model,
        mesh=MeshConfig(data=1),
        optimizer=OptimizerConfig(state_dtype="bfloat16"),
        train=TrainConfig(batch_size=1, seq_len=64 if is_dry else 4096),
    )


def _fitting(
    is_dry: bool, bytes_of_expert: float, measure: Callable[[Any], dict[str, Any]]
) -> Rows:
    """The row of the largest slice that fits, of 4, 2 or 1 experts beside the shared one, and the
    failures before it.

    bytes_of_expert: what an expert's weights take in all layers; only half of the device's memory
    is counted on.
    """
    import jax

    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))
    for num_experts in (4, 2, 1):
        if num_experts > 1 and num_experts * bytes_of_expert > memory / 2:
            continue
        row = {"case": f"a52b, 2 groups, {num_experts} experts"}
        try:
            yield row | measure(_slice(is_dry, num_experts))
            return
        except Exception as error:  # mostly: no memory
            note = f"{type(error).__name__}: {error}"[:200]
            yield row | {"is_ok": num_experts > 1, "note": note}


def slice_train(is_dry: bool) -> Rows:
    """Training step and prefill of two groups of a52b at full width."""
    from hunyuan_jax.bench import speed

    # 0.35e9 weights a layer; float32 and bfloat16 moments, gradients and a copy in bfloat16.
    yield from _fitting(
        is_dry, 4 * 0.35e9 * 12, lambda config: speed.bench(config, 2 if is_dry else 10)
    )


def slice_decode(is_dry: bool) -> Rows:
    """Decode step of two groups of a52b at full width: tokens/s and the share of HBM bandwidth."""
    for batch_size in (1, 16, 64):
        measure = functools.partial(_decode_speed, is_dry, batch_size)
        rows = _fitting(is_dry, 4 * 0.35e9 * 2, measure)
        yield from ({**row, "case": f"{row['case']}, batch {batch_size}"} for row in rows)


def _decode_speed(is_dry: bool, batch_size: int, config: Any) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hunyuan_jax.infer.pretrained import dropless
    from hunyuan_jax.model.cache import empty_cache
    from hunyuan_jax.parallel.mesh import make_mesh
    from hunyuan_jax.train.state import abstract_model
    from pallas_kernels import chips

    cfg, num_slots = dropless(config.model), 128 if is_dry else 4096
    graph_def, specs = abstract_model(cfg, make_mesh(config.mesh))

    def draw():
        leaves, tree = jax.tree.flatten(specs)
        drawn = [
            (0.02 * jax.random.normal(jax.random.key(i), x.shape, jnp.float32)).astype(cfg.dtype)
            for i, x in enumerate(leaves)
        ]
        return jax.tree.unflatten(tree, drawn)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(params, token_B, cache):
        model = nnx.merge(graph_def, params)
        output = model.decode(token_B, cache)
        logits_BV = model.logits(output.hidden_BTD)[:, 0]
        # The length stays: every step reads the same cache.
        cache = output.cache.rollback(cache.length_B)
        return jnp.argmax(logits_BV, -1).astype(jnp.int32), cache

    params = jax.jit(draw)()
    cache = empty_cache(cfg, batch_size, num_slots)
    cache = cache._replace(length_B=jnp.full((batch_size,), num_slots - 1, jnp.int32))
    token_B = jnp.arange(batch_size, dtype=jnp.int32)
    times = []
    for _ in range(3 if is_dry else 20):
        begin = time.perf_counter()
        for _ in range(5):
            token_B, cache = step(params, token_B, cache)
        jax.block_until_ready(token_B)
        times.append((time.perf_counter() - begin) / 5)
    seconds = statistics.median(times[2:])
    # All experts are read where the batch reaches them all; a batch of 1 reads top_k of them.
    num_bytes = sum(x.nbytes for x in jax.tree.leaves((params, cache.entries)))
    chip = chips.of_device(jax.devices()[0].device_kind)
    share = num_bytes / seconds / chip.hbm_bytes_per_s if chip else None
    return {
        "ms": 1e3 * seconds,
        "tokens_per_second": batch_size / seconds,
        "gb_of_weights_and_cache": num_bytes / 1e9,
        "hbm_share_if_all_is_read": share,
    }


def tiny(is_dry: bool) -> Rows:
    """The run of configs/tiny.py: seconds, and the last row of its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["train.py", "--config=configs/tiny.py", f"--workdir={folder}/tiny"]
        if is_dry:
            short = {"num_steps": 4, "eval_every": 2, "eval_batches": 1, "log_every": 2}
            command += [f"--config.train.{name}={value}" for name, value in short.items()]
            command += ["--config.schedule.warmup_steps=1"]
        begin = time.perf_counter()
        result = subprocess.run(
            [sys.executable, *command], cwd=REPO, capture_output=True, text=True, check=False
        )
        row = {"case": "tiny", "seconds": time.perf_counter() - begin}
        if result.returncode:
            yield row | {"is_ok": False, "note": result.stderr[-300:]}
            return
        lines = Path(folder, "tiny", "metrics.jsonl").read_text().splitlines()
        last: dict[str, Any] = {}
        for line in lines:
            last |= json.loads(line)
        yield row | {name: last[name] for name in last if "loss" in name or "per_second" in name}


class Section(NamedTuple):
    """rows: (is_dry) -> rows; limit: seconds."""

    rows: Callable[[bool], Rows]
    limit: float


# In order of what is missed most if time runs out.
SECTIONS = {
    "device": Section(device, 40),
    "check decode_attention": Section(check_decode_attention, 70),
    "check expert_matmul": Section(check_expert_matmul, 90),
    "check flash_attention, Mosaic": Section(
        functools.partial(check_flash_attention, implementation="pallas_gpu"), 80
    ),
    "check flash_attention, Triton": Section(
        functools.partial(check_flash_attention, implementation="pallas_triton"), 80
    ),
    "time expert_matmul": Section(time_expert_matmul, 80),
    "time flash_attention": Section(time_flash_attention, 110),
    "time decode_attention": Section(time_decode_attention, 70),
    "slice_train": Section(slice_train, 110),
    "slice_decode": Section(slice_decode, 90),
    "time torch": Section(time_torch, 60),
    "tiny": Section(tiny, 120),
}


def run_section(name: str, path: Path, is_dry: bool, limit: float) -> dict[str, Any]:
    """Runs a section in a process of its own; returns how it ended.  Its rows go to `path`."""
    command = [sys.executable, __file__, f"--section={name}", f"--out={path.parent}"]
    begin = time.monotonic()
    process = subprocess.Popen(command + ["--dry_run"] * is_dry, cwd=REPO, start_new_session=True)
    try:
        code = process.wait(limit)
        end = "ok" if code == 0 else f"ended with {code}"
    except subprocess.TimeoutExpired:
        end = f"stopped after {limit:.0f} s"
    # Of a section that ended, too: what it started may live on.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return {"section": name, "end": end, "seconds": time.monotonic() - begin}


def write_rows(name: str, path: Path, is_dry: bool) -> None:
    """Appends a section's rows to `path` as JSON lines."""
    if is_dry:
        import jax

        jax.config.update("jax_platforms", "cpu")
    with open(path, "a", encoding="utf-8") as file:
        for row in SECTIONS[name].rows(is_dry):
            line = json.dumps({"section": name} | row, default=str)
            print(line[:200])
            file.write(line + "\n")
            file.flush()


def main() -> int:
    """Runs the sections; writes rows.jsonl and gpu_day.json to --out, prints tables last.

    Returns 1 if a section or a check failed.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_day"), help="folder for results")
    parser.add_argument("--budget", type=float, default=525, help="seconds for all sections")
    parser.add_argument("--only", default="", help="words; run the sections that have one")
    parser.add_argument("--dry_run", action="store_true", help="small, on a CPU; kernels lower")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    values = parser.parse_args()
    path = values.out.absolute() / "rows.jsonl"
    if values.section:
        write_rows(values.section, path, values.dry_run)
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    # A dry run is to end, however slow and busy the machine.
    patience = 20 if values.dry_run else 1
    end, ends = time.monotonic() + patience * values.budget, []
    for name, section in SECTIONS.items():
        if values.only and not any(word in name for word in values.only.split(",")):
            continue
        left = end - time.monotonic()
        if left < 15:
            ends.append({"section": name, "end": "skipped: no time left"})
            continue
        print(f"== {name}", flush=True)
        ends.append(run_section(name, path, values.dry_run, min(patience * section.limit, left)))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    result = {"sections": ends, "rows": rows}
    (path.parent / "gpu_day.json").write_text(json.dumps(result, indent=1))
    for name, of_section in itertools.groupby(rows, lambda row: row["section"]):
        print(f"\n{name}")
        print(benchmark.table([_short(row) for row in of_section]))
    print(f"\n{benchmark.table(ends)}")
    is_ok = all(row.get("is_ok", True) for row in rows)
    return 0 if is_ok and all(row["end"] == "ok" for row in ends) else 1


def _short(row: dict[str, Any]) -> dict[str, Any]:
    hidden = ("section", "errors")
    return {
        key: value[:60] if isinstance(value, str) else value
        for key, value in row.items()
        if key not in hidden
    }


if __name__ == "__main__":
    sys.exit(main())
