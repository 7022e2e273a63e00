"""Parameter groups: which learning-rate ratio and weight decay each parameter gets, decided by its
path alone.

Paths, not ranks: the layers are stacked, so a norm scale is two-dimensional.  Every parameter
belongs to the first group whose pattern matches it; a parameter without a group, or a pattern
without a parameter, is an error and never a silent default.
"""

import dataclasses
import re
from typing import Any

import jax

from hunyuan_jax.config import OptimizerConfig
from hunyuan_jax.errors import ConfigError

_NUM_PATHS_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    """Settings of the parameters whose whole '/'-joined path matches `pattern` (re.fullmatch)."""

    name: str
    pattern: str
    lr_ratio: float  # multiplies the learning rate of the schedule
    weight_decay: float


def default_groups(
    cfg: OptimizerConfig, *, is_moe: bool, is_lora: bool = False
) -> tuple[ParamGroup, ...]:
    """The groups of a model, in order; the first match wins.  With LoRA there is one, of the
    adapters, which are matrices.

    Groups that only a mixture of experts has are left out for a dense model, so that a pattern
    without a parameter is always a mistake.

    * experts: the routed (specialised) experts, at `expert_lr_ratio` of the learning rate
      (reference/papers.md 1.5).  The shared expert and the rest, which see every token, have the
      full one; the paper names experts only.
    * norms_and_biases: no decay.  They are not matrices; a norm scale would be pulled away from 1.
    * embedding: no decay.  A lookup gives a row a gradient only when its token occurs, so decay
      would shrink rare tokens between their occurrences.  One rule for tied and untied: a tied
      table is not decayed either, though its use as the head reaches every row.
    * router and matrices: decayed.  An untied lm_head counts as a matrix: all its rows have a
      gradient at each step, and decay keeps the logits from growing.
    """
    if is_lora:
        return (ParamGroup("adapters", r"groups/.*/w\w+_lora_\w+", 1.0, cfg.weight_decay),)
    experts = ParamGroup(
        "experts", r"groups/.*/moe/experts/w_\w+", cfg.expert_lr_ratio, cfg.weight_decay
    )
    router = ParamGroup("router", r"groups/.*/moe/router_DE", 1.0, cfg.weight_decay)
    everywhere = (
        ParamGroup("norms_and_biases", r".*/(scale_D|[qk]_norm_H|b[qkvo]_\w+)", 1.0, 0.0),
        ParamGroup("embedding", r"embed/embedding_VD", 1.0, 0.0),
        # Not '.*': a parameter that is new to this table must be refused, not silently decayed.
        ParamGroup(
            "matrices", r"(groups/.*/(attn|mlp|moe/shared)|lm_head)/w\w+", 1.0, cfg.weight_decay
        ),
    )
    return (experts, router, *everywhere) if is_moe else everywhere


def assign_groups(params_or_shapes: Any, groups: tuple[ParamGroup, ...]) -> Any:
    """The tree of `params_or_shapes` (nested dict of arrays or shape structs) with the name of its
    group at each leaf.

    Raises:
      ConfigError: a parameter that no pattern matches, or a pattern that matches no parameter.
    """
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params_or_shapes)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths_and_leaves
    ]
    for group in groups:
        if not any(re.fullmatch(group.pattern, path) for path in paths):
            raise ConfigError(
                f"The pattern '{group.pattern}' of optimizer group '{group.name}' matches none of "
                f"the {len(paths)} parameters, "
                f"for example {', '.join(paths[:_NUM_PATHS_SHOWN])}. Correct the pattern or "
                "remove the group."
            )
    return jax.tree.unflatten(treedef, [_owner(path, groups) for path in paths])


def _owner(path: str, groups: tuple[ParamGroup, ...]) -> str:
    for group in groups:
        if re.fullmatch(group.pattern, path):
            return group.name
    raise ConfigError(
        f"The parameter {path} is in no optimizer group; the groups are "
        f"{', '.join(f'{group.name} ({group.pattern})' for group in groups)}. Give it to one of "
        "them, or add a group, in optim/groups.py."
    )
