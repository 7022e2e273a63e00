"""Distillation: which teacher, what is matched, and how a smaller student inherits weights."""

import dataclasses
from typing import Literal

from hunyuan_jax.config.section import Section, require
from hunyuan_jax.files import AnyPath

Divergence = Literal["forward", "reverse"]
Inherit = Literal["magnitude", "fisher", "mask", "first", "none"]
Rows = Literal["text", "chats"]


@dataclasses.dataclass(frozen=True)
class DistillConfig(Section):
    """Distillation from a larger model, `objective.name` distill."""

    section = "objective.distill"

    teacher: AnyPath = ""
    """Model to learn from: a model folder, a hub id or a run's workdir."""
    rows: Rows = "text"
    """What data.source holds: text, as in pre-training, or chats, as in fine-tuning."""
    divergence: Divergence = "forward"
    """Kullback-Leibler divergence of the student from the teacher (forward: cover all that the
    teacher says), or the other way round (reverse: say only what the teacher would)."""
    weight: float = 0.9
    """Share of the divergence in the loss; the rest is the cross entropy of the data."""
    temperature: float = 1.0
    """Logits of both are divided by it in the divergence, which is multiplied by its square."""
    top_k: int = 0
    """Compare the teacher's most probable tokens, and all others as one; 0 = all one by one."""
    hidden_weight: float = 0.0
    """Weight of matching the last hidden states, by a linear map where widths differ."""
    inner_weight: float = 0.0
    """Weight of matching the hidden states after each of the student's layers in the same way."""
    inner_layers: tuple[int, ...] = ()
    """The teacher's layer that each of the student's is matched with, counted from 0; () = the one
    that it was, if it is inherited from the teacher, else the one at the same share of the depth.
    """
    affinity_weight: float = 0.0
    """Weight of matching which tokens of a row resemble each other, by their hidden states."""
    inherit: Inherit = "magnitude"
    """What the student keeps of a larger model's weights, without train.init_from: the largest,
    those with the largest effect on the loss (fisher), those with the largest learned mask, the
    first, or none."""
    mask_steps: int = 200
    """Steps in which masks are learned before the student's first step."""
    inherit_from: AnyPath = ""
    """The larger model; "" = the teacher."""
    groups: tuple[int, ...] = ()
    """CLA groups that the student inherits, counted from 0; () = as `inherit` says."""

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        require(
            0 <= self.weight <= 1,
            f"config.objective.distill.weight = {self.weight} must be in [0, 1].",
        )
        require(
            self.temperature > 0,
            f"config.objective.distill.temperature = {self.temperature} must be positive.",
        )
        for name in ("top_k", "hidden_weight", "inner_weight", "affinity_weight"):
            value = getattr(self, name)
            require(value >= 0, f"config.objective.distill.{name} = {value} must not be negative.")
        require(
            self.mask_steps >= 1,
            f"config.objective.distill.mask_steps = {self.mask_steps} must be at least 1.",
        )
        require(
            list(self.inner_layers) == sorted(self.inner_layers)
            and min(self.inner_layers, default=0) >= 0,
            f"config.objective.distill.inner_layers = {self.inner_layers} must name layers from 0 "
            "on in ascending order.",
        )
        require(
            list(self.groups) == sorted({*self.groups}) and min(self.groups, default=0) >= 0,
            f"config.objective.distill.groups = {self.groups} must name groups from 0 on in "
            "ascending order, each once.",
        )
