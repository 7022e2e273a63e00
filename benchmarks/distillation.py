"""A draft of a quarter of the tiny model's parameters: trained alone, and by inheritance and
distillation in half of the steps.

    python benchmarks/distillation.py FOLDER [STEPS]

FOLDER/teacher is a run of configs/tiny.py, trained first unless it is there.  STEPS are those of
the draft that is trained alone.  All drafts have the same shape, text, batches and
schedule over their own steps.  Prints the validation loss of each, and how often its greedy tokens
are the teacher's: on held-out text, and on what the teacher itself writes after it, where a draft
of four tokens is accepted up to the first that is not.  Runs that are finished are not repeated.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from hunyuan_jax import from_pretrained
from hunyuan_jax.config import from_dict
from hunyuan_jax.config.run import Config
from hunyuan_jax.tokenizer import load_tokenizer
from hunyuan_jax.train.pretrain import Pretrain

ROOT = Path(__file__).resolve().parents[1]
DRAFT = ("model.num_layers=2", "model.moe.num_experts=4", "model.intermediate_size=192")
NUM_PROMPTS, PROMPT, ANSWER, NUM_DRAFTED = 32, 64, 64, 4


def drafts_of(teacher: Path, num_steps: int) -> list[tuple[str, int, tuple[str, ...]]]:
    """Name, steps and settings of each row."""
    half, section = num_steps // 2, "objective.distill"

    def learns(name, rule, *fields):
        fields = [f"{section}.{field}" for field in (f"inherit={rule}", *fields)]
        return name, half, ("objective.name=distill", f"{section}.teacher={teacher}", *fields)

    by_magnitude = "inherited (magnitude)"
    return [
        ("alone", num_steps, ()),
        ("alone", half, ()),
        learns(by_magnitude, "magnitude", "weight=0."),
        learns("distilled", "none"),
        *(
            learns(f"inherited ({rule}), distilled", rule)
            for rule in ("first", "magnitude", "fisher")
        ),
        learns("inherited (mask), distilled", "mask", f"mask_steps={half}"),
        learns(f"{by_magnitude}, distilled, last states", "magnitude", "hidden_weight=1."),
        learns(f"{by_magnitude}, distilled, all layers", "magnitude", "inner_weight=1."),
    ]


def main(folder: Path, num_steps: int = 200) -> None:
    """Trains what is missing, and prints a markdown table."""
    began = time.monotonic()
    teacher = folder / "teacher"
    train(teacher)
    text, answers = prompts(teacher)
    print(
        "| draft | parameters | steps | validation loss | agreement on text | on the teacher's "
        f"own | of {NUM_DRAFTED} drafted |\n|---|---|---|---|---|---|---|"
    )
    row("the teacher", teacher, text, answers)
    for name, steps, fields in drafts_of(teacher, num_steps):
        words = "".join(c if c.isalnum() else " " for c in name).split()
        workdir = folder / "_".join([*words, str(steps)])
        fields = (f"train.num_steps={steps}", "train.eval_every=100", *DRAFT, *fields)
        train(workdir, *fields)
        row(name, workdir, text, answers)
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes")


def train(workdir: Path, *fields: str) -> None:
    """Runs configs/tiny.py with these fields; ends the process if it fails."""
    # Drafts whose programs are equal share them.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "programs")}
    subprocess.run(
        [
            *(sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={workdir}"),
            *(f"--config.{field}" for field in fields),
        ],
        cwd=ROOT,
        env=cache | os.environ,
        check=True,
        stdout=sys.stderr,
    )


def prompts(teacher: Path) -> tuple[np.ndarray, np.ndarray]:
    """(held-out tokens [n, T], the teacher's greedy answers [n, ANSWER] to the first of them)."""
    config = from_dict(Config, json.loads((teacher / "config.json").read_text()))
    stream = Pretrain(config).open_stream(load_tokenizer(config.data.tokenizer))
    batches = stream.validation(NUM_PROMPTS // config.train.batch_size)
    text = np.concatenate([batch["tokens"] for batch in batches])[:, : PROMPT + ANSWER]
    model = from_pretrained(teacher)
    written = model.generate(text[:, :PROMPT], max_new_tokens=ANSWER, eos_token_id=[])
    return text, written[:, PROMPT:]


def row(name: str, workdir: Path, text: np.ndarray, answers: np.ndarray) -> None:
    """Prints the figures of one run."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    num_steps, loss = [
        (line["step"], line["validation_loss"]) for line in rows if "validation_loss" in line
    ][-1]
    model, teacher = from_pretrained(workdir), from_pretrained(workdir.parent / "teacher")
    on_text = (greedy(model, text) == greedy(teacher, text)).mean()
    written = np.concatenate([text[:, :PROMPT], answers], axis=1)
    agrees = greedy(model, written)[:, PROMPT - 1 : -1] == answers
    runs = np.stack(
        [agrees[:, i : i + NUM_DRAFTED] for i in range(ANSWER - NUM_DRAFTED + 1)], axis=1
    )
    accepted = np.cumprod(runs, axis=-1).sum(-1).mean()
    size = sum(array.size for array in leaves(model.params))
    print(
        f"| {name} | {size:,} | {num_steps} | {loss:.4f} | {on_text:.1%} | {agrees.mean():.1%} | "
        f"{accepted:.2f} |",
        flush=True,
    )


def greedy(model, tokens: np.ndarray) -> np.ndarray:
    """The most probable token after each."""
    return np.asarray(model.logits(tokens)).argmax(-1)


def leaves(tree: dict) -> list:
    """The arrays of a nested dict."""
    return [a for v in tree.values() for a in (leaves(v) if isinstance(v, dict) else [v])]


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:]))
