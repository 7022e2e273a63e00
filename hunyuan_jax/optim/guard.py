"""Skips updates with a non-finite loss or gradient, or with a gradient spike.

A skipped step consumes its batch and its random numbers.  It changes nothing else: parameters,
moments and the count that the schedule follows stay bit-identical.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hunyuan_jax.config import OptimizerConfig

_WINDOW = 100  # accepted steps that the running mean averages over


class Guard(NamedTuple):
    """State of the guard: scalars, part of the train state.

    mean_norm: float32, running mean of the accepted gradient norms; arithmetic over the first 100
      steps, then exponential.
    num_accepted: int32, accepted steps so far.
    num_skipped: int32, skipped steps so far.
    num_in_row: int32, steps skipped since the last accepted one.
    """

    mean_norm: jax.Array
    num_accepted: jax.Array
    num_skipped: jax.Array
    num_in_row: jax.Array


def new_guard() -> Guard:
    """Returns the guard of a run before its first step."""
    return Guard(jnp.zeros((), jnp.float32), *(jnp.zeros((), jnp.int32) for _ in range(3)))


def accepts(
    cfg: OptimizerConfig, guard: Guard, loss: jax.Array, grad_norm: jax.Array
) -> jax.Array:
    """Returns whether a step may change the parameters, bool [].

    Args:
      cfg: config.optimizer.
      guard: before the step.
      loss: float32 scalar.
      grad_norm: float32 scalar, before clipping.
    """
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if not cfg.spike_factor:
        return is_finite
    is_spike = (guard.num_accepted >= cfg.spike_after) & (
        grad_norm > cfg.spike_factor * guard.mean_norm
    )
    return is_finite & ~is_spike


def after_step(guard: Guard, grad_norm: jax.Array, is_accepted: jax.Array) -> Guard:
    """Returns the guard after one more step."""
    accepted = is_accepted.astype(jnp.int32)
    num_averaged = jnp.minimum(guard.num_accepted + 1, _WINDOW).astype(jnp.float32)
    mean_norm = guard.mean_norm + (grad_norm - guard.mean_norm) / num_averaged
    return Guard(
        jnp.where(is_accepted, mean_norm, guard.mean_norm),
        guard.num_accepted + accepted,
        guard.num_skipped + 1 - accepted,
        jnp.where(is_accepted, 0, guard.num_in_row + 1),
    )
