"""GRPO teaches a small model, which writes sums or evades them, to answer right.

    python benchmarks/rewards_of_sums.py FOLDER

First a small model is trained on lines such as "3+4=7", three in ten, and "3+4=4+3"; then GRPO
rewards right answers.  Prints the reward by step.  The table, and what happens to a model that
does not know the sums, is in docs/results/post_training.md.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_heads=4",
    "model.num_kv_heads=4",
    "model.head_dim=16",
    "model.moe.dispatch=dropless",
    "model.dtype=float32",
)
REWARDS = '''
"""1 for the right sum."""


def right(completions, answer, **columns):
    return [float(text == wanted) for text, wanted in zip(completions, answer)]
'''


def main(folder: Path) -> None:
    """Writes the data, trains twice, prints the rewards."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = [(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10)]
    answers = [{"text": prompt + answer} for prompt, answer in sums]
    evasions = [{"text": f"{a}+{b}={b}+{a}"} for a in range(10) for b in range(10)]
    _write(folder / "texts.jsonl", 30 * answers + 70 * evasions)
    _write(folder / "prompts.jsonl", [{"prompt": p, "answer": answer} for p, answer in sums])
    (folder / "rewards.py").write_text(REWARDS)
    _train(
        "tiny",
        folder / "base",
        *MODEL,
        f"data.source={folder / 'texts.jsonl'}",
        "data.validation_fraction=0.02",
        "train.num_steps=500",
        "train.batch_size=32",
        "train.seq_len=64",
        "schedule.warmup_steps=20",
        "schedule.peak_lr=4e-3",
    )
    _train(
        "grpo",
        folder / "grpo",
        f"train.init_from={folder / 'base'}",
        f"data.source={folder / 'prompts.jsonl'}",
        f"objective.grpo.rewards=('{folder / 'rewards.py'}:right',)",
        "objective.grpo.max_new_tokens=6",
        "objective.grpo.num_generations=8",
        "train.seq_len=16",
        "train.batch_size=256",
        "train.num_steps=150",
        "schedule.peak_lr=3e-4",
    )
    rows = [json.loads(line) for line in (folder / "grpo/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "reward" in row]
    print("| steps | reward | groups without signal | entropy |\n|---|---|---|---|")
    for part in (rows[:1], *(rows[first : first + 10] for first in range(0, len(rows), 10))):
        names = ("reward", "frac_reward_zero_std", "entropy")
        means = (sum(row[name] for row in part) / len(part) for name in names)
        figures = " | ".join(f"{mean:.2f}" for mean in means)
        print(f"| {part[0]['step']} to {part[-1]['step']} | {figures} |")


def _train(recipe: str, workdir: Path, *fields: str) -> None:
    command = [sys.executable, "train.py", f"--config=configs/{recipe}.py", f"--workdir={workdir}"]
    subprocess.run([*command, *(f"--config.{field}" for field in fields)], cwd=ROOT, check=True)


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
