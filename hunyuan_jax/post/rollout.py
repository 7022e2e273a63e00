"""Batches of completions, drawn by the engine from the weights that are being trained.

The engine holds the arrays of the train state, or for adapters and other dtypes a copy in the
dtype of the model; a step replaces them and forgets the cached prompts.  It draws one completion
alike whatever else it draws, so a run that continues draws what it would have drawn.
Of several processes the first plans what is drawn and judges it; the others compute their part,
and get their rows of the batch.

Letters: G completions of a group.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hunyuan_jax.config import Config, RolloutConfig
from hunyuan_jax.data.examples import Example, text_of
from hunyuan_jax.data.prompts import Prompt, Prompts
from hunyuan_jax.data.stream import Batch
from hunyuan_jax.infer import channel
from hunyuan_jax.infer.engine import Engine
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.infer.request import Limits, Request
from hunyuan_jax.infer.settings import Sampling
from hunyuan_jax.layers import lora
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.parallel import hosts
from hunyuan_jax.params import abstract
from hunyuan_jax.quant.scaled import is_scaled, load_params
from hunyuan_jax.runlog import metrics
from hunyuan_jax.tokenizer import Tokenizer
from hunyuan_jax.train.objective import BatchSpec
from hunyuan_jax.train.state import Program, TrainState, used_params
from hunyuan_jax.train.step import feed

_MAX_ROWS = 64  # that the engine computes at the same time


class Completion(NamedTuple):
    """ids: the last is a stop token, unless it was cut at max_new_tokens; logprobs: of each id."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    is_cut: bool


def example_of(prompt: Prompt, *completions: Completion) -> Example:
    """The prompt with each completion as a segment, of which the completion is learned."""
    start = len(prompt.ids)
    texts = (
        text_of([*prompt.ids, *one.ids], [False] * start + [True] * len(one.ids))
        for one in completions
    )
    return Example(prompt.name, tuple(texts))


# (0-based step, its prompts, the completions of each) -> the batch of that step.  Process 0 calls
# it.
MakeBatch = Callable[[int, Sequence[Prompt], Sequence[Sequence[Completion]]], Batch]


def _nothing() -> None:
    """For what process 0 does alone."""


class Rollouts:
    """The batches of a run, in order: see `data.stream.BatchIterator`.

    One rollout serves `steps_per_rollout` steps, so its later batches are of older weights; those
    that a checkpoint finds unused are part of its state.
    """

    def __init__(
        self,
        config: Config,
        cfg: RolloutConfig,
        prompts: "PromptStream",
        tokenizer: Tokenizer,
        make_batch: MakeBatch,
        *,
        of_average: bool = False,
        assist: Callable[[], None] = _nothing,
    ):
        """of_average: whether the moving average of the weights writes; assist: what the other
        processes do while process 0 makes a batch.
        """
        self._config, self._cfg, self._prompts = config, cfg, prompts
        self._tokenizer, self._make_batch, self._of_average = tokenizer, make_batch, of_average
        self._assist = assist
        self._next_step = 0
        self._unused: list[list[list[Completion]]] = []  # of each step, of each prompt

    def start(self, program: Program, workdir: str, complete: Callable[[Batch], Batch]) -> None:
        """Takes the model whose weights `follow` shows.

        complete: returns this process's rows of a batch with what the mesh computes of them.
        """
        self._program, self._complete, self._rows = program, complete, feed(program)[0]
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

    def follow(self, state: TrainState) -> None:
        """Shows the train state after the last step."""
        self._params = used_params(state) if self._of_average else state.params

    def __iter__(self) -> "Rollouts":
        return self

    def __next__(self) -> Batch:
        if not self._unused:
            self._unused = self._roll_out()
        groups, batch = self._unused.pop(0), {}
        with hosts.fail_together():
            if hosts.is_first():
                prompts = self._prompts.of_step(self._next_step)
                batch = self._make_batch(self._next_step, prompts, groups)
            else:
                self._assist()
        batch = _from_first(batch, self._program.objective.batch_spec)
        self._next_step += 1
        return self._complete({name: array[self._rows] for name, array in batch.items()})

    def get_state(self) -> dict[str, Any]:
        """Returns the next step and the completions that wait for it; survives JSON."""
        return {"next_index": self._next_step, "unused": self._unused}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `get_state` was called."""
        self._next_step = state["next_index"]
        self._unused = [
            [[Completion(*completion) for completion in group] for group in groups]
            for groups in state["unused"]
        ]

    def close(self) -> None:
        """Nothing runs between two batches."""

    # --- Rolling out

    def _roll_out(self) -> list[list[list[Completion]]]:
        """Completions for steps_per_rollout steps from the next one on; in processes but the first
        they are empty.
        """
        steps = range(self._next_step, self._next_step + self._cfg.steps_per_rollout)
        prompts = [(step, p) for step in steps for p in self._prompts.of_step(step)]
        stop_ids = self._stop_ids()
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
        engine = self._engine()
        with hosts.fail_together():
            outputs = engine.run_together(requests)
        for output in outputs:
            place, choice = int(output.id), output.choice
            ids[place][choice] += output.tokens
            logprobs[place][choice] += [entry.logprob for entry in output.logprobs or ()]
            is_cut[place][choice] |= output.finish_reason == "length"
        engine.replace_weights(None)  # the step needs the memory, and donates the state
        groups = [
            list(map(Completion, *fields)) for fields in zip(ids, logprobs, is_cut, strict=True)
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
                max_rows=min(_MAX_ROWS, self._prompts.num_prompts * self._cfg.num_generations),
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

    # --- For those who make batches

    def text(self, completion: Completion) -> str:
        """What a completion says, without its stop token."""
        ids = completion.ids
        return self._tokenizer.decode(ids[:-1] if ids[-1] in self._stop_ids() else ids)

    def keep(self, step: int, prompt: Prompt, texts: Sequence[str], reward_G: np.ndarray) -> None:
        """Appends a group of 0-based `step` to the file of samples."""
        row = {
            "step": step + 1,
            "prompt": prompt.prompt,
            "completions": list(texts),
            "rewards": [None if np.isnan(r) else round(float(r), 4) for r in reward_G],
        }
        with self._samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _stop_ids(self) -> set[int]:
        return {*self._tokenizer.stop_ids, *self._plain.eos_token_ids}


class PromptStream:
    """The prompts of each step, as the loop asks of its data (`data.stream.DataStream`); batches
    of them are made by `Rollouts`.
    """

    def __init__(self, prompts: Prompts, num_prompts: int, rows_per_prompt: int):
        """num_prompts: of a step; rows_per_prompt: of a batch."""
        self._prompts, self._per_prompt = prompts, rows_per_prompt
        self.num_prompts = num_prompts

    def of_step(self, step: int) -> list[Prompt]:
        """The prompts of 0-based `step`."""
        first = step * self.num_prompts
        return [self._prompts.prompt(first + i) for i in range(self.num_prompts)]

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all prompts."""
        return len(self._prompts.all) * self._per_prompt

    def validation(self, num_batches: int, rows: np.ndarray | None = None) -> list[Batch]:
        """Nothing is held out: what is written in training was never seen before."""
        return []

    def rows_before(self, step: int) -> dict[str, int]:
        """Returns how many rows come before 0-based `step`."""
        return {"completions": step * self.num_prompts * self._per_prompt}

    def identity(self) -> dict[str, Any]:
        """That of the prompts."""
        return self._prompts.identity()

    def describe(self, step: int) -> dict[str, Any]:
        """Returns the prompts of 0-based `step`: see `DataStream.describe`."""
        rows = [
            {"source": "prompts", "documents": [{"name": prompt.name}]}
            for prompt in self.of_step(step)
            for _ in range(self._per_prompt)
        ]
        return {"rows": rows}

    def __str__(self) -> str:
        """The line of the log."""
        return str(self._prompts)


def _from_first(batch: Batch, spec: BatchSpec) -> Batch:
    """Process 0's batch, in all processes."""
    like = [np.empty(field.shape, field.dtype) for field in spec.values()]
    data = channel.to_bytes([batch[name] for name in spec]) if batch else b""
    data = hosts.bytes_from_first(data, sum(array.nbytes for array in like))
    return dict(zip(spec, channel.from_bytes(like, data), strict=True))


def _seed(run_seed: int, step: int, place: int) -> int:
    """A seed of its own for each prompt of each step."""
    digest = hashlib.blake2b(f"{run_seed}/{step}/{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
