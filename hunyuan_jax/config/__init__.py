"""Run configuration: frozen dataclasses that check themselves when they are built.

A recipe in `configs/` builds a `Config` and returns `to_config_dict(config)`; `from_config_dict`
turns the ConfigDict, with the command line's overrides, back into the frozen form.  From there on
each function receives the smallest piece it needs.  Imports no jax, so that a misspelled key is
answered before anything slow is loaded.
"""

from hunyuan_jax.config.data import DataConfig, PhaseConfig, SourceConfig, quarter_long
from hunyuan_jax.config.distill import DistillConfig
from hunyuan_jax.config.effect import without_effect
from hunyuan_jax.config.mesh import MeshConfig
from hunyuan_jax.config.model import (
    LORA_TARGETS,
    ContextAttention,
    Dispatch,
    Dtype,
    LatentConfig,
    LoraConfig,
    ModelConfig,
    MoeConfig,
    Remat,
    RopeType,
    SparkConfig,
)
from hunyuan_jax.config.optim import OptimizerConfig, ScheduleConfig, ScheduleName, StateDtype
from hunyuan_jax.config.parse import (
    defaults,
    field_names,
    flat_fields,
    from_config_dict,
    from_dict,
    to_config_dict,
    to_dict,
    unknown_key_message,
    weights_recipe,
)
from hunyuan_jax.config.post import (
    DpoConfig,
    GrpoConfig,
    ObjectiveConfig,
    ObjectiveName,
    OnlineConfig,
    RolloutConfig,
)
from hunyuan_jax.config.run import Config
from hunyuan_jax.config.train import CheckpointConfig, TrainConfig

__all__ = [
    "LORA_TARGETS",
    "CheckpointConfig",
    "Config",
    "ContextAttention",
    "DataConfig",
    "Dispatch",
    "DistillConfig",
    "DpoConfig",
    "Dtype",
    "GrpoConfig",
    "LatentConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "MoeConfig",
    "ObjectiveConfig",
    "ObjectiveName",
    "OnlineConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "Remat",
    "RolloutConfig",
    "RopeType",
    "ScheduleConfig",
    "ScheduleName",
    "SourceConfig",
    "SparkConfig",
    "StateDtype",
    "TrainConfig",
    "defaults",
    "field_names",
    "flat_fields",
    "from_config_dict",
    "from_dict",
    "quarter_long",
    "to_config_dict",
    "to_dict",
    "unknown_key_message",
    "weights_recipe",
    "without_effect",
]
