"""Rewards: what a group makes of them, the loss against numpy, and runs that roll out, stop and
continue.
"""

import dataclasses
import itertools
import json
import random
import shutil
import signal

import numpy as np
import pytest

from hunyuan_jax.checkpoint.store import finished_steps
from hunyuan_jax.config import GrpoConfig
from hunyuan_jax.data.prompts import Prompt
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.post import grpo, rewards
from hunyuan_jax.post.build import build_objective
from hunyuan_jax.report import page
from hunyuan_jax.train import loop
from support import processes, recipes, runs

FUNCTIONS = """
def vowels(prompts, completions, wanted, **columns):
    assert len(prompts) == len(completions) == len(wanted)
    return [sum(c in "aeiou" for c in text) / (1 + len(text)) * w
            for text, w in zip(completions, wanted)]

def short(completions, **columns):
    return [-len(text) for text in completions]

def raises(completions, **columns):
    return 1 / 0

def too_few(completions, **columns):
    return [0.0]

def not_a_number(completions, **columns):
    return [float("nan"), *[1.0] * (len(completions) - 1)]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    (folder / "rewards.py").write_text(FUNCTIONS)
    rows = [{"prompt": f"say {i}", "wanted": 1 + i % 2} for i in range(6)]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"wanted": 1}])
    (folder / "prompts.jsonl").write_text(text)
    return folder


def config_of(files, *names, **changes):
    return recipes.config_of(
        "grpo",
        files / "prompts.jsonl",
        **{
            "objective__grpo__rewards": tuple(f"{files / 'rewards.py'}:{name}" for name in names),
            "objective__grpo__num_generations": 4,
            "objective__grpo__max_new_tokens": 8,
            "data__max_bad_fraction": 0.5,
            "train__seq_len": 24,
            "train__batch_size": 8,
            "train__num_steps": 4,
            "schedule__peak_lr": 1e-2,
            "checkpoint__every": 2,
            **changes,
        },
    )


def run(config, workdir):
    with runs.on_one_device():
        return loop.run(config, workdir, build_objective)


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """A run whose batches of two steps are drawn at once, with a reference."""
    workdir = tmp_path_factory.mktemp("run")
    config = config_of(
        files,
        "vowels",
        "short",
        objective__grpo__reward_weights=(1.0, 0.01),
        objective__grpo__steps_per_rollout=2,
        objective__grpo__beta=0.05,
    )
    assert run(config, workdir) == 0
    return workdir, config


@pytest.mark.heavy
def test_the_first_step_has_a_ratio_of_1_and_no_divergence(finished):
    rows = [row for row in runs.rows(finished[0]) if "loss" in row]
    assert rows[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["loss"] == pytest.approx(0, abs=0.3) and rows[0]["grad_norm"] > 0
    # The second batch of a rollout is of older weights, and the weights have moved.
    assert abs(rows[1]["sampling/importance_sampling_ratio/mean"] - 1) > 1e-4
    assert rows[2]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert rows[3]["kl"] > 1e-5
    for row in rows:
        total = row["rewards/vowels/mean"] + 0.01 * row["rewards/short/mean"]
        assert row["reward"] == pytest.approx(total, abs=1e-5)
        assert 1 <= row["completions/mean_length"] <= 8
    lines = (finished[0] / "completions.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [sample["step"] for sample in samples] == [1, 2, 3, 4]
    assert all(len(s["completions"]) == len(s["rewards"]) == 4 for s in samples)


@pytest.mark.heavy
def test_the_report_shows_rewards_and_completions(finished, tmp_path):
    text = page.write(finished[0], tmp_path / "report.html").read_text()
    assert '<div id="reward">' in text and '<div id="frac_reward_zero_std">' in text
    last = json.loads((finished[0] / "completions.jsonl").read_text().splitlines()[-1])
    assert f"<h3>step 4: {last['prompt']}</h3>" in text
    assert text.count("<h3>") == 4


@pytest.mark.slow
def test_a_run_that_breaks_off_within_a_rollout_continues_bit_equal(finished, tmp_path):
    """The checkpoint of step 1 holds the answers of step 2."""
    workdir, config = finished
    config = dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, every=1, keep=9)
    )
    rewarded, calls = rewards.Reward.__call__, itertools.count(1)

    def break_off(self, *call):
        if next(calls) == 3 * len(config.objective.grpo.rewards):
            raise RuntimeError("broken off")
        return rewarded(self, *call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.Reward, "__call__", break_off)
        with pytest.raises(RuntimeError, match="broken off"):
            run(config, tmp_path)
    assert set(finished_steps(tmp_path / "checkpoints")) == {1, 2}
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    assert run(config, tmp_path) == 0
    assert runs.losses(tmp_path) == runs.losses(workdir)
    lines = (tmp_path / "completions.jsonl").read_text()
    assert lines == (workdir / "completions.jsonl").read_text()


GRPO = {
    "objective.name": "grpo",
    "objective.grpo.num_generations": 4,
    "objective.grpo.max_new_tokens": 8,
    "objective.grpo.steps_per_rollout": 2,
    "objective.grpo.beta": 0.05,
    "model.moe.dispatch": "dropless",
    "model.attention_dropout": 0.0,
    "model.hidden_dropout": 0.0,
    "train.seq_len": 24,
    "train.num_steps": 12,
    "checkpoint.every": 3,
}
# (first and last call, longest delay) of a kill.
PLACES = {
    "in a step": ((2, 6), 0.05),
    "in a rollout": ((2, 3), 0.3),
    "in the save": ((1, 1), 0.15),
    "in the checksums": ((1, 1), 0.03),
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kill_9_at_random_moments(files, tmp_path):
    fields = GRPO | {"objective.grpo.rewards": f"('{files / 'rewards.py'}:vowels',)"}
    prompts = files / "prompts.jsonl"
    fields |= {"data.max_bad_fraction": 0.5}
    processes.run(prompts, tmp_path / "whole", **fields)
    rng, killed = random.Random(0), []
    for place in PLACES:
        (first, last), delay = PLACES[place]
        when = (str(rng.randint(first, last)), str(rng.uniform(0, delay)))
        script = ("-c", processes.KILLER, place, *when)
        process = processes.start(prompts, tmp_path / "run", script, **fields)
        status, error = processes.finished(process)
        assert status in (0, -signal.SIGKILL), error
        killed += [place] * (status != 0)
    processes.run(prompts, tmp_path / "run", **fields)
    assert processes.losses(tmp_path / "run") == processes.losses(tmp_path / "whole")
    print(f"\n| kill -9 of a run by rewards | {len(killed)} | {', '.join(killed)} |")
    assert len(killed) >= 3


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("raises", r"rewards\.py:raises raised ZeroDivisionError: .* is of .*prompts\.jsonl:"),
        ("too_few", r"rewards\.py:too_few returned 1 rewards for 8 completions"),
        ("not_a_number", r"not_a_number gave no finite number for 1 of 8 completions, the first"),
    ],
)
def test_a_reward_that_fails_stops_or_leaves_its_groups_out(files, capsys, name, line):
    function = rewards.Reward(f"{files / 'rewards.py'}:{name}", "config.rewards")
    asked = [Prompt(f"prompts.jsonl:{i}", (1,), "", {}) for i in (1, 2)]
    texts = [["text"] * 4] * 2
    cfg = GrpoConfig(num_generations=4, on_bad_reward="skip")
    with pytest.raises(ConfigError, match=rf"config\.objective\.grpo\.rewards: .*{line}"):
        rewards.rewards_of([function], GrpoConfig(num_generations=4), asked, texts)
    found = rewards.rewards_of([function], cfg, asked, texts)
    assert "Their groups are left out." in capsys.readouterr().err
    _, is_counted_B, _ = rewards.advantages(cfg, rewards.total_rewards(cfg, found, np.ones(8)))
    assert not is_counted_B.any()  # the other group's rewards are equal


@pytest.mark.parametrize("place", ["rewards", "nowhere.py:f", "{}:missing", "{}"])
def test_a_function_that_is_not_there_is_refused(files, place):
    with pytest.raises(ConfigError, match=r"config\.rewards"):
        rewards.Reward(place.format(files / "rewards.py"), "config.rewards")


def test_advantages_are_those_of_numpy():
    reward_B = np.array([1, 0, 0, 1, 2, 2, 2, 2, 0, 1, np.nan, 1], np.float32)
    cfg = GrpoConfig(num_generations=4)
    advantage_B, is_counted_B, std_B = rewards.advantages(cfg, reward_B)
    expected = 0.5 / (np.std([1, 0, 0, 1], ddof=1) + 1e-4)
    np.testing.assert_allclose(advantage_B[:4], [expected, -expected, -expected, expected], 1e-6)
    assert not advantage_B[4:].any()
    np.testing.assert_array_equal(is_counted_B, [1] * 4 + [0] * 8)
    np.testing.assert_allclose(std_B, [np.std([1, 0, 0, 1], ddof=1)] * 4 + [0] * 8, 1e-6)
    plain = GrpoConfig(num_generations=4, scale_rewards=False)
    np.testing.assert_allclose(rewards.advantages(plain, reward_B)[0][:4], [0.5, -0.5, -0.5, 0.5])


def test_equally_good_answers_lose_by_their_length():
    cfg = GrpoConfig(num_generations=4, length_penalty=0.2)
    found = rewards.total_rewards(
        cfg, np.array([[1.0], [1.0], [0.0], [1.0]], np.float32), np.array([10, 30, 90, 20])
    )
    np.testing.assert_allclose(found, [1.0, 0.8, 0.0, 0.9], 1e-6)


def test_the_loss_is_that_of_numpy():
    rng = np.random.default_rng(0)
    ratio_BT = np.exp(rng.normal(size=(4, 9))).astype(np.float32)
    advantage_BT = np.array([[1.0], [-1.0], [0.5], [0.0]], np.float32)
    cfg = GrpoConfig(clip_low=0.1, clip_high=0.3, max_ratio=1.5)
    cut = np.minimum(ratio_BT, 1.5)
    expected = -np.minimum(cut * advantage_BT, np.clip(cut, 0.9, 1.3) * advantage_BT)
    np.testing.assert_allclose(grpo.policy_loss(cfg, ratio_BT, advantage_BT), expected, 1e-6)
    log_ratio = np.array([-80.0, -1.0, 0.0, 1.0, 80.0], np.float32)
    expected = np.clip(np.exp(np.minimum(log_ratio, 20)) - log_ratio - 1, 0, 10)
    np.testing.assert_allclose(grpo.k3(log_ratio), expected, 1e-5)


def test_a_run_without_rewards_is_refused(files):
    with pytest.raises(ConfigError, match=r"grpo\.rewards is empty; name the functions"):
        build_objective(config_of(files))
