"""Batches of completions, drawn by the engine from the weights that are being trained.

The engine holds the arrays of the train state, or for adapters and other dtypes a copy in the
dtype of the model; a step replaces them and forgets the cached prompts.  It draws one completion
alike whatever else it draws, so a run that continues draws what it would have drawn.

Letters: B completions of a batch, T tokens of a row.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hunyuan_jax.config import Config
from hunyuan_jax.data.prompts import Prompt, Prompts
from hunyuan_jax.data.stream import Batch
from hunyuan_jax.infer.engine import Engine
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.infer.request import Limits, Request
from hunyuan_jax.infer.settings import Sampling
from hunyuan_jax.layers import lora
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.params import abstract
from hunyuan_jax.post.rewards import Reward, advantages, rewards_of, total_rewards
from hunyuan_jax.quant.scaled import is_scaled, load_params
from hunyuan_jax.runlog import metrics
from hunyuan_jax.tokenizer import Tokenizer
from hunyuan_jax.train.state import Program

_MAX_ROWS = 64  # that the engine computes at the same time

# A completion: its ids, log-probabilities of these, whether it was cut at max_new_tokens.
Completion = tuple[list[int], list[float], bool]


class Rollouts:
    """The batches of a run, in order: see `data.stream.BatchIterator`.

    One rollout serves `steps_per_rollout` steps, so its later batches are of older weights; those
    that a checkpoint finds unused are part of its state.
    """

    def __init__(
        self,
        config: Config,
        prompts: Prompts,
        tokenizer: Tokenizer,
        rewards: Sequence[Reward],
    ):
        self._config, self._cfg = config, config.objective.grpo
        self._prompts, self._tokenizer, self._rewards = prompts, tokenizer, rewards
        self._next_step = 0
        self._unused: list[list[list[Completion]]] = []  # of each step, of each prompt

    def start(
        self, program: Program, workdir: str, reference: Callable[[Batch], np.ndarray] | None
    ) -> None:
        """Takes the model whose weights `follow` shows.

        reference: returns the log-probabilities of a batch's targets, float32 [B, T].
        """
        self._program, self._reference = program, reference
        self._samples = Path(workdir, metrics.COMPLETIONS)
        self._rollout_engine: Engine | None = None
        cfg, _ = lora.merge(program.config.model, {})
        self._plain = cfg
        specs = abstract_model(cfg, program.mesh)[1]

        def in_use(params):
            _, params = lora.merge(program.config.model, load_params(params))
            return jax.tree.map(
                lambda a, spec: a.astype(spec.dtype_in_use(cfg.dtype)), params, specs
            )

        self._in_use = jax.jit(in_use, out_shardings=abstract.shardings(specs))
        self._specs = specs

    # --- BatchIterator

    def follow(self, params: dict[str, Any]) -> None:
        """Shows the weights of the train state after the last step."""
        self._params = params

    def __iter__(self) -> "Rollouts":
        return self

    def __next__(self) -> Batch:
        if not self._unused:
            self._unused = self._roll_out()
        groups = self._unused.pop(0)
        prompts = self._prompts_of(self._next_step)
        batch = self._batch(prompts, groups)
        self._next_step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the next step and the completions that wait for it; survives JSON."""
        return {"next_index": self._next_step, "unused": self._unused}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `get_state` was called."""
        self._next_step = state["next_index"]
        self._unused = [
            [[tuple(completion) for completion in group] for group in groups]
            for groups in state["unused"]
        ]

    def close(self) -> None:
        """Nothing runs between two batches."""

    # --- Rolling out

    def _prompts_of(self, step: int) -> list[Prompt]:
        count = self._config.train.batch_size // self._cfg.num_generations
        return [self._prompts.prompt(step * count + i) for i in range(count)]

    def _roll_out(self) -> list[list[list[Completion]]]:
        """Completions for steps_per_rollout steps from the next one on."""
        steps = range(self._next_step, self._next_step + self._cfg.steps_per_rollout)
        prompts = [(step, p) for step in steps for p in self._prompts_of(step)]
        stop_ids = {*self._tokenizer.stop_ids, *self._plain.eos_token_ids}
        requests = [
            Request(
                "",
                prompt.ids,
                Sampling(
                    max_new_tokens=self._cfg.max_new_tokens,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    seed=_seed(self._config.train.seed, step, place),
                    stop_ids=tuple(sorted(stop_ids)),
                    logprobs=0,
                ).resolved({"min_new_tokens": 0, "min_p": 0.0, "repetition_penalty": 1.0}),
                n=self._cfg.num_generations,
            )
            for place, (step, prompt) in enumerate(prompts)
        ]
        ids = [[[] for _ in range(request.n)] for request in requests]
        logprobs = [[[] for _ in range(request.n)] for request in requests]
        is_cut = [[False] * request.n for request in requests]
        for output in self._engine().run(requests):
            place, choice = int(output.id), output.choice
            ids[place][choice] += output.tokens
            logprobs[place][choice] += [entry.logprob for entry in output.logprobs or ()]
            is_cut[place][choice] |= output.finish_reason == "length"
        groups = [
            list(zip(*fields, strict=True)) for fields in zip(ids, logprobs, is_cut, strict=True)
        ]
        per_step = len(groups) // len(steps)
        return [groups[i * per_step : (i + 1) * per_step] for i in range(len(steps))]

    def _engine(self) -> Engine:
        params = self._params
        if not self._is_in_use(params):
            params = self._in_use(params)
        if self._rollout_engine is None:
            model = Pretrained(self._plain, params, mesh=self._program.mesh)
            limits = Limits(
                max_rows=min(_MAX_ROWS, self._config.train.batch_size),
                max_context=self._config.train.seq_len + 1,
                max_queue=sys.maxsize,
                invariant=True,
            )
            self._rollout_engine = model.new_engine(limits)
        else:
            self._rollout_engine.replace_weights(params)
        return self._rollout_engine

    def _is_in_use(self, params: dict[str, Any]) -> bool:
        """Whether the state's own arrays are those that the model computes with."""
        if self._program.config.model.lora.rank:
            return False
        leaves = jax.tree.leaves(params, is_leaf=is_scaled)
        return not any(
            is_scaled(leaf) or leaf.dtype != spec.dtype_in_use(self._plain.dtype)
            for leaf, spec in zip(leaves, jax.tree.leaves(self._specs), strict=True)
        )

    # --- Batches

    def _batch(self, prompts: Sequence[Prompt], groups: list[list[Completion]]) -> Batch:
        size, T = self._cfg.num_generations, self._config.train.seq_len
        rows = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
        texts = [self._text(ids) for _, (ids, _, _) in rows]
        lengths_B = np.array([len(ids) for _, (ids, _, _) in rows])
        names = [prompt.name for prompt, _ in rows]
        columns = {name: [p.columns.get(name) for p, _ in rows] for name in prompts[0].columns}
        rewards_BR = rewards_of(
            self._rewards,
            self._cfg.on_bad_reward,
            lambda line: print(line, file=sys.stderr, flush=True),
            [prompt.prompt for prompt, _ in rows],
            texts,
            columns,
            names,
        )
        reward_B = total_rewards(self._cfg, rewards_BR, lengths_B)
        advantages_B, is_counted_B, std_B = advantages(self._cfg, reward_B)
        batch = {
            **_rows(rows, T, self._tokenizer.pad_id),
            "advantages": advantages_B,
            "is_counted": is_counted_B,
            "is_cut": np.array([is_cut for _, (_, _, is_cut) in rows], np.float32),
            "reward": np.nan_to_num(reward_B),
            "reward_std": std_B,
            "rewards": np.nan_to_num(rewards_BR),
        }
        if self._reference:
            batch["reference_logprobs"] = np.zeros((len(rows), T), np.float32)
            batch["reference_logprobs"] = self._reference(batch)
        self._keep(prompts[0], texts[:size], reward_B[:size])
        return batch

    def _text(self, ids: Sequence[int]) -> str:
        ends = ids and ids[-1] in {*self._tokenizer.stop_ids, *self._plain.eos_token_ids}
        return self._tokenizer.decode(ids[:-1] if ends else ids)

    def _keep(self, prompt: Prompt, texts: Sequence[str], reward_G: np.ndarray) -> None:
        """Appends a group to the file of samples."""
        row = {
            "step": self._next_step + 1,
            "prompt": prompt.prompt,
            "completions": list(texts),
            "rewards": [None if np.isnan(r) else round(float(r), 4) for r in reward_G],
        }
        with self._samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _rows(rows: Sequence[tuple[Prompt, Completion]], T: int, pad_id: int) -> Batch:
    """One completion a row: the fields of pre-training, and rollout_logprobs."""
    B = len(rows)
    tokens, targets = (np.full((B, T), pad_id, np.int32) for _ in range(2))
    segment_ids, positions = (np.zeros((B, T), np.int32) for _ in range(2))
    loss_weights, rollout_logprobs = (np.zeros((B, T), np.float32) for _ in range(2))
    for b, (prompt, (ids, logprobs, _)) in enumerate(rows):
        text = [*prompt.ids, *ids]
        n, start = len(text) - 1, len(prompt.ids) - 1
        tokens[b, :n], targets[b, :n] = text[:-1], text[1:]
        segment_ids[b, :n], positions[b, :n] = 1, np.arange(n)
        loss_weights[b, start:n] = 1
        rollout_logprobs[b, start:n] = logprobs
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": segment_ids,
        "positions": positions,
        "loss_weights": loss_weights,
        "rollout_logprobs": rollout_logprobs,
    }


def _seed(run_seed: int, step: int, place: int) -> int:
    """A seed of its own for each prompt of each step."""
    digest = hashlib.blake2b(f"{run_seed}/{step}/{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
