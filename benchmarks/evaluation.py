"""Compares the time that lm-eval's requests take here and in lm-eval's own `hf` adapter.

    python benchmarks/evaluation.py FOLDER HF_FOLDER [PYTHON]

FOLDER is a model for us, HF_FOLDER the same weights for transformers (the same folder where
transformers knows the architecture).  PYTHON has lm-eval, torch and transformers; ours needs
lm-eval too (extra `eval`).  Each side answers in a process of its own, one set of requests at a
time, in turn.  The time to load the model, and ours to compile all programs, is printed apart;
the first round, in which both allocate, is not timed.  Each round has texts of its own, so that
none is known from the one before.  Log-likelihoods are compared too.
"""

import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
ROUNDS, NUM_QUESTIONS, BATCH = 1, 3, 8


def sets(turn: int) -> dict[str, tuple[str, list[tuple]]]:
    """Of a round: name -> (kind of request, arguments of each)."""
    from hunyuan_jax.evals import words

    rng = random.Random(turn)
    made = words.sentences(rng)
    sentences = iter(lambda: " ".join(next(made) for _ in range(rng.randint(3, 6))), None)
    contexts = [next(sentences) for _ in range(NUM_QUESTIONS)]
    # As of MMLU or GSM8K, whose examples are the same for all questions.
    fixed = "".join(f"{next(sentences)}\nAnswer: {'ABCDA'[i]}\n\n" for i in range(5))
    drawn = ["".join(f"{next(sentences)}\n\n" for _ in range(5)) for _ in contexts]
    choices = [[f" {next(made)[:24]}" for _ in range(4)] for _ in contexts]
    texts = [(" ".join(next(sentences) for _ in range(3)),) for _ in contexts]
    settings = {"until": ["\n\n"], "max_gen_toks": 24, "repetition_penalty": 1.0}
    asked = list(zip(contexts, drawn, choices, strict=True))
    return {
        "four choices": ("loglikelihood", [(c, x) for c, _, four in asked for x in four]),
        "four choices, 5 examples drawn": (
            "loglikelihood",
            [(examples + c, x) for c, examples, four in asked for x in four],
        ),
        "four letters, 5 examples": (
            "loglikelihood",
            [(f"{fixed}{c}\nAnswer:", f" {x}") for c in contexts for x in "ABCD"],
        ),
        "whole texts": ("loglikelihood_rolling", texts),
        "24 tokens, 5 examples": ("generate_until", [(fixed + c, settings) for c in contexts]),
    }


def main(folder: str, hf_folder: str, python: str = sys.executable) -> None:
    """Prints a markdown table."""
    workers = {"ours": start(sys.executable, "ours", folder), "hf": start(python, "hf", hf_folder)}
    for side, worker in workers.items():
        began = answer(worker)
        print(f"{side} starts in {began['seconds']:.1f} s ({began['cpu']:.1f} CPU s)")
    print("| requests | hunyuan_jax, s (CPU s) | hf, s (CPU s) | ratio (of CPU) | difference |")
    print("|---|---|---|---|---|")
    totals = dict.fromkeys(workers, 0.0)
    for name in sets(0):
        seconds, cpu, worst = dict.fromkeys(workers, 0.0), dict.fromkeys(workers, 0.0), 0.0
        for turn in range(ROUNDS + 1):
            found = {side: ask(worker, name, turn) for side, worker in workers.items()}
            pairs = zip(*(found[side]["answers"] for side in workers), strict=True)
            worst = max(worst, *(difference(a, b) for a, b in pairs))
            for side in workers if turn else ():
                seconds[side] += found[side]["seconds"]
                cpu[side] += found[side]["cpu"]
                totals[side] += found[side]["seconds"]
        shown = " | ".join(f"{seconds[side]:.2f} ({cpu[side]:.2f})" for side in workers)
        ratio, of_cpu = (x["hf"] / x["ours"] for x in (seconds, cpu))
        print(f"| {name} | {shown} | {ratio:.2f} ({of_cpu:.2f}) | {worst:.1e} |", flush=True)
    print(f"\nall: {totals['hf'] / totals['ours']:.2f}")
    print(f"load of the last minute: {Path('/proc/loadavg').read_text().split()[0]}")
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()


def difference(ours, theirs) -> float:
    """Of two log-likelihoods in nats; of texts 0 or 1."""
    if isinstance(ours, str):
        return float(ours != theirs)
    if isinstance(ours, list):
        return abs(ours[0] - theirs[0]) + (ours[1] != theirs[1])
    return abs(ours - theirs)


def start(python: str, side: str, folder: str) -> subprocess.Popen:
    """A worker that answers each name on a line with a JSON object."""
    command = [python, __file__, "--worker", side, folder]
    return subprocess.Popen(
        command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(worker: subprocess.Popen, name: str, turn: int) -> dict:
    """The worker's answers to a set of a round, with their time."""
    worker.stdin.write(f"{turn} {name}\n")
    worker.stdin.flush()
    return answer(worker)


def answer(worker: subprocess.Popen) -> dict:
    """The worker's next object."""
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    sys.exit("a worker has ended; its message is above")


def work(side: str, folder: str) -> None:
    """Answers the names of sets on standard input, after an object about its start."""
    start_time = time.perf_counter()
    from lm_eval.api.instance import Instance

    if side == "ours":
        from hunyuan_jax.evals.harness import HarnessModel

        model = HarnessModel(folder, max_length=1024)
        model.warm_up()
    else:
        import os

        import torch
        from lm_eval.models.huggingface import HFLM

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        model = HFLM(folder, device="cpu", dtype="float32", batch_size=BATCH, max_length=1024)
    report(start_time, 0.0)
    for line in sys.stdin:
        turn, name = line.strip().split(" ", 1)
        kind, arguments = sets(int(turn))[name]
        requests = [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]
        start_time, start_cpu = time.perf_counter(), cpu_seconds()
        answers = getattr(model, kind)(requests, disable_tqdm=True)
        report(start_time, start_cpu, answers=answers)


def report(start_time: float, start_cpu: float, **more: Any) -> None:
    """Prints what has passed since then."""
    passed = {"seconds": time.perf_counter() - start_time, "cpu": cpu_seconds() - start_cpu}
    print(json.dumps(passed | more), flush=True)


def cpu_seconds() -> float:
    """Of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    work(*sys.argv[2:]) if sys.argv[1] == "--worker" else main(*sys.argv[1:])
