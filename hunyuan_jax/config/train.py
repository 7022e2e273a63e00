"""The training loop and its checkpoints."""

import dataclasses
import re

from hunyuan_jax.config.section import Section, divisors, require
from hunyuan_jax.files import AnyPath


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    """The training loop."""

    section = "train"

    num_steps: int = 1000
    """Optimizer steps of the run."""
    num_epochs: float = 0.0
    """Passes over the data, which then decide `num_steps`; 0 = `num_steps` is as set."""
    batch_size: int = 8
    """Sequences per step, over all hosts."""
    seq_len: int = 256
    """Tokens per sequence."""
    init_from: AnyPath = ""
    """Initial weights: a model folder, a hub id or a run's workdir; "" = random, from `seed`."""
    ema_decay: float = 0.0
    """Decay per step of a moving average of the weights, which is then validated, exported and
    used; 0 = none."""
    grad_accum_steps: int = 1
    """Micro-batches per step, one after another; they split the batch evenly."""
    seed: int = 0
    """Random seed of initial weights, data order, dropout and routing."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    eval_every: int = 100
    """Steps between two validations."""
    eval_batches: int = 8
    """Batches per validation."""
    max_skipped_steps: int = 20
    """Stop after this many skipped steps in a row (non-finite, or `optimizer.spike_factor`)."""
    watchdog_minutes: float = 30.0
    """Write the stacks of all threads if no step finishes for this long; 0 = never."""
    profile_steps: str = ""
    """Steps to trace into DIR/profile: "10:13" traces steps 10 to 13; "" = none."""
    wandb_project: str = ""
    """Weights & Biases project to log to as well (needs wandb); "" = none."""

    @property
    def profiled(self) -> range:
        """The steps of profile_steps."""
        first, _, last = (self.profile_steps or "1:0").partition(":")
        return range(int(first), int(last) + 1)

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        for name in (
            "num_steps",
            "batch_size",
            "seq_len",
            "grad_accum_steps",
            "log_every",
            "eval_every",
            "eval_batches",
            "max_skipped_steps",
        ):
            value = getattr(self, name)
            require(value >= 1, f"config.train.{name} = {value} must be at least 1.")
        require(
            self.num_epochs >= 0,
            f"config.train.num_epochs = {self.num_epochs} must not be negative; 0 leaves "
            "num_steps as it is.",
        )
        require(
            0 <= self.ema_decay < 1,
            f"config.train.ema_decay = {self.ema_decay} must be in [0, 1); 0 is off.",
        )
        require(
            self.watchdog_minutes >= 0,
            f"config.train.watchdog_minutes = {self.watchdog_minutes} must not be negative; 0 is "
            "off.",
        )
        require(
            not self.profile_steps
            or (
                re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.profile_steps) is not None
                and len(self.profiled) > 0
            ),
            f"config.train.profile_steps = {self.profile_steps!r} must be FIRST:LAST, such as "
            "10:13 for steps 10, 11, 12 and 13.",
        )
        require(
            self.batch_size % self.grad_accum_steps == 0,
            f"config.train.batch_size = {self.batch_size} does not split into "
            f"config.train.grad_accum_steps = {self.grad_accum_steps} equal micro-batches. Use a "
            f"grad_accum_steps from {divisors(self.batch_size)}.",
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section):
    """When to save, what to keep, and where a second copy goes.

    A checkpoint stays if any of `keep`, `keep_every` and `keep_best` keeps it.
    """

    section = "checkpoint"

    every: int = 100
    """Steps between two checkpoints; 0 = by `every_minutes` alone."""
    every_minutes: float = 0.0
    """Also save after this many minutes, checked every `train.log_every` steps; 0 = never."""
    keep: int = 3
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep each checkpoint whose step is a multiple of this; 0 = none."""
    keep_best: int = 1
    """Also keep this many with the lowest validation loss; a new lowest is saved at once."""
    mirror: AnyPath = ""
    """fsspec URL of a second copy, such as gs://BUCKET/RUN, also read from; "" = none."""

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        for name in ("every", "every_minutes", "keep_every", "keep_best"):
            value = getattr(self, name)
            require(
                value >= 0, f"config.checkpoint.{name} = {value} must not be negative; 0 is off."
            )
        require(self.keep >= 1, f"config.checkpoint.keep = {self.keep} must be at least 1.")
        require(
            self.every > 0 or self.every_minutes > 0,
            "config.checkpoint.every = 0 and config.checkpoint.every_minutes = 0.0 would save "
            "nothing before the end; set one of them.",
        )
