"""Learning rate over the run, and the square-root law that relates the batch size of a parameter
to its best learning rate.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import optax

from hunyuan_jax.config import ScheduleConfig


def build_schedule(cfg: ScheduleConfig, num_steps: int) -> optax.Schedule:
    """The jittable schedule of a run: step (int, or integer scalar array, from 0) -> learning rate
    (float32 scalar).

    "three_phase" (reference/papers.md 1.7; the paper leaves the shapes open): linear warm-up,
    cosine to `decay_ratio` of the peak, then a linear ramp over the last `anneal_fraction` of the
    run (at least one step) to `anneal_ratio` of the peak.  Step t has the value of t + 1 steps of
    progress: no step is wasted on a learning rate of 0, step `warmup_steps - 1` is at the peak
    (`warmup_steps` 0 and 1 are the same) and the last step is at the final value.  In a run too
    short for all three, the warm-up comes first and the ramp next: the ramp then starts at the
    peak.

    "cosine_with_min_lr": the official fine-tuning schedule (specification section 8): linear
    warm-up from 0, so that step 0 changes nothing, then a cosine from the peak to the absolute
    `min_lr`, which would be reached at step `num_steps`.

    Steps after the run keep the value at which the last phase ends.
    """
    # float32 counts every step below 2**24 exactly; integer steps would need promotions that
    # strict mode refuses.
    if cfg.name == "cosine_with_min_lr":
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=cfg.peak_lr,
            warmup_steps=cfg.warmup_steps,
            decay_steps=max(
                num_steps, cfg.warmup_steps + 1
            ),  # a run that is all warm-up still needs a cosine to join
            end_value=cfg.min_lr,
        )
        return lambda step: schedule(jnp.asarray(step, jnp.float32))
    schedule = _three_phase(cfg, num_steps)
    return lambda step: schedule(jnp.asarray(step, jnp.float32) + 1.0)


def _three_phase(cfg: ScheduleConfig, num_steps: int) -> optax.Schedule:
    """Learning rate as a function of progress, the number of steps done once the current one is: 1
    ... num_steps.
    """
    num_anneal_steps = (
        max(1, round(cfg.anneal_fraction * num_steps)) if cfg.anneal_fraction > 0 else 0
    )
    warmup_end = max(cfg.warmup_steps, 1)
    decay_end = max(num_steps - num_anneal_steps, warmup_end)
    # Only phases that have a length: optax refuses an empty cosine and turns an empty ramp into a
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


def optimal_lr(batch: float, noise_batch: float, max_lr: float) -> float:
    """Best learning rate of Adam at a batch size, Hunyuan-Large (arXiv 2411.02265) equation (1),
    from arXiv 2405.14578.

    It peaks with `max_lr` at `batch == noise_batch` and falls by the square root on either side.
    Both batches are positive and in the same unit (tokens).
    """
    return 2.0 * max_lr / (math.sqrt(noise_batch / batch) + math.sqrt(batch / noise_batch))


def expert_lr_ratio(batch: float, noise_batch: float, num_experts: int, top_k: int = 1) -> float:
    """What the law gives for `OptimizerConfig.expert_lr_ratio`: best learning rate of a
    specialised expert over that of the rest.

    With balanced load an expert sees `top_k / num_experts` of the `batch` tokens that the shared
    expert sees.  The result lies between 1/sqrt(n) (small batches: scale experts down) and sqrt(n)
    (large ones: scale them up), where n = num_experts / top_k.

    The paper is ambiguous here (reference/papers.md 1.5): it prints 0.31 for the inverse of this
    ratio, shared over expert, which asks for a larger learning rate on experts, yet says that it
    scales experts down.  Its batch sizes are not given, so the default config does what the text
    says was done; `noise_batch_for_ratio` shows what either reading implies.
    """
    return optimal_lr(batch * top_k / num_experts, noise_batch, 1.0) / optimal_lr(
        batch, noise_batch, 1.0
    )


class NoiseBatches(NamedTuple):
    """The noise batch size, in the unit of the batch, under each reading of a ratio of learning
    rates.
    """

    expert_over_shared: float  # expert = ratio * shared: what the paper says it did
    shared_over_expert: (
        float  # shared = ratio * expert: the order in which the paper prints its ratio
    )


def noise_batch_for_ratio(
    ratio: float, batch: float, num_experts: int, top_k: int = 1
) -> NoiseBatches:
    """Inverse of `expert_lr_ratio`: the noise batch at which the law gives `ratio`, for both
    readings of the paper.

    Raises:
      ValueError: no noise batch gives `ratio`; it must lie strictly between 1/sqrt(n) and sqrt(n),
        n = num_experts / top_k.
    """
    share = num_experts / top_k
    root = math.sqrt(share)
    if not 1 / root < ratio < root:
        raise ValueError(
            f"ratio = {ratio} cannot be reached with {num_experts} experts and top_k = {top_k}; "
            f"the law gives ratios strictly between {1 / root:.4g} and {root:.4g}."
        )

    def solve(expert_over_shared: float) -> float:
        # expert_lr_ratio = root * (1 + x) / (share + x) for x = batch / noise_batch, solved for x.
        return batch * (root - expert_over_shared) / (share * expert_over_shared - root)

    return NoiseBatches(expert_over_shared=solve(ratio), shared_over_expert=solve(1 / ratio))
