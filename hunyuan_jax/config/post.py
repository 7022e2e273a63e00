"""What a run minimises: pre-training, or an objective of post-training and its settings."""

import dataclasses
from typing import Literal

from hunyuan_jax.config.section import Section

ObjectiveName = Literal["pretrain", "sft"]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Section):
    """What the run minimises."""

    section = "objective"

    name: ObjectiveName = "pretrain"
    """pretrain: cross entropy of the next token; sft: of what the assistant says in chats."""
