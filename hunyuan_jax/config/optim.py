"""The optimizer and its learning rate."""

import dataclasses
from typing import Literal

from hunyuan_jax.config.section import Section, require

StateDtype = Literal["float32", "bfloat16", "fp8_lm"]
ScheduleName = Literal["three_phase", "cosine_with_min_lr"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW with parameter groups."""

    section = "optimizer"

    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Weight decay of matrices; norms, biases and embeddings are not decayed."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    state_dtype: StateDtype = "float32"
    """Storage of master weights and moments: 12, 8 (bfloat16 moments) or 5 bytes a parameter."""
    expert_lr_ratio: float = 0.31
    """Learning rate of routed experts relative to everything else (paper section 3.2)."""
    spike_factor: float = 0.0
    """Skip a step whose gradient norm is this many times the running mean; 0 = only non-finite."""
    spike_after: int = 100
    """Accepted steps before `spike_factor` acts."""

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        for name in ("expert_lr_ratio", "max_grad_norm", "eps"):
            value = getattr(self, name)
            require(value > 0, f"config.optimizer.{name} = {value} must be positive.")
        require(
            self.spike_factor == 0 or self.spike_factor > 1,
            f"config.optimizer.spike_factor = {self.spike_factor} must be above 1 (times the mean "
            "norm), or 0 for no limit.",
        )
        require(
            self.spike_after >= 1,
            f"config.optimizer.spike_after = {self.spike_after} must be at least 1.",
        )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Section):
    """Learning rate over the run (Hunyuan-Large paper, section 3)."""

    section = "schedule"

    name: ScheduleName = "three_phase"
    """three_phase: warmup, long decay, annealing; or one cosine down to `min_lr`."""
    num_steps: int = 0
    """Steps that the learning rate is planned for; then it stays; 0 = `train.num_steps`."""
    peak_lr: float = 3e-4
    """Learning rate after warmup."""
    warmup_steps: int = 100
    """Steps of linear warmup."""
    decay_ratio: float = 0.3
    """three_phase: share of the peak where the long decay ends."""
    anneal_fraction: float = 0.05
    """three_phase: share of the run, at its end, that anneals."""
    anneal_ratio: float = 0.1
    """three_phase: share of the peak reached at the end."""
    min_lr: float = 0.0
    """cosine_with_min_lr: learning rate at the end (absolute, not a ratio)."""

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        require(self.peak_lr > 0, f"config.schedule.peak_lr = {self.peak_lr} must be positive.")
        require(
            self.num_steps >= 0,
            f"config.schedule.num_steps = {self.num_steps} must not be negative; 0 is "
            "config.train.num_steps.",
        )
        require(
            self.warmup_steps >= 0,
            f"config.schedule.warmup_steps = {self.warmup_steps} must not be negative; 0 starts "
            "at the peak.",
        )
        if self.name == "three_phase":
            for name in ("decay_ratio", "anneal_fraction", "anneal_ratio"):
                value = getattr(self, name)
                require(
                    0 <= value <= 1,
                    f"config.schedule.{name} = {value} must be between 0 and 1.",
                )
            require(
                self.anneal_fraction == 0 or self.anneal_ratio <= self.decay_ratio,
                f"config.schedule.anneal_ratio = {self.anneal_ratio} is above decay_ratio = "
                f"{self.decay_ratio}: annealing must not raise the learning rate. Lower "
                "anneal_ratio, or set anneal_fraction = 0 for no annealing.",
            )
        require(
            0 <= self.min_lr <= self.peak_lr,
            f"config.schedule.min_lr = {self.min_lr} must be between 0 and peak_lr = "
            f"{self.peak_lr}; it is absolute, not a ratio.",
        )
