"""The objective that a config names."""

from hunyuan_jax.config import Config
from hunyuan_jax.train.objective import Objective


def build_objective(config: Config) -> Objective:
    """Returns the objective that config.objective names."""
    match config.objective.name:
        case "pretrain":
            from hunyuan_jax.train.pretrain import Pretrain

            return Pretrain(config)
        case "sft":
            from hunyuan_jax.post.sft import Sft

            return Sft(config)
        case "dpo":
            from hunyuan_jax.post.dpo import Dpo

            return Dpo(config)
        case "grpo":
            from hunyuan_jax.post.grpo import Grpo

            return Grpo(config)
        case "distill":
            from hunyuan_jax.post.distill import Distill

            return Distill(config)
    raise AssertionError(config.objective.name)
