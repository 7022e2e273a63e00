"""Compares decoding speed with transformers' `generate` at the size of configs/bench.py, or of
configs/bench_hy3.py.

transformers needs an environment of its own (python 3.11), see side_by_side.py:

    python benchmarks/generation.py .venv-torch/bin/python
    python benchmarks/generation.py .venv-torch/bin/python bench_hy3

Both have random weights of the same shapes, decode greedily and have no stop ids.  Their processes
take turns, one call each; the first call of each, with compilation, is not timed.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
BATCHES, PROMPT, NEW_TOKENS, ROUNDS = (1, 8), 64, 256, 7


def main(torch_python: str, name: str = "bench") -> None:
    """Prints a markdown table; ends with the load of the machine."""
    ours = start([sys.executable, __file__, "--worker", name])
    rival = start([torch_python, "benchmarks/transformers_generate_worker.py", name])
    print(
        "| batch | hunyuan_jax, tokens/s | transformers, tokens/s | ratio of each round | median "
        "ratio |\n|---|---|---|---|---|"
    )
    for batch in BATCHES:
        for worker in (ours, rival):
            speed(worker, batch)
        mine, theirs = zip(
            *((speed(ours, batch), speed(rival, batch)) for _ in range(ROUNDS)), strict=True
        )
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        shown = ", ".join(f"{ratio:.1f}" for ratio in ratios)
        medians = [statistics.median(values) for values in (mine, theirs, ratios)]
        print(
            f"| {batch} | {medians[0]:,.0f} | {medians[1]:,.0f} | {shown} | {medians[2]:.1f} |",
            flush=True,
        )
    for worker in (ours, rival):
        worker.stdin.close()
        worker.wait()
    print(f"\nload of the last minute: {Path('/proc/loadavg').read_text().split()[0]}")


def start(command: list[str]) -> subprocess.Popen:
    """A worker that answers each batch size on a line with the seconds of one call."""
    return subprocess.Popen(
        command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def speed(worker: subprocess.Popen, batch: int) -> float:
    """New tokens per second of one call, prefill included."""
    worker.stdin.write(f"{batch}\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        sys.exit("a worker has ended; its message is above")
    return batch * NEW_TOKENS / json.loads(answer)


def work(name: str) -> None:
    """Our side."""
    import jax
    import numpy as np
    from flax import nnx

    from hunyuan_jax import presets
    from hunyuan_jax.infer.pretrained import Pretrained
    from hunyuan_jax.model.transformer import Transformer
    from hunyuan_jax.parallel.mesh import single_device_mesh

    config = getattr(presets, name)()
    model = Pretrained(
        config,
        nnx.to_pure_dict(
            nnx.split(Transformer(config, single_device_mesh(), jax.random.key(0)))[1]
        ),
    )
    for line in sys.stdin:
        ids = np.random.default_rng(0).integers(3, config.vocab_size, (int(line), PROMPT))
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=NEW_TOKENS, eos_token_id=())
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    work(sys.argv[2]) if sys.argv[1] == "--worker" else main(*sys.argv[1:])
