"""The config of a whole run."""

import dataclasses

from hunyuan_jax.config.data import DataConfig
from hunyuan_jax.config.mesh import MeshConfig
from hunyuan_jax.config.model import ModelConfig
from hunyuan_jax.config.optim import OptimizerConfig, ScheduleConfig
from hunyuan_jax.config.post import ObjectiveConfig
from hunyuan_jax.config.section import Section, divisors, require
from hunyuan_jax.config.train import CheckpointConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config(Section):
    """A whole run. Its own rules are those that span sections."""

    section = ""

    model: ModelConfig
    """Architecture and how it is computed."""
    mesh: MeshConfig = MeshConfig()
    """Sizes of the mesh axes."""
    data: DataConfig = DataConfig()
    """Training text and tokenizer."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW with parameter groups."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the run."""
    train: TrainConfig = TrainConfig()
    """The training loop."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save and what to keep."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What the run minimises."""

    def check(self) -> None:
        """Raises ConfigError if two sections do not fit each other."""
        moe, train = self.model.moe, self.train
        require(
            self.mesh.expert == -1 or moe.num_experts % self.mesh.expert == 0,
            f"config.model.moe.num_experts = {moe.num_experts} does not divide over "
            f"config.mesh.expert = {self.mesh.expert}; each shard holds an equal share. Use a "
            f"mesh.expert from {divisors(moe.num_experts)}.",
        )
        require(
            train.seq_len <= self.model.max_position,
            f"config.train.seq_len = {train.seq_len} is above config.model.max_position = "
            f"{self.model.max_position}.",
        )
        require(
            not (train.num_epochs and self.data.sources),
            f"config.train.num_epochs = {train.num_epochs} has no meaning for a mixture, whose "
            "sources are not passed equally often; set config.train.num_steps.",
        )
        require(
            not (train.ema_decay and self.optimizer.state_dtype == "fp8_lm"),
            f"config.train.ema_decay = {train.ema_decay} needs float32 weights: small changes "
            "vanish in the 16 bits of config.optimizer.state_dtype = 'fp8_lm'; take float32 or "
            "bfloat16.",
        )
        self._check_few_bits()
        if self.objective.name == "dpo":
            self._check_dpo()
        if self.objective.name == "grpo":
            self._check_grpo()
        if self.objective.name == "distill":
            require(
                self.objective.distill.top_k <= self.model.vocab_size,
                f"config.objective.distill.top_k = {self.objective.distill.top_k} is above "
                f"config.model.vocab_size = {self.model.vocab_size}; 0 compares all tokens.",
            )
        planned, name = self.schedule.num_steps or train.num_steps, "train.num_steps"
        if self.schedule.num_steps:
            name = "schedule.num_steps"
        require(
            self.schedule.warmup_steps <= planned,
            f"config.schedule.warmup_steps = {self.schedule.warmup_steps} must be at most "
            f"config.{name} = {planned}.",
        )
        if self.model.is_moe and moe.group_size:
            tokens = train.batch_size // train.grad_accum_steps * train.seq_len
            require(
                train.seq_len % moe.group_size == 0
                or (moe.group_size % train.seq_len == 0 and tokens % moe.group_size == 0),
                f"config.model.moe.group_size = {moe.group_size} must divide config.train.seq_len "
                f"= {train.seq_len}, or be a multiple of it that divides the {tokens} tokens of a "
                "batch (of a micro-batch, with grad_accum_steps).",
            )

    def _check_few_bits(self) -> None:
        method, model = self.model.lora.quantize, self.model
        require(
            method == "none" or bool(self.train.init_from),
            f"config.model.lora.quantize = {method!r} needs trained weights; set "
            "config.train.init_from.",
        )
        require(
            method == "none" or model.remat != "none",
            "config.model.remat = 'none' keeps the numbers of all layers for the backward pass, "
            f"so config.model.lora.quantize = {method!r} would save nothing; take 'dots' or "
            "'full'.",
        )

    def _check_dpo(self) -> None:
        dpo, train, moe = self.objective.dpo, self.train, self.model.moe
        require(
            not self.model.is_moe or moe.dispatch == "dropless",
            f"config.model.moe.dispatch = {moe.dispatch!r} routes a token by what shares its "
            "batch, so policy and reference would differ from the start; take 'dropless'.",
        )
        require(
            dpo.reference == "stored" or self.model.lora.rank > 0,
            "config.objective.dpo.reference = 'adapter_off' needs adapters; set "
            "config.model.lora.rank, or take 'stored'.",
        )
        online = dpo.online
        num_rows = online.share * train.batch_size
        require(
            abs(num_rows - round(num_rows)) < 1e-6,
            f"config.objective.dpo.online.share = {online.share} of config.train.batch_size = "
            f"{train.batch_size} is {num_rows:g} rows; take a multiple of 1/{train.batch_size}.",
        )
        require(
            not online.share or 2 * online.max_new_tokens <= train.seq_len,
            f"config.objective.dpo.online.max_new_tokens = {online.max_new_tokens}: two answers "
            f"leave no room for their prompts in config.train.seq_len = {train.seq_len}.",
        )
        require(
            not online.from_average or train.ema_decay > 0,
            "config.objective.dpo.online.from_average = True needs a moving average; set "
            "config.train.ema_decay.",
        )

    def _check_grpo(self) -> None:
        grpo, train, model = self.objective.grpo, self.train, self.model
        require(
            train.batch_size % grpo.num_generations == 0,
            f"config.train.batch_size = {train.batch_size} is no multiple of "
            f"config.objective.grpo.num_generations = {grpo.num_generations}: a batch holds whole "
            f"groups. Use a num_generations from {divisors(train.batch_size)}.",
        )
        require(
            grpo.max_new_tokens <= train.seq_len,
            f"config.objective.grpo.max_new_tokens = {grpo.max_new_tokens} leaves no room for a "
            f"prompt in config.train.seq_len = {train.seq_len}.",
        )
        require(
            not model.is_moe or model.moe.dispatch == "dropless",
            f"config.model.moe.dispatch = {model.moe.dispatch!r} routes a token by what shares "
            "its batch, so the trained policy would not be the one that wrote; take 'dropless'.",
        )
        for name in ("attention_dropout", "hidden_dropout"):
            value = getattr(model, name)
            require(
                value == 0,
                f"config.model.{name} = {value}: with dropout the trained policy is not the one "
                "that wrote the completions; set it to 0.",
            )
