"""Group relative policy optimisation (GRPO, arXiv 2402.03300) with a loss per token.

The policy answers each prompt several times; an answer is reinforced by how much better than its
group it is.  Rollouts are made by `post/rollout.py`, with the weights that are trained.

Letters: B completions of a batch, one a row; T tokens; R reward functions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hunyuan_jax.config import Config, GrpoConfig
from hunyuan_jax.data.examples import stack
from hunyuan_jax.data.prompts import Prompt, Prompts
from hunyuan_jax.data.stream import Batch, BatchIterator
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.post.rewards import Reward, advantages, rewards_of, total_rewards
from hunyuan_jax.post.rollout import Completion, PromptStream, Rollouts, example_of
from hunyuan_jax.tokenizer import Tokenizer
from hunyuan_jax.train.objective import BatchSpec, Field, LossMetrics, Totals
from hunyuan_jax.train.pretrain import Pretrain
from hunyuan_jax.train.state import Program
from hunyuan_jax.train.step import feed, make_outputs_step

_MAX_KL = 10.0  # of a token (Hunyuan-TurboS, arXiv 2505.15431)


class Grpo(Pretrain):
    """The objective of rewards; the loss is a mean over the tokens of completions.

    Completions of groups that teach nothing (`rewards.advantages`) count nowhere in it.
    """

    name = "grpo"

    def __init__(self, config: Config):
        super().__init__(config)
        if not config.objective.grpo.rewards:
            raise ConfigError(
                "config.objective.grpo.rewards is empty; name the functions that judge "
                "completions, each as FILE.py:FUNCTION."
            )
        option = f"config.{config.objective.grpo.section}.rewards"
        self._rewards = [Reward(place, option) for place in config.objective.grpo.rewards]

    @property
    def batch_spec(self) -> BatchSpec:
        """The fields of pre-training, with loss_weights 1 on the completion, and those of
        `Rollouts`.
        """
        B, T = self.config.train.batch_size, self.config.train.seq_len
        per_row = Field((B,), "float32", ("batch",))
        per_token = Field((B, T), "float32", ("batch", "seq"))
        return {
            **super().batch_spec,
            "rollout_logprobs": per_token,
            **({"reference_logprobs": per_token} if self.config.objective.grpo.beta else {}),
            "advantages": per_row,
            "is_counted": per_row,
            "is_cut": per_row,
            "reward": per_row,
            "reward_std": per_row,
            "rewards": Field((B, len(self._rewards)), "float32", ("batch", "example_rows")),
        }

    @property
    def eval_spec(self) -> BatchSpec:
        """The fields of training; nothing is validated."""
        return self.batch_spec

    def open_stream(self, tokenizer: Tokenizer) -> PromptStream:
        """Reads the prompts of config.data."""
        train, grpo = self.config.train, self.config.objective.grpo
        max_tokens = train.seq_len + 1 - grpo.max_new_tokens
        prompts = Prompts(self.config.data, train.seed, max_tokens, tokenizer)
        size = grpo.num_generations
        stream = PromptStream(prompts, train.batch_size // size, size)
        self._pad_id = tokenizer.pad_id
        self._rollouts = Rollouts(self.config, grpo, stream, tokenizer, self._batch)
        return stream

    def batches(self, stream: PromptStream, rows: np.ndarray) -> BatchIterator:
        """Rollouts of the weights that the loop shows it."""
        return self._rollouts

    def prepare(
        self, program: Program, workdir: str, initial_params: Callable[[], dict[str, Any]]
    ) -> None:
        """Gives the rollouts a model to roll out, and the reference if the loss asks for one."""
        if not self.config.objective.grpo.beta:
            self._rollouts.start(program, workdir, lambda batch: batch)
            return
        params, outputs = initial_params(), make_outputs_step(program, _log_probs)
        rows, to_devices = feed(program)

        def with_reference(batch):
            log_probs_BT = np.asarray(outputs(params, to_devices(batch))[0])
            return batch | {"reference_logprobs": log_probs_BT[rows]}

        self._rollouts.start(program, workdir, with_reference)

    def _batch(
        self, step: int, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]]
    ) -> Batch:
        """Rewards the completions of a step: see `rollout.MakeBatch`."""
        cfg, rollouts, T = self.config.objective.grpo, self._rollouts, self.config.train.seq_len
        rows = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
        texts_PG = [[rollouts.text(c) for c in group] for group in groups]
        rewards_BR = rewards_of(self._rewards, cfg, prompts, texts_PG)
        lengths_B = np.array([len(completion.ids) for _, completion in rows])
        reward_B = total_rewards(cfg, rewards_BR, lengths_B)
        advantages_B, is_counted_B, std_B = advantages(cfg, reward_B)
        batch = {
            **_rows(rows, T, self._pad_id),
            "advantages": advantages_B,
            "is_counted": is_counted_B,
            "is_cut": np.array([completion.is_cut for _, completion in rows], np.float32),
            "reward": np.nan_to_num(reward_B),
            "reward_std": std_B,
            "rewards": np.nan_to_num(rewards_BR),
        }
        if cfg.beta:
            batch["reference_logprobs"] = np.zeros((len(rows), T), np.float32)
        rollouts.keep(step, prompts[0], texts_PG[0], reward_B[: cfg.num_generations])
        return batch

    def totals(self, batch: dict[str, jax.Array]) -> Totals:
        """Returns the numbers of tokens that teach something, of all tokens of completions, and of
        completions.
        """
        weights_B = batch["loss_weights"].sum(1)
        return {
            "counted": jnp.maximum((weights_B * batch["is_counted"]).sum(), 1.0),
            "tokens": jnp.maximum(weights_B.sum(), 1.0),
            "completions": jnp.float32(len(weights_B)),
        }

    def loss(
        self, model: Transformer, batch: dict[str, jax.Array], totals: Totals, key: jax.Array
    ) -> tuple[jax.Array, LossMetrics]:
        """Returns (the loss; metrics, most of them by the names of TRL)."""
        cfg = self.config.objective.grpo
        output = model(
            batch["tokens"], batch["positions"], batch["segment_ids"], key=key, is_training=True
        )
        figures = model.token_figures(output.hidden_BTD, batch["targets"])
        advantage_BT = batch["advantages"][:, None]
        ratio_BT = jnp.exp(-figures.loss - batch["rollout_logprobs"])
        loss_BT = policy_loss(cfg, ratio_BT, advantage_BT)
        if cfg.beta:
            kl_BT = k3(batch["reference_logprobs"] + figures.loss)
            loss_BT = loss_BT + cfg.beta * kl_BT
        weights_BT = batch["loss_weights"]
        counted_BT = weights_BT * batch["is_counted"][:, None]

        def of_tokens(a_BT):
            return (a_BT.astype(jnp.float32) * weights_BT).sum() / totals["tokens"]

        def of_completions(a_B):
            return a_B.sum() / totals["completions"]

        low_BT = (ratio_BT < 1 - cfg.clip_low) & (advantage_BT < 0)
        high_BT = (ratio_BT > 1 + cfg.clip_high) & (advantage_BT > 0)
        sums = {
            "reward": of_completions(batch["reward"]),
            "reward_std": of_completions(batch["reward_std"]),
            "frac_reward_zero_std": of_completions(1 - batch["is_counted"]),
            "completions/mean_length": of_completions(weights_BT.sum(1)),
            "completions/clipped_ratio": of_completions(batch["is_cut"]),
            "entropy": of_tokens(figures.entropy),
            "clip_ratio/low_mean": of_tokens(low_BT),
            "clip_ratio/high_mean": of_tokens(high_BT),
            "sampling/importance_sampling_ratio/mean": of_tokens(ratio_BT),
            "num_tokens": (batch["segment_ids"] > 0).sum(dtype=jnp.float32),
            **({"kl": of_tokens(kl_BT)} if cfg.beta else {}),
            **{
                f"rewards/{reward.name}/mean": of_completions(batch["rewards"][:, r])
                for r, reward in enumerate(self._rewards)
            },
        }
        loss = (loss_BT * counted_BT).sum() / totals["counted"]
        return loss, LossMetrics(jax.lax.stop_gradient(sums), output.stats)

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Nothing is validated."""
        return {}

    def random_batch(self) -> Batch:
        """Returns random tokens; the second half of each row is its completion."""
        batch = super().random_batch()
        half = self.config.train.seq_len // 2
        batch["loss_weights"][:, :half] = 0
        for name, field in self.batch_spec.items():
            batch.setdefault(name, np.ones(field.shape, field.dtype))
        return batch


def policy_loss(cfg: GrpoConfig, ratio_BT: jax.Array, advantage_BT: jax.Array) -> jax.Array:
    """Returns the clipped loss of each token, float32 [B, T].

    ratio_BT: probability of the token now over that in the rollout.  It is cut off at max_ratio,
    where nothing is learned from it any more; clip_high above clip_low is clip-higher
    (arXiv 2503.14476).
    """
    ratio_BT = jnp.minimum(ratio_BT, cfg.max_ratio)
    clipped_BT = jnp.clip(ratio_BT, 1 - cfg.clip_low, 1 + cfg.clip_high)
    return -jnp.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)


def k3(log_ratio_BT: jax.Array) -> jax.Array:
    """The K3 estimate of the divergence from the reference, clipped to [0, 10].

    log_ratio_BT: log-probability of the reference less that of the policy.
    """
    log_ratio_BT = jnp.minimum(log_ratio_BT, _MAX_KL)  # exp stays finite
    return jnp.clip(jnp.exp(log_ratio_BT) - log_ratio_BT - 1, 0.0, _MAX_KL)


def _log_probs(model: Transformer, batch: dict[str, jax.Array]) -> jax.Array:
    """Log-probabilities of the targets, float32 [B, T]."""
    output = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    return -model.token_losses(output.hidden_BTD, batch["targets"])


def _rows(rows: Sequence[tuple[Prompt, Completion]], T: int, pad_id: int) -> Batch:
    """One completion a row: the fields of pre-training, and rollout_logprobs."""
    rollout_logprobs = np.zeros((len(rows), T), np.float32)
    for b, (prompt, completion) in enumerate(rows):
        start = len(prompt.ids) - 1
        rollout_logprobs[b, start : start + len(completion.ids)] = completion.logprobs
    batch = stack([[example_of(*row)] for row in rows], T, pad_id)
    return {**batch, "rollout_logprobs": rollout_logprobs}
