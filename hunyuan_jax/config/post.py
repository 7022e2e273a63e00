"""What a run minimises: pre-training, or an objective of post-training and its settings."""

import dataclasses
from typing import Literal

from hunyuan_jax.config.section import Section, require

ObjectiveName = Literal["pretrain", "sft", "dpo", "grpo"]
PreferenceLoss = Literal["sigmoid", "ipo", "hinge"]
Reference = Literal["stored", "adapter_off"]
BadReward = Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True)
class DpoConfig(Section):
    """Direct preference optimisation (arXiv 2305.18290), `objective.name` dpo."""

    section = "objective.dpo"

    loss: PreferenceLoss = "sigmoid"
    """sigmoid; ipo (arXiv 2310.12036, per token as in TRL); hinge (arXiv 2305.10425)."""
    beta: float = 0.1
    """How much a reward counts: rewards are beta times the change of a log-probability."""
    label_smoothing: float = 0.0
    """Share of pairs that are taken to be labelled the wrong way round; sigmoid only."""
    sft_weight: float = 0.0
    """Weight of the cross entropy of the chosen answers, per token."""
    reference: Reference = "stored"
    """Log-probabilities of the initial weights: computed once and stored beside the data, or in
    every step with the LoRA adapters off."""

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        require(self.beta > 0, f"config.objective.dpo.beta = {self.beta} must be positive.")
        require(
            0 <= self.label_smoothing < 0.5,
            f"config.objective.dpo.label_smoothing = {self.label_smoothing} must be in [0, 0.5); "
            "0.5 would leave nothing to learn.",
        )
        require(
            not self.label_smoothing or self.loss == "sigmoid",
            f"config.objective.dpo.label_smoothing = {self.label_smoothing} acts on loss = "
            f"'sigmoid'; it is {self.loss!r}. Set it to 0.",
        )
        require(
            self.sft_weight >= 0,
            f"config.objective.dpo.sft_weight = {self.sft_weight} must not be negative.",
        )


@dataclasses.dataclass(frozen=True)
class GrpoConfig(Section):
    """Group relative policy optimisation (arXiv 2402.03300), `objective.name` grpo."""

    section = "objective.grpo"

    rewards: tuple[str, ...] = ()
    """Functions f(prompts, completions, **columns) -> floats, each as FILE.py:FUNCTION."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each of `rewards` in their sum; () = 1 each."""
    num_generations: int = 8
    """Completions of a prompt; train.batch_size counts completions."""
    max_new_tokens: int = 256
    """Tokens of a completion, at most; a prompt has room for the others of train.seq_len."""
    steps_per_rollout: int = 1
    """Steps whose completions are drawn at once, by the weights before the first of them."""
    beta: float = 0.0
    """Weight of the divergence from the initial weights, by the K3 estimate; 0 = none."""
    clip_low: float = 0.2
    """A token's ratio of probabilities counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """A token's ratio of probabilities counts up to 1 + clip_high."""
    max_ratio: float = 2.0
    """A ratio above it is cut off, whatever the advantage."""
    scale_rewards: bool = True
    """Divide a group's advantages by the standard deviation of its rewards."""
    length_penalty: float = 0.0
    """Reward that the longest of a group's best completions loses; the shortest loses none."""
    on_bad_reward: BadReward = "stop"
    """If a reward function fails or gives no finite number: stop, or skip the groups concerned."""

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        require(
            len(self.reward_weights) in (0, len(self.rewards)),
            f"config.objective.grpo.reward_weights = {self.reward_weights} must have one weight "
            f"for each of the {len(self.rewards)} rewards, or none.",
        )
        require(
            self.num_generations >= 2,
            f"config.objective.grpo.num_generations = {self.num_generations} must be at least 2: "
            "a completion is compared with the others of its prompt.",
        )
        for name in ("max_new_tokens", "steps_per_rollout"):
            value = getattr(self, name)
            require(value >= 1, f"config.objective.grpo.{name} = {value} must be at least 1.")
        for name in ("beta", "clip_high", "length_penalty"):
            value = getattr(self, name)
            require(value >= 0, f"config.objective.grpo.{name} = {value} must not be negative.")
        require(
            0 <= self.clip_low <= 1,
            f"config.objective.grpo.clip_low = {self.clip_low} must be in [0, 1].",
        )
        require(
            self.max_ratio >= 1 + self.clip_high,
            f"config.objective.grpo.max_ratio = {self.max_ratio} must be at least 1 + clip_high = "
            f"{1 + self.clip_high}.",
        )


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Section):
    """What the run minimises."""

    section = "objective"

    name: ObjectiveName = "pretrain"
    """pretrain: cross entropy of the next token; sft: of what the assistant says in chats; dpo:
    preferences between two answers; grpo: rewards of answers that it writes itself."""
    dpo: DpoConfig = DpoConfig()
    """Settings of dpo."""
    grpo: GrpoConfig = GrpoConfig()
    """Settings of grpo."""
