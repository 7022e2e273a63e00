"""Compares fine-tuning and preferences with TRL: losses and gradient norms of the first steps from
the same weights and examples, and the time of a step.

TRL needs an environment of its own (Python 3.11), and FOLDER a small model that both read:

    python -m venv .venv-trl && .venv-trl/bin/pip install torch==2.13.0 trl==1.16.0
    python benchmarks/post_training.py .venv-trl/bin/python FOLDER

A step has the same 8 examples; TRL pads them, ours are packed into one row.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).parents[1]
KINDS = ("sft", "sigmoid", "ipo")
NUM_COMPARED, NUM_TIMED = 5, 30


def main(trl_python: str, folder: str) -> None:
    """Prints a markdown table."""
    work = Path(tempfile.mkdtemp())
    write_examples(work)
    print(
        f"| | loss | largest relative difference, loss and gradient norm of {NUM_COMPARED} steps "
        "| ms a step | TRL's | ratio |\n|---|---|---|---|---|---|"
    )
    for kind in KINDS:
        data = work / ("sft.jsonl" if kind == "sft" else "dpo.jsonl")
        ours = ours_of(kind, folder, data, work / kind)
        rival = last_json(
            [trl_python, "benchmarks/trl_worker.py", kind, folder, str(data), str(NUM_TIMED)]
        )
        differences = [
            max(
                abs(a - b) / max(abs(b), 1e-12)
                for a, b in zip(ours[name][:NUM_COMPARED], rival[name][:NUM_COMPARED], strict=True)
            )
            for name in ("loss", "grad_norm")
        ]
        losses = " ".join(f"{loss:.6g}" for loss in ours["loss"][:NUM_COMPARED])
        mine, theirs = (
            1000 * statistics.median(found["seconds"][NUM_TIMED // 2 :]) for found in (ours, rival)
        )
        print(
            f"| {kind} | {losses} | {differences[0]:.1e}, {differences[1]:.1e} | {mine:.1f} | "
            f"{theirs:.1f} | {theirs / mine:.2f} |",
            flush=True,
        )


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
    fields = [
        f"train.init_from={folder}",
        f"data.source={data}",
        "data.validation_fraction=0.0",
        "train.seq_len=256",
        "train.batch_size=2",
        "train.num_epochs=0.0",
        f"train.num_steps={NUM_TIMED}",
        "schedule.peak_lr=1e-3",
        "schedule.min_lr=1e-3",
        "model.hidden_dropout=0.0",
        "model.attention_dropout=0.0",
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
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    return {
        "loss": [row["loss"] for row in rows],
        "grad_norm": [row["grad_norm"] for row in rows],
        "seconds": [2 * 256 / row["tokens_per_second"] for row in rows[1:]],
    }


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
    main(*sys.argv[1:])
