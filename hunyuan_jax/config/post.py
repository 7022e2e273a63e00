"""What a run minimises: pre-training, or an objective of post-training and its settings."""

import dataclasses
from typing import Literal

from hunyuan_jax.config.section import Section, require

ObjectiveName = Literal["pretrain", "sft", "dpo"]
PreferenceLoss = Literal["sigmoid", "ipo", "hinge"]
Reference = Literal["stored", "adapter_off"]


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
class ObjectiveConfig(Section):
    """What the run minimises."""

    section = "objective"

    name: ObjectiveName = "pretrain"
    """pretrain: cross entropy of the next token; sft: of what the assistant says in chats; dpo:
    preferences between two answers."""
    dpo: DpoConfig = DpoConfig()
    """Settings of dpo."""
