"""Parameter groups: the learning-rate ratio and weight decay of each parameter, by its role.

Every role belongs to one group.  A parameter without a group and a group without a parameter are
errors.
"""

import dataclasses
from typing import Any

import jax

from hunyuan_jax.config import OptimizerConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.params.roles import Role
from hunyuan_jax.params.tree import path_of

_NUM_PATHS_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    """Settings of the parameters that have one of `roles`."""

    name: str
    roles: tuple[Role, ...]
    lr_ratio: float  # multiplies the learning rate of the schedule
    weight_decay: float


def default_groups(
    cfg: OptimizerConfig, *, is_moe: bool, is_lora: bool = False
) -> tuple[ParamGroup, ...]:
    """Returns the groups of a model.  With LoRA the adapters are the only group.

    A dense model has no groups for experts and router.

    * experts: the routed (specialised) experts, at `expert_lr_ratio` of the learning rate
      (docs/model.md, Optimizer).  The shared expert sees every token, as the other
      parameters do, and has the full rate; the paper names experts only.
    * norms_and_biases: no decay.  They are not matrices; a norm scale would be pulled away from 1.
    * embedding: no decay.  A lookup gives a row a gradient only when its token occurs, so decay
      would shrink rare tokens between their occurrences.  One rule for tied and untied: a tied
      table is not decayed either, though its use as the head reaches every row.
    * router and matrices: decayed.  An untied lm_head counts as a matrix: all its rows have a
      gradient at each step, and decay keeps the logits from growing.
    """
    if is_lora:
        return (ParamGroup("adapters", (Role.ADAPTER,), 1.0, cfg.weight_decay),)
    mixture = (
        ParamGroup("experts", (Role.EXPERT,), cfg.expert_lr_ratio, cfg.weight_decay),
        ParamGroup("router", (Role.ROUTER,), 1.0, cfg.weight_decay),
    )
    everywhere = (
        ParamGroup("norms_and_biases", (Role.NORM, Role.BIAS), 1.0, 0.0),
        ParamGroup("embedding", (Role.EMBEDDING,), 1.0, 0.0),
        ParamGroup("matrices", (Role.MATRIX,), 1.0, cfg.weight_decay),
    )
    return (*mixture, *everywhere) if is_moe else everywhere


def assign_groups(specs: Any, groups: tuple[ParamGroup, ...]) -> Any:
    """Returns the tree of `specs` (nested dict of `ParamSpec`s) with group names as leaves.

    Raises:
      ConfigError: a parameter whose role no group has, or a group without a parameter.
    """
    roles = {path_of(path): spec.role for path, spec in jax.tree.leaves_with_path(specs)}
    for group in groups:
        if not set(group.roles) & set(roles.values()):
            raise ConfigError(
                f"The optimizer group '{group.name}' (role {' or '.join(group.roles)}) has none "
                f"of the {len(roles)} parameters, for example "
                f"{', '.join(list(roles)[:_NUM_PATHS_SHOWN])}. Correct its roles or remove it."
            )
    by_role = {role: group.name for group in groups for role in group.roles}
    for path, role in roles.items():
        if role not in by_role:
            known = ", ".join(f"{group.name} ({' and '.join(group.roles)})" for group in groups)
            raise ConfigError(
                f"The parameter {path} has the role {role}, which is in no optimizer group; the "
                f"groups are {known}. "
                "Add the role to one of them, or add a group, in optim/groups.py."
            )
    return jax.tree.map(lambda spec: by_role[spec.role], specs)
