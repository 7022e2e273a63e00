"""Rewards of completions: functions that a user names, and what a group makes of them.

Letters: P prompts, G completions of each, B = P G completions in the order of their prompts.
"""

import importlib.util
import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hunyuan_jax.config import GrpoConfig, RolloutConfig
from hunyuan_jax.data.prompts import Prompt
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import LocalPath, user_path

# As in TRL: a group whose rewards hardly differ does not get huge advantages.
_EPSILON = 1e-4


class BadReward(Exception):
    """A reward function failed; the message is one line that names it and the row."""


class Reward:
    """A function f(prompts, completions, **columns) -> list of floats, one for each completion.

    prompts: texts or lists of messages, as in the data; completions: texts; columns: the other
    fields of the data, each a list with a value for each completion.
    """

    def __init__(self, place: str, option: str):
        """Loads FILE.py:FUNCTION.

        Args:
          option: the config's field that names it, for errors.

        Raises:
          ConfigError: no such file or function, or the file cannot be imported.
        """
        path, _, name = place.rpartition(":")
        path = user_path(path, option, LocalPath)
        spec = importlib.util.spec_from_file_location("rewards", path) if path else None
        if spec is None or not name:
            raise ConfigError(f"{option} names {place!r}; it must be FILE.py:FUNCTION.")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # the user's code
            raise ConfigError(
                f"{option}: {path} cannot be imported: {type(error).__name__}: {error}."
            ) from error
        function = getattr(module, name, None)
        if not callable(function):
            raise ConfigError(f"{option}: {path} has no function {name!r}.")
        self.name, self._place, self._function = name, place, function

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        rows: Sequence[str],
    ) -> np.ndarray:
        """float32 [B]; NaN where the function gives None or what is not finite.

        Args:
          rows: names of the rows of the data, for errors.

        Raises:
          BadReward: it raises, or returns something else than a number for each completion.
        """
        try:
            found = self._function(prompts=prompts, completions=completions, **columns)
            found = list(found)
        except Exception as error:  # the user's code
            raise BadReward(
                f"{self._place} raised {type(error).__name__}: {error}; its first completion is "
                f"of {rows[0]}."
            ) from error
        if len(found) != len(completions):
            raise BadReward(
                f"{self._place} returned {len(found)} rewards for {len(completions)} completions."
            )
        values = np.full(len(found), np.nan, np.float32)
        for i, value in enumerate(found):
            if isinstance(value, numbers.Real) and math.isfinite(value):
                values[i] = value
        return values


def rewards_of(
    functions: Sequence[Reward],
    cfg: RolloutConfig,
    prompts: Sequence[Prompt],
    texts_PG: Sequence[Sequence[str]],
) -> np.ndarray:
    """float32 [B, R]: a column for each function, NaN where it failed.

    Args:
      texts_PG: the completions of each prompt.

    Raises:
      ConfigError: a function failed and on_bad_reward is "stop".
    """
    asked = [prompt for prompt, texts in zip(prompts, texts_PG, strict=True) for _ in texts]
    texts = [text for texts in texts_PG for text in texts]
    columns = {name: [p.columns.get(name) for p in asked] for name in prompts[0].columns}
    rows = [prompt.name for prompt in asked]
    found = np.full((len(texts), len(functions)), np.nan, np.float32)
    for r, function in enumerate(functions):
        fault = None
        try:
            found[:, r] = function([p.prompt for p in asked], texts, columns, rows)
        except BadReward as error:
            fault = str(error)
        bad = np.flatnonzero(np.isnan(found[:, r]))
        if fault is None and bad.size:
            fault = (
                f"{function.name} gave no finite number for {bad.size} of {len(texts)} "
                f"completions, the first of {rows[bad[0]]}."
            )
        if fault:
            bad_reward(cfg, "rewards", fault)
    return found


def bad_reward(cfg: RolloutConfig, field: str, fault: str) -> None:
    """Stops the run or says that groups are left out, as `on_bad_reward` says.

    Args:
      field: of the config, that names the judge.
      fault: a sentence.
    """
    line = f"config.{cfg.section}.{field}: {fault}"
    if cfg.on_bad_reward == "stop":
        raise ConfigError(line)
    print(f"{line} Their groups are left out.", file=sys.stderr, flush=True)


def total_rewards(cfg: RolloutConfig, rewards_BR: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
    """The weighted sum of the functions' rewards, float32 [B], less the penalty of length.

    The penalty acts among the completions of a group that share its highest reward: the longest
    loses `length_penalty`, the shortest nothing (Hunyuan-TurboS, arXiv 2505.15431).
    """
    weights_R = cfg.reward_weights or (1.0,) * rewards_BR.shape[1]
    reward_PG = (rewards_BR @ np.asarray(weights_R, np.float32)).reshape(-1, cfg.num_generations)
    if cfg.length_penalty:
        length_PG = lengths_B.reshape(reward_PG.shape).astype(np.float32)
        is_best_PG = reward_PG == reward_PG.max(1, keepdims=True)
        shortest_P1 = np.where(is_best_PG, length_PG, np.inf).min(1, keepdims=True)
        longest_P1 = np.where(is_best_PG, length_PG, -np.inf).max(1, keepdims=True)
        share_PG = (length_PG - shortest_P1) / np.maximum(longest_P1 - shortest_P1, 1.0)
        reward_PG = reward_PG - np.where(is_best_PG, cfg.length_penalty * share_PG, 0.0)
    return reward_PG.reshape(-1).astype(np.float32)


def advantages(cfg: GrpoConfig, reward_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(advantage, whether its group teaches something, standard deviation of the group), each [B].

    An advantage is the reward less the mean of its group, divided by the group's standard
    deviation if scale_rewards.  A group of equal rewards, or with one that is not a number,
    teaches nothing.
    """
    reward_PG = reward_B.reshape(-1, cfg.num_generations)
    std_P1 = reward_PG.std(1, ddof=1, keepdims=True)
    advantage_PG = reward_PG - reward_PG.mean(1, keepdims=True)
    if cfg.scale_rewards:
        advantage_PG = advantage_PG / (std_P1 + _EPSILON)
    is_counted_PG = np.broadcast_to(
        np.isfinite(std_P1) & (reward_PG.max(1, keepdims=True) > reward_PG.min(1, keepdims=True)),
        reward_PG.shape,
    )
    advantage_PG = np.where(is_counted_PG, advantage_PG, 0.0)
    std_PG = np.broadcast_to(np.nan_to_num(std_P1), reward_PG.shape)
    return tuple(a.reshape(-1).astype(np.float32) for a in (advantage_PG, is_counted_PG, std_PG))
