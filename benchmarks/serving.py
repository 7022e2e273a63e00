"""Compares the engine with others on requests of mixed lengths that arrive at random.

    python benchmarks/serving.py MODEL_FOLDER [transformers=PYTHON] [mlx=PYTHON]

PYTHON is an interpreter with transformers and torch, or with mlx-lm and mlx[cpu].  For the folder
"bench" transformers writes its HunYuanMoEV1 of the size of configs/bench.py, with random weights.
All run in float32 and draw greedily without stop ids.  An engine whose first tokens differ from
ours is named and not timed.  Each serves the same trace after a short one that warms it up.
"""

import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
PARITY_TOKENS = 64
# (requests, mean seconds between arrivals, tokens of prompts, new tokens)
TRACE = (64, 0.02, (16, 256), (16, 128))


def main(folder: str, *rivals: str) -> None:
    """Prints markdown tables."""
    with tempfile.TemporaryDirectory() as scratch:
        pythons = dict(rival.split("=", 1) for rival in rivals)
        worker = str(REPO / "benchmarks" / "serving_rivals_worker.py")
        if folder == "bench":
            folder = scratch
            write = [pythons["transformers"], worker, "write", folder]
            subprocess.run(write, cwd=REPO, check=True)
        vocab_size = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
        job = {"folder": folder, "trace": trace(vocab_size), "parity": prompts(vocab_size)}
        commands = {"hunyuan_jax": [sys.executable, __file__, "--worker"]}
        for name, python in pythons.items():
            kinds = {"transformers": ("continuous", "static"), "mlx": ("mlx",)}[name]
            commands |= {f"{name} {kind}": [python, worker, kind] for kind in kinds}
        found = {name: answer(command, job) for name, command in commands.items()}
    ours = found["hunyuan_jax"]
    print("| engine | output tokens/s | first token p50, p99, ms | between tokens p99, ms |")
    print("|---|---|---|---|")
    for name, result in found.items():
        if isinstance(result, str):
            print(f"| {name} | failed: {result} | | |")
        elif result["parity"] != ours["parity"]:
            print(f"| {name} | not timed: its greedy tokens differ | | |")
        else:
            print("| " + " | ".join([name, *figures(result, job["trace"])]) + " |")
    print()
    for name, value in ours["engine"].items():
        print(f"* {name}: {value}")
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"\nload of the last minute: {load}")


def trace(vocab_size: int) -> list[tuple[float, list[int], int]]:
    """(arrival in seconds, prompt, new tokens) of each request."""
    draw, now, found = random.Random(0), 0.0, []
    num, mean_seconds, prompt_range, new_range = TRACE
    for _ in range(num):
        ids = [draw.randrange(3, vocab_size) for _ in range(draw.randint(*prompt_range))]
        found.append((now, ids, draw.randint(*new_range)))
        now += draw.expovariate(1 / mean_seconds)
    return found


def prompts(vocab_size: int) -> list[list[int]]:
    """What is continued to see that engines agree."""
    draw = random.Random(1)
    return [[draw.randrange(3, vocab_size) for _ in range(length)] for length in (5, 70)]


def answer(command: list[str], job: dict) -> dict | str:
    """What a worker says, or the last line of its error."""
    result = subprocess.run(
        command, cwd=REPO, input=json.dumps(job), capture_output=True, text=True
    )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "Error" in line]
        return (lines or ["no message"])[-1][:120]
    return json.loads(result.stdout.splitlines()[-1])


def figures(result: dict, requests: list) -> list[str]:
    """Output tokens/s from the first arrival to the last token, and latencies."""
    times = result["times"]
    assert [len(row) for row in times] == [num_new for *_, num_new in requests]
    first = [row[0] - arrival for row, (arrival, *_) in zip(times, requests, strict=True)]
    gaps = [b - a for row in times for a, b in itertools.pairwise(row)]
    speed = sum(map(len, times)) / max(row[-1] for row in times)
    return [
        f"{speed:,.0f}",
        f"{1e3 * statistics.median(first):,.0f}, {1e3 * percentile(first, 99):,.0f}",
        f"{1e3 * percentile(gaps, 99):,.0f}",
    ]


def percentile(values: list[float], share: int) -> float:
    """The value below which `share` percent lie."""
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


def work() -> None:
    """Our side."""
    from hunyuan_jax import from_pretrained, startup

    start = time.perf_counter()
    startup.prepare()
    job = json.loads(sys.stdin.read())
    model = from_pretrained(job["folder"], dtype="float32")
    from hunyuan_jax.infer.request import Limits

    engine = model.new_engine(Limits(max_rows=64, max_context=512))
    engine.warm_up()
    ready = time.perf_counter() - start
    parity = [serve(engine, [(0.0, ids, PARITY_TOKENS)])[1][0] for ids in job["parity"]]
    serve(engine, job["trace"][:8], salt="warm")
    before = engine.stats()
    times, _ = serve(engine, job["trace"])
    after = engine.stats()
    num_steps = after.steps - before.steps
    ids = (job["trace"][0][1] * 40)[:460]
    first, shared = (
        serve(engine, [(0.0, ids[:414] + ids[i : i + 46], 1)], salt="shared")[0][0][0]
        for i in (0, 9)
    )
    print(
        json.dumps(
            {
                "parity": parity,
                "times": times,
                "engine": {
                    "seconds from the import to ready": round(ready, 1),
                    "steps": num_steps,
                    "CPU time of the stepping thread, us a step": round(
                        1e6 * (after.host_seconds - before.host_seconds) / num_steps
                    ),
                    "idle share of the device": round(after.idle_share, 4),
                    "compilations after the start": after.compilations,
                    "first token after 90 % of the prompt was known, times faster": round(
                        first / shared, 1
                    ),
                },
            }
        )
    )


def serve(engine, requests: list, salt: str = "") -> tuple[list[list[float]], list[list[int]]]:
    """(seconds since the start at which each token of each request came, the tokens)."""
    from hunyuan_jax.infer.request import Request
    from hunyuan_jax.infer.settings import Sampling

    times: list[list[float]] = [[] for _ in requests]
    tokens: list[list[int]] = [[] for _ in requests]
    start, num_added = time.perf_counter(), 0
    while num_added < len(requests) or engine.has_work:
        now = time.perf_counter() - start
        while num_added < len(requests) and requests[num_added][0] <= now:
            _, ids, num_new = requests[num_added]
            sampling = Sampling(temperature=0, max_new_tokens=num_new, stop_ids=()).resolved({})
            engine.add(Request(str(num_added), tuple(ids), sampling, cache_salt=salt))
            num_added += 1
        if not engine.has_work:
            time.sleep(1e-3)
            continue
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            times[int(output.id)] += [now] * len(output.tokens)
            tokens[int(output.id)] += output.tokens
    return times, tokens


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        work()
    else:
        main(*sys.argv[1:])
