"""Learning rate over a run."""

import jax.numpy as jnp
import optax

from hunyuan_jax.config import ScheduleConfig


def build_schedule(cfg: ScheduleConfig, num_steps: int) -> optax.Schedule:
    """Returns the jittable learning-rate schedule of a run.

    It maps a step (int or integer scalar array, from 0) to a learning rate (float32 scalar).

    "three_phase" (docs/model.md, Optimizer; the paper leaves the shapes open) is a linear warm-up,
    a cosine to `decay_ratio` of the peak, and a linear ramp to `anneal_ratio` of the peak over the
    last `anneal_fraction` of the run (at least one step).  Step t has the value of t + 1 steps of
    progress.  So no step has a learning rate of 0, step `warmup_steps - 1` is at the peak
    (`warmup_steps` 0 and 1 are the same) and the last step is at the final value.  If the run is
    too short for all three, the cosine is left out first: the ramp then starts at the peak.

    "cosine_with_min_lr" is the official fine-tuning schedule (docs/model.md, Optimizer): a linear
    warm-up from 0, so step 0 changes nothing, then a cosine from the peak to the absolute
    `min_lr`, which it would reach at step `num_steps`.

    A run is `cfg.num_steps` long, or `num_steps` if that is 0.  Steps after it keep the final
    value of the last phase.
    """
    num_steps = cfg.num_steps or num_steps
    # float32 represents every step below 2**24 exactly.  Integer steps would need promotions that
    # strict mode refuses.
    if cfg.name == "cosine_with_min_lr":
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=cfg.peak_lr,
            warmup_steps=cfg.warmup_steps,
            # A run that is all warm-up still needs a cosine to join.
            decay_steps=max(num_steps, cfg.warmup_steps + 1),
            end_value=cfg.min_lr,
        )
        return lambda step: schedule(jnp.asarray(step, jnp.float32))
    schedule = _three_phase(cfg, num_steps)
    return lambda step: schedule(jnp.asarray(step, jnp.float32) + 1.0)


def _three_phase(cfg: ScheduleConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of progress, 1 ... num_steps.

    Progress is the number of steps done, including the current one.
    """
    num_anneal_steps = (
        max(1, round(cfg.anneal_fraction * num_steps)) if cfg.anneal_fraction > 0 else 0
    )
    warmup_end = max(cfg.warmup_steps, 1)
    decay_end = max(num_steps - num_anneal_steps, warmup_end)
    # Empty phases are left out: optax refuses an empty cosine and turns an empty ramp into a
    # constant.
    phases, starts = [optax.linear_schedule(0.0, cfg.peak_lr, warmup_end)], []
    anneal_from = cfg.peak_lr
    if decay_end > warmup_end:
        phases.append(
            optax.cosine_decay_schedule(cfg.peak_lr, decay_end - warmup_end, alpha=cfg.decay_ratio)
        )
        starts.append(warmup_end)
        anneal_from = cfg.decay_ratio * cfg.peak_lr
    if num_steps > decay_end:
        phases.append(
            optax.linear_schedule(
                anneal_from, cfg.anneal_ratio * cfg.peak_lr, num_steps - decay_end
            )
        )
        starts.append(decay_end)
    return optax.join_schedules(phases, starts)
