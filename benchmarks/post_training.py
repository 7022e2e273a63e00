"""Compares fine-tuning, preferences and rewards with TRL: losses and gradient norms of the first
steps from the same weights and examples or completions, and the time of a step.

TRL needs an environment of its own (Python 3.11), and FOLDER a small model that both read:

    python -m venv .venv-trl && .venv-trl/bin/pip install torch==2.13.0 trl==1.16.0
    python benchmarks/post_training.py .venv-trl/bin/python FOLDER [KIND ...]

A step has the same 8 examples; TRL pads them, ours are packed into one row.  The completions of
grpo are drawn by our engine, for two steps at once, so every second step is off-policy; TRL is
given them with their advantages and log-probabilities.  The losses of grpo are near 0, so their
difference is absolute.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_jax.cli import complete
from hunyuan_jax.config import from_config_dict
from hunyuan_jax.post.grpo import Grpo
from hunyuan_jax.train import loop

REPO = Path(__file__).parents[1]
KINDS = ("sft", "sigmoid", "ipo", "grpo")
NUM_COMPARED, NUM_TIMED, NUM_TOKENS = 5, 30, 512


def main(trl_python: str, folder: str, kinds: Sequence[str]) -> None:
    """Prints a markdown table."""
    work = Path(tempfile.mkdtemp())
    write_examples(work)
    print(
        f"| | loss | largest relative difference, loss and gradient norm of {NUM_COMPARED} steps "
        "| ms a step | TRL's | ratio |\n|---|---|---|---|---|---|"
    )
    for kind in kinds:
        data, num_steps = work / ("sft.jsonl" if kind == "sft" else "dpo.jsonl"), NUM_TIMED
        if kind == "grpo":
            ours, data, num_steps = rewarded(folder, work), work / "rollouts", NUM_COMPARED
        else:
            ours = ours_of(kind, folder, data, work / kind)
        rival = last_json(
            [trl_python, "benchmarks/trl_worker.py", kind, folder, str(data), str(num_steps)]
        )
        differences = [
            max(
                abs(a - b) / (1.0 if name == "loss" and kind == "grpo" else max(abs(b), 1e-12))
                for a, b in zip(ours[name][:NUM_COMPARED], rival[name][:NUM_COMPARED], strict=True)
            )
            for name in ("loss", "grad_norm")
        ]
        losses = " ".join(f"{loss:.6g}" for loss in ours["loss"][:NUM_COMPARED])
        row = f"| {kind} | {losses} | {differences[0]:.1e}, {differences[1]:.1e} |"
        if kind == "grpo":
            print(f"{row} | | |", flush=True)
            continue
        mine, theirs = (
            1000 * statistics.median(found["seconds"][NUM_TIMED // 2 :]) for found in (ours, rival)
        )
        print(f"{row} {mine:.1f} | {theirs:.1f} | {theirs / mine:.2f} |", flush=True)


def write_examples(work: Path) -> None:
    """8 chats, and 8 pairs of answers."""
    with open(work / "sft.jsonl", "w") as chats, open(work / "dpo.jsonl", "w") as pairs:
        for i in range(8):
            prompt = [{"role": "user", "content": f"say {i}"}]
            yes, no = f"yes {i} " * (1 + i % 4), f"no {i} " * (2 + i % 3)
            chat = {"prompt": prompt, "completion": [{"role": "assistant", "content": yes}]}
            pair = {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": f"yes {i}"}],
                "rejected": [{"role": "assistant", "content": no}],
            }
            chats.write(json.dumps(chat) + "\n")
            pairs.write(json.dumps(pair) + "\n")


def ours_of(kind: str, folder: str, data: Path, workdir: Path) -> dict:
    """Loss, grad_norm and seconds of each step of our run."""
    recipe = "sft" if kind == "sft" else "dpo"
    stated = json.loads((Path(folder) / "config.json").read_text())
    length = min(256, stated["max_position_embeddings"])
    fields = [
        f"train.init_from={folder}",
        f"data.source={data}",
        "data.validation_fraction=0.0",
        f"train.seq_len={length}",
        f"train.batch_size={NUM_TOKENS // length}",
        "train.num_epochs=0.0",
        f"train.num_steps={NUM_TIMED}",
        "schedule.peak_lr=1e-3",
        "schedule.min_lr=1e-3",
        "model.hidden_dropout=0.0",
        "model.attention_dropout=0.0",
        "optimizer.expert_lr_ratio=1.0",
    ]
    if recipe == "dpo":
        fields += [
            f"objective.dpo.loss={kind}",
            "objective.dpo.sft_weight=0.0",
            "train.ema_decay=0.0",
        ]
    run(
        [
            sys.executable,
            "train.py",
            f"--config=configs/{recipe}.py",
            f"--workdir={workdir}",
            *(f"--config.{field}" for field in fields),
        ]
    )
    rows = logged(workdir)
    return {
        "loss": [row["loss"] for row in rows],
        "grad_norm": [row["grad_norm"] for row in rows],
        "seconds": [NUM_TOKENS / row["tokens_per_second"] for row in rows[1:]],
    }


def rewarded(folder: str, work: Path) -> dict:
    """Loss and grad_norm of each step of our run, whose batches go to WORK/rollouts."""
    (work / "rewards.py").write_text(
        "def letters(completions, **columns):\n"
        "    return [float(len(set(text))) for text in completions]\n"
    )
    # As long as each other: TRL pads prompts on the left without telling the model positions.
    prompts = [{"prompt": f"say {i}"} for i in range(8)]
    (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (work / "rollouts").mkdir()
    namespace: dict[str, Any] = {}
    exec((REPO / "configs/grpo.py").read_text(), namespace)
    recipe = namespace["get_config"]()
    recipe.train.init_from, recipe.data.source = folder, str(work / "prompts.jsonl")
    recipe.model.dtype = "float32"
    recipe.train.seq_len, recipe.train.batch_size = 64, 16
    recipe.train.num_steps = NUM_COMPARED
    recipe.schedule.peak_lr = recipe.schedule.min_lr = 1e-3
    recipe.objective.grpo.rewards = (f"{work / 'rewards.py'}:letters",)
    recipe.objective.grpo.max_new_tokens = 16
    recipe.objective.grpo.steps_per_rollout = 2

    class Recorded(Grpo):
        """Keeps the batches of the run."""

        def batches(self, stream, rows):
            return _Recorder(super().batches(stream, rows), work / "rollouts")

    loop.run(from_config_dict(recipe, complete), work / "grpo", Recorded)
    rows = logged(work / "grpo")
    return {name: [row[name] for row in rows] for name in ("loss", "grad_norm")}


class _Recorder:
    """A BatchIterator that writes the batches of another one to FOLDER/i.npz."""

    def __init__(self, batches: Any, folder: Path):
        self._batches, self._folder, self._count = batches, folder, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._batches)
        np.savez(self._folder / f"{self._count}.npz", **batch)
        self._count += 1
        return batch


def logged(workdir: Path) -> list[dict]:
    """The rows of the training steps."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def last_json(command: list[str]) -> dict:
    """The JSON object on the last line of a command's output."""
    return json.loads(run(command).splitlines()[-1])


def run(command: list[str]) -> str:
    """What a command prints; ends the process if it fails."""
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return result.stdout


if __name__ == "__main__":
    main(*sys.argv[1:3], sys.argv[3:] or KINDS)
