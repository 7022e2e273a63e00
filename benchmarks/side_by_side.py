"""Compares training and prefill speed with transformers' HunYuanMoEV1, or its HYV3.

transformers needs an environment of its own (python 3.11):

    python -m venv .venv-torch && .venv-torch/bin/pip install torch==2.13.0 transformers
    python benchmarks/side_by_side.py .venv-torch/bin/python
    python benchmarks/side_by_side.py .venv-torch/bin/python bench_hy3

Prints each round and the median of the ratios.  The two take turns, so that a drifting machine is
fair to both.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]
ROUNDS = 3
FIGURES = ("tokens_per_second", "prefill_tokens_per_second")


def main(torch_python: str, name: str = "bench") -> None:
    """Runs ROUNDS pairs of configs/NAME.py and prints a markdown table."""
    recipe = f"--config=configs/{name}.py"
    ours = [sys.executable, "-m", "hunyuan_jax", "bench", recipe, "--json"]
    rival = [torch_python, "benchmarks/transformers_worker.py", name]
    rounds = [(last_json(ours), last_json(rival)) for _ in range(ROUNDS)]
    assert rounds[0][0]["parameters"] == rounds[0][1]["parameters"], (
        "the two models differ in size"
    )
    print(
        "| figure | hunyuan_jax | transformers | ratio of each round | median ratio "
        "|\n|---|---|---|---|---|"
    )
    for figure in FIGURES:
        mine, theirs = ([pair[i][figure] for pair in rounds] for i in (0, 1))
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(
            f"| {figure} | {statistics.median(mine):,.0f} | {statistics.median(theirs):,.0f} | "
            f"{shown} | {statistics.median(ratios):.2f} |"
        )
    print(
        f"\ncompile {rounds[0][0]['compile_seconds']:.1f} s; torch {rounds[0][1]['torch']}, "
        f"{rounds[0][1]['threads']} threads"
    )


def last_json(command: list[str]) -> dict:
    """The JSON object on the last line of a command's output."""
    result = subprocess.run(
        command, cwd=REPO, env=dict(os.environ), capture_output=True, text=True
    )
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
