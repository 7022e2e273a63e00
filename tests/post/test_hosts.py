"""Runs whose weights write their own data, over two processes on loopback with two CPU devices
each: the numbers of one process with four devices.
"""

import json
import re
import runpy
import shutil

import jax
import pytest

from hunyuan_jax.config import from_config_dict
from hunyuan_jax.parallel import mesh
from hunyuan_jax.post.build import build_objective
from hunyuan_jax.train import loop
from support import paths, processes, recipes, runs

pytestmark = pytest.mark.slow

COMMON = {
    **processes.SMALL,
    "model.moe.dispatch": "dropless",
    "model.attention_dropout": 0.0,
    "model.hidden_dropout": 0.0,
    "model.dtype": "float32",
    "mesh.data": 2,
    "mesh.expert": 2,
    "schedule.warmup_steps": 0,
    "schedule.peak_lr": 1e-2,
    "train.num_steps": 3,
    "checkpoint.every": 1,
    "checkpoint.keep": 3,
}
GRPO = {
    **COMMON,
    "objective.name": "grpo",
    "objective.grpo.num_generations": 4,
    "objective.grpo.max_new_tokens": 8,
    "objective.grpo.steps_per_rollout": 2,
    "objective.grpo.beta": 0.05,
    "train.seq_len": 24,
}
# Half of the pairs are written, and judged by a model on the same mesh, which has five experts.
DPO = {
    **COMMON,
    "mesh.data": 4,
    "mesh.expert": 1,
    "objective.name": "dpo",
    "objective.dpo.online.share": 0.5,
    "objective.dpo.online.num_generations": 4,
    "objective.dpo.online.max_new_tokens": 6,
    "objective.dpo.online.reward_model": str(recipes.FOLDER),
    "data.validation_fraction": 0.4,
    "train.seq_len": 56,
    "train.eval_every": 3,
    "train.eval_batches": 1,
}
REWARDS = """
from pathlib import Path

def vowels(completions, **columns):
    with Path(__file__).with_name("calls").open("a") as file:
        file.write("called ")
    return [sum(c in "aeiou" for c in text) - 0.01 * len(text) for text in completions]

def fails(completions, **columns):
    return 1 / 0
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"say {i}", "chosen": "yes", "rejected": "no, no"} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def grpo(files, function="vowels"):
    rewards = f"('{files / 'rewards.py'}:{function}',)"
    return GRPO | {"data.source": str(files / "rows.jsonl"), "objective.grpo.rewards": rewards}


def run_here(fields, workdir):
    """The run in this process, on four of its eight devices."""
    recipe = runpy.run_path(str(paths.ROOT / "configs" / "tiny.py"))["get_config"]()
    values = {name: eval(v) if str(v).startswith("(") else v for name, v in fields.items()}
    recipe.update_from_flattened_dict(values)
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:4]
        patch.setattr(loop, "make_mesh", lambda cfg: mesh.make_mesh(cfg, devices))
        assert loop.run(from_config_dict(recipe), workdir, build_objective) == 0


def run_in_two(fields, workdir):
    with processes.processes([fields] * 2, workdir) as started:
        return processes.finish(started)


def figures(workdir):
    """{step: the numbers that are logged of it, but those of time and memory}."""
    found = {}
    for row in runs.rows(workdir):
        kept = {
            name: value
            for name, value in row.items()
            if isinstance(value, float) and not re.search("second|mfu|memory|goodput", name)
        }
        found.setdefault(row["step"], {}).update(kept)
    return found


def samples(workdir):
    return (workdir / "completions.jsonl").read_text().splitlines()


def test_rewards_over_two_processes(files, tmp_path):
    """The checkpoint of step 1 holds the answers of step 2."""
    fields = grpo(files)
    statuses, errors = run_in_two(fields, tmp_path / "two")
    assert statuses == [0, 0], errors
    assert (files / "calls").read_text() == "called " * 3  # by process 0 alone
    run_here(fields, tmp_path / "one")
    found, expected = figures(tmp_path / "two"), figures(tmp_path / "one")
    assert list(found) == [1, 2, 3]
    for step, row in expected.items():
        assert found[step] == pytest.approx(row, abs=1e-5), step
    assert expected[1]["reward_std"] > 0.1 and expected[3]["kl"] > 1e-5
    assert samples(tmp_path / "two") == samples(tmp_path / "one")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "two" / "checkpoints" / str(step))
    statuses, errors = run_in_two(fields, tmp_path / "two")
    assert statuses == [0, 0], errors
    assert "resuming at step 1" in errors[0]
    assert figures(tmp_path / "two") == found


def test_pairs_over_two_processes(files, tmp_path):
    fields = DPO | {"data.source": str(files / "rows.jsonl")}
    statuses, errors = run_in_two(fields, tmp_path / "two")
    assert statuses == [0, 0], errors
    run_here(fields, tmp_path / "one")
    assert samples(tmp_path / "two") == samples(tmp_path / "one")
    found, expected = figures(tmp_path / "two"), figures(tmp_path / "one")
    for step, row in expected.items():
        assert found[step] == pytest.approx(row, abs=1e-5), step
    assert expected[1]["online/reward_margin"] > 0 and "validation_loss" in expected[3]


def test_a_reward_that_fails_stops_both(files, tmp_path):
    statuses, errors = run_in_two(grpo(files, "fails"), tmp_path)
    assert statuses == [2, 2], errors
    assert "rewards.py:fails raised ZeroDivisionError" in errors[0].splitlines()[-1]
    assert "error: process 0 of 2 has stopped: " in errors[1].splitlines()[-1]
