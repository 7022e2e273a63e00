"""What a run minimises: pre-training, or an objective of post-training and its settings."""

import dataclasses
from typing import Literal

from hunyuan_jax.config.distill import DistillConfig
from hunyuan_jax.config.section import Section, require
from hunyuan_jax.files import AnyPath

ObjectiveName = Literal["pretrain", "sft", "dpo", "grpo", "distill"]
PreferenceLoss = Literal["sigmoid", "ipo", "hinge"]
Reference = Literal["stored", "adapter_off"]
BadReward = Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True)
class RolloutConfig(Section):
    """Completions that the model writes while it trains, and functions that judge them."""

    rewards: tuple[str, ...] = ()
    """Functions f(prompts, completions, **columns) -> floats, each as FILE.py:FUNCTION."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each of `rewards` in their sum; () = 1 each."""
    num_generations: int = 8
    """Completions of a prompt."""
    max_new_tokens: int = 256
    """Tokens of a completion, at most; a prompt has room for the others of train.seq_len."""
    steps_per_rollout: int = 1
    """Steps whose completions are drawn at once, by the weights before the first of them."""
    length_penalty: float = 0.0
    """Reward that the longest of a group's best completions loses; the shortest loses none."""
    on_bad_reward: BadReward = "stop"
    """If a judge fails or gives no finite number: stop, or skip the groups concerned."""

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        here = f"config.{self.section}"
        require(
            len(self.reward_weights) in (0, len(self.rewards)),
            f"{here}.reward_weights = {self.reward_weights} must have one weight for each of the "
            f"{len(self.rewards)} rewards, or none.",
        )
        require(
            self.num_generations >= 2,
            f"{here}.num_generations = {self.num_generations} must be at least 2: a completion "
            "is compared with the others of its prompt.",
        )
        for name in ("max_new_tokens", "steps_per_rollout"):
            value = getattr(self, name)
            require(value >= 1, f"{here}.{name} = {value} must be at least 1.")
        require(
            self.length_penalty >= 0,
            f"{here}.length_penalty = {self.length_penalty} must not be negative.",
        )


@dataclasses.dataclass(frozen=True)
class OnlineConfig(RolloutConfig):
    """Pairs of answers that the policy writes itself, the best and the worst by a judge: one of
    `rewards`, `reward_model` and `endpoint`.
    """

    section = "objective.dpo.online"

    share: float = 0.0
    """Share of a batch's rows that hold such a pair; a row then holds one pair.  0 = none, 1 =
    all."""
    prompts: AnyPath = ""
    """Files of rows with `prompt`, as data.source; "" = those of data.source."""
    from_average: bool = False
    """Draw the answers from the moving average of the weights (train.ema_decay)."""
    reward_model: AnyPath = ""
    """A model that says of each answer whether it is good: a folder, a hub id or a run."""
    endpoint: str = ""
    """URL of an OpenAI-compatible API that compares answers, such as http://localhost:8000/v1; its
    key is read from the environment's OPENAI_API_KEY."""
    endpoint_model: str = ""
    """Model that the endpoint is to use; "" names none."""
    criterion: str = "Prefer answers that are correct, helpful and concise."
    """What the endpoint is told to judge by."""
    timeout: float = 60.0
    """Seconds that the endpoint has for an answer."""
    retries: int = 3
    """Times that the endpoint is asked again after a failure, after 1, 2, 4, ... seconds."""

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        super().check()
        here = f"config.{self.section}"
        require(0 <= self.share <= 1, f"{here}.share = {self.share} must be in [0, 1].")
        given = [n for n in ("rewards", "reward_model", "endpoint") if getattr(self, n)]
        require(
            not self.share or len(given) == 1,
            f"{here}.share = {self.share} needs one judge, and has {' and '.join(given) or 'none'}"
            "; set one of rewards, reward_model and endpoint.",
        )
        require(
            not self.endpoint or self.endpoint.startswith(("http://", "https://")),
            f"{here}.endpoint = {self.endpoint!r} must be a URL, such as "
            "http://localhost:8000/v1.",
        )
        require(self.timeout > 0, f"{here}.timeout = {self.timeout} must be positive.")
        require(self.retries >= 0, f"{here}.retries = {self.retries} must not be negative.")


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
    every step with the LoRA adapters off.  With online pairs the weights are kept instead."""
    online: OnlineConfig = OnlineConfig()
    """Pairs that the policy writes itself."""

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
class GrpoConfig(RolloutConfig):
    """Group relative policy optimisation (arXiv 2402.03300), `objective.name` grpo."""

    section = "objective.grpo"

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

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        super().check()
        for name in ("beta", "clip_high"):
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
    """pretrain: the next token; sft: what the assistant says in chats; dpo: preferences between
    two answers; grpo: rewards of answers that it writes itself; distill: what a teacher says."""
    dpo: DpoConfig = DpoConfig()
    """Settings of dpo."""
    grpo: GrpoConfig = GrpoConfig()
    """Settings of grpo."""
    distill: DistillConfig = DistillConfig()
    """Settings of distill."""
