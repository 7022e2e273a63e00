"""Pairs of answers that the policy writes while it trains: a judge picks the best and the worst
of each prompt's (arXiv 2411.02265, section 4.2).

Letters: B rows of a batch, G answers of a prompt.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hunyuan_jax.config import Config
from hunyuan_jax.data.examples import Example
from hunyuan_jax.data.pairs import PackedPairs, stack_pairs
from hunyuan_jax.data.prompts import Prompt, Prompts
from hunyuan_jax.data.stream import Batch
from hunyuan_jax.post.judges import build_judge
from hunyuan_jax.post.rewards import total_rewards
from hunyuan_jax.post.rollout import Completion, PromptStream, Rollouts, example_of
from hunyuan_jax.tokenizer import Tokenizer
from hunyuan_jax.train.state import Program
from hunyuan_jax.train.step import feed

# Fields of a batch, float32 [B], 0 in other rows: 1 where a pair was to be written; 1 where the
# answers gave none; mean score of the answers; score of the best less that of the worst; mean
# tokens of the answers.
FIGURES = ("is_online", "dropped", "reward", "reward_margin", "mean_length")


class OnlinePairs:
    """The DataStream of a run with online pairs; `batches` has its batches.

    The last rows of a batch are online pairs, the others are rows of `offline`.  Each holds one
    pair, or none where the answers of a prompt are equal, as tokens or to the judge.
    """

    def __init__(self, config: Config, offline: PackedPairs | None, tokenizer: Tokenizer):
        """Reads the prompts.

        offline: makes rows beside the online ones; None if there are no others.
        """
        cfg, train = config.objective.dpo.online, config.train
        self._config, self._cfg, self._offline = config, cfg, offline
        self._pad_id, self._judge = tokenizer.pad_id, build_judge(cfg)
        data = dataclasses.replace(config.data, source=cfg.prompts or config.data.source)
        max_tokens = train.seq_len // 2 + 1 - cfg.max_new_tokens
        prompts = Prompts(data, train.seed, max_tokens, tokenizer)
        self._prompts = PromptStream(prompts, round(cfg.share * train.batch_size), 1)
        self.batches = Rollouts(
            config,
            cfg,
            self._prompts,
            tokenizer,
            self._batch,
            of_average=cfg.from_average,
            assist=self._judge.assist,
        )

    def start(
        self,
        program: Program,
        workdir: str,
        reference_of: Callable[[Batch], np.ndarray] | None,
    ) -> None:
        """Takes the model whose weights are followed.

        reference_of: returns the reference's log-probabilities of a batch, float32 [B, T], of
          which this process has its part.
        """
        self._reference_of, self._rows = reference_of, feed(program)[0]
        self._judge.start(program.mesh, self._config.train.seq_len)
        self.batches.start(program, workdir, self._with_reference)

    def _batch(
        self, step: int, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]]
    ) -> Batch:
        """See `rollout.MakeBatch`."""
        cfg, rollouts = self._cfg, self.batches
        texts_PG = [[rollouts.text(answer) for answer in group] for group in groups]
        lengths_PG = np.array([[len(answer.ids) for answer in group] for group in groups])
        scores_BR = self._judge(prompts, texts_PG)
        score_PG = total_rewards(cfg, scores_BR, lengths_PG.reshape(-1)).reshape(len(prompts), -1)
        pairs = [
            best_and_worst(prompt, group, score_G)
            for prompt, group, score_G in zip(prompts, groups, score_PG, strict=True)
        ]
        rows = [[pair] if pair else [] for pair in pairs]
        figures = (
            np.ones(len(rows)),
            [pair is None for pair in pairs],
            np.nan_to_num(score_PG).mean(1),
            np.nan_to_num(score_PG.max(1) - score_PG.min(1)),
            lengths_PG.mean(1),
        )
        batch = {
            **stack_pairs(rows, self._config.train.seq_len, self._pad_id, 1),
            **dict(zip(FIGURES, (np.asarray(f, np.float32) for f in figures), strict=True)),
        }
        rollouts.keep(step, prompts[0], texts_PG[0], score_PG[0])
        if self._offline:
            offline = self._offline.batch(step)
            zeros = np.zeros(len(offline["tokens"]), np.float32)
            offline |= dict.fromkeys(FIGURES, zeros)
            batch = {name: np.concatenate([offline[name], batch[name]]) for name in batch}
        return batch

    def _with_reference(self, batch: Batch) -> Batch:
        """This process's rows of a batch, with those of the reference."""
        if not self._reference_of:
            return batch
        return batch | {"reference": self._reference_of(batch)[self._rows]}

    # --- DataStream

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the batches that hold all offline pairs once, or without them all prompts."""
        stream = self._offline or self._prompts
        B, num_online = self._config.train.batch_size, self._prompts.num_prompts
        return stream.rows_per_epoch * B // (B - num_online if self._offline else num_online)

    def validation(self, num_batches: int, rows: np.ndarray | None = None) -> list[Batch]:
        """Returns the held-out offline pairs."""
        if not self._offline:
            return []
        num_empty = self._prompts.num_prompts
        empty = stack_pairs([[]] * num_empty, self._config.train.seq_len, self._pad_id, 1)
        zeros = dict.fromkeys(FIGURES, np.zeros(self._config.train.batch_size, np.float32))
        whole = [
            {name: np.concatenate([batch[name], empty[name]]) for name in batch} | zeros
            for batch in self._offline.validation(num_batches)
        ]
        kept = slice(None) if rows is None else rows
        return [
            self._with_reference({name: array[kept] for name, array in batch.items()})
            for batch in whole
        ]

    def rows_before(self, step: int) -> dict[str, int]:
        """Returns how many rows of each kind come before 0-based `step`."""
        return self._prompts.rows_before(step) | (
            self._offline.rows_before(step) if self._offline else {}
        )

    def identity(self) -> dict[str, Any]:
        """Those of the prompts and of the offline pairs."""
        return self._prompts.identity() | (self._offline.identity() if self._offline else {})

    def describe(self, step: int) -> dict[str, Any]:
        """Returns what is in the batch of 0-based `step`: see `DataStream.describe`."""
        offline = self._offline.describe(step)["rows"] if self._offline else []
        return {"rows": [*offline, *self._prompts.describe(step)["rows"]]}

    def __str__(self) -> str:
        """The lines of the log."""
        offline = f"; {self._offline}" if self._offline else ""
        return f"online pairs from {self._prompts}{offline}"


def best_and_worst(
    prompt: Prompt, group: Sequence[Completion], score_G: np.ndarray
) -> Example | None:
    """The best and the worst answer as a pair; None if they are equal, or a score is missing."""
    if not np.isfinite(score_G).all() or score_G.max() == score_G.min():
        return None
    chosen, rejected = group[score_G.argmax()], group[score_G.argmin()]
    if list(chosen.ids) == list(rejected.ids):
        return None
    return example_of(prompt, chosen, rejected)
