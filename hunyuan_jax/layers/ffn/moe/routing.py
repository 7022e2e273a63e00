"""Routing as pure functions: router logits -> Assignment, auxiliary losses and health metrics.

Every function works on one routing group of T tokens.  The caller vmaps over groups, so nothing
here depends on the mesh.  Letters: T tokens of a group, k choices per token, E experts, C capacity
per (group, expert).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hunyuan_jax.config import MoeConfig
from hunyuan_jax.errors import ConfigError

# Metrics that are means over the routing groups of a layer; those of `health` are sums.
LOSSES = ("aux_loss", "z_loss")

# float32 epsilon: the official clamp of the top-k normaliser.
_EPSILON = 1.19e-7
# Added to a sum of sigmoids, as Hy3's code does.
_TINY = 1e-20


class Assignment(NamedTuple):
    """The expert and buffer row of each choice; dispatch and combine both use it.

    expert_Tk: int32, the expert that serves the choice (after recycling).
    slot_Tk: int32, its row in that expert's buffer, unique per expert and packed from 0; 0 if the
      choice is not kept.
    weight_Tk: float32 combine weight, 0 if the choice is not kept.
    is_kept_Tk: bool, whether an expert serves the choice.
    is_recycled_Tk: bool, whether it was moved from a full expert to a free slot.
    count_E: int32, rows in use per expert.
    """

    expert_Tk: jax.Array
    slot_Tk: jax.Array
    weight_Tk: jax.Array
    is_kept_Tk: jax.Array
    is_recycled_Tk: jax.Array
    count_E: jax.Array


class Choice(NamedTuple):
    """The router's choice before any capacity.

    score_TE: float32, what the weights are made of: probabilities, or a sigmoid for each expert.
    probs_TE: float32, the scores over their sum.
    expert_Tk: int32.
    """

    score_TE: jax.Array
    probs_TE: jax.Array
    expert_Tk: jax.Array


def capacity(cfg: MoeConfig, group_size: int) -> int:
    """Returns C, the number of rows per (group, expert).

    It is max(min_capacity, ceil(capacity_factor * k * group_size / E)), but at most group_size.
    Dropless has room for every token: C is group_size.
    """
    if cfg.dispatch == "dropless":
        return group_size
    # round() first: 1.12 * 50 / 4 is 14.000000000000002 in binary and must give 14.
    wanted = math.ceil(round(cfg.capacity_factor * cfg.top_k * group_size / cfg.num_experts, 6))
    return min(max(cfg.min_capacity, wanted), group_size)


def group_size(cfg: MoeConfig, batch_size: int, seq_len: int) -> int:
    """Returns the number of tokens per routing group for a [batch_size, seq_len] batch.

    A group is a run of consecutive tokens in row order.

    Raises:
      ConfigError: group_size does not divide the tokens.
    """
    size = cfg.group_size or seq_len
    if seq_len % size and (size % seq_len or batch_size * seq_len % size):
        raise ConfigError(
            f"config.model.moe.group_size = {size} fits neither in a sequence of {seq_len} tokens "
            f"nor in whole sequences of the {batch_size} x {seq_len} batch; use a divisor of "
            f"{seq_len}, or a multiple of it that divides {batch_size * seq_len}."
        )
    return size


def choose(logits_TE: jax.Array, cfg: MoeConfig, bias_E: jax.Array | None = None) -> Choice:
    """Returns the top-k experts of each token from logits [T, E]; ties take the lowest index.

    `bias_E` is added to the scores for this choice only.
    """
    logits_TE = logits_TE.astype(jnp.float32)
    if cfg.scoring == "sigmoid":
        score_TE = jax.nn.sigmoid(logits_TE)
        probs_TE = score_TE / (score_TE.sum(-1, keepdims=True) + _TINY)
    else:
        score_TE = probs_TE = jax.nn.softmax(logits_TE, axis=-1)
    biased_TE = score_TE if bias_E is None else jax.lax.stop_gradient(score_TE + bias_E)
    return Choice(score_TE, probs_TE, jax.lax.top_k(biased_TE, cfg.top_k)[1])


def moved_bias(bias: jax.Array, chosen: jax.Array, cfg: MoeConfig) -> jax.Array:
    """Returns the selection biases [..., E] after a step, float32.

    The bias of an expert that was chosen less than the mean goes up by `bias_rate`, that of one
    that was chosen more goes down (arXiv 2408.15664, algorithm 1).

    Args:
      bias: float32 [..., E].
      chosen: float32 [..., E], choices of each expert before any capacity, over the whole batch.
      cfg: config.model.moe.
    """
    bias = bias + cfg.bias_rate * jnp.sign(chosen.mean(-1, keepdims=True) - chosen)
    return jnp.clip(bias, -cfg.bias_limit, cfg.bias_limit) if cfg.bias_limit else bias


def assign(
    choice: Choice, is_valid_T: jax.Array, cfg: MoeConfig, key: jax.Array | None
) -> Assignment:
    """Applies the capacity to one group's choices.

    Slots are given first come, first served in choice-major order: all first choices in token
    order, then all second choices, and so on.  Choices that do not fit are dropped
    (`dispatch == "drop"`) or moved to free slots (`"recycle"`; docs/model.md, Capacity).  The new
    slot is drawn uniformly from the free slots, without replacement.

    The combine weight is the score of the expert.  With `norm_topk_prob` it is divided by the sum
    over the k chosen experts.  A recycled choice has the token's score of its new expert, with the
    same divisor.  All weights are multiplied by `routed_scale`.

    Padding (`is_valid_T` false) takes no slot and gets weight 0.  Dropless has room for all and
    serves padding like any token, as the official code does.

    Args:
      choice: from `choose`, of one group.
      is_valid_T: bool, False for padding.
      cfg: config.model.moe.
      key: typed PRNG key of this (seed, step, layer, global group); only "recycle" reads it.
    """
    num_experts = cfg.num_experts
    T, k = choice.expert_Tk.shape
    num_slots = capacity(cfg, T)
    expert_n = choice.expert_Tk.T.reshape(-1)  # n = choice-major (choice, token)
    is_valid_n = jnp.tile(is_valid_T | (cfg.dispatch == "dropless"), k)

    wish_nE = _one_hot(expert_n, is_valid_n, num_experts)
    slot_n = _take_expert(jnp.cumsum(wish_nE, axis=0) - 1, expert_n)
    is_kept_n = is_valid_n & (slot_n < num_slots)
    count_E = jnp.minimum(wish_nE.sum(0), num_slots)
    is_recycled_n = jnp.zeros_like(is_kept_n)

    if cfg.dispatch == "recycle":
        is_over_n = is_valid_n & ~is_kept_n
        if k == 1:
            new_n, is_recycled_n = _recycle_once(is_over_n, num_slots - count_E, num_slots, key)
        else:
            new_n, is_recycled_n = _recycle_distinct(
                expert_n, is_kept_n, is_over_n, num_slots - count_E, num_slots, T, key
            )
        expert_n = jnp.where(is_recycled_n, new_n, expert_n)
        # Recycled rows follow the kept ones, so the rows in use are the first count_E of a buffer.
        moved_nE = _one_hot(expert_n, is_recycled_n, num_experts)
        slot_n = jnp.where(
            is_recycled_n,
            _take_expert(count_E + jnp.cumsum(moved_nE, axis=0) - 1, expert_n),
            slot_n,
        )
        count_E = count_E + moved_nE.sum(0)
        is_kept_n = is_kept_n | is_recycled_n

    expert_Tk, slot_Tk, is_kept_Tk, is_recycled_Tk = (
        a.reshape(k, T).T
        for a in (expert_n, jnp.where(is_kept_n, slot_n, 0), is_kept_n, is_recycled_n)
    )
    weight_Tk = _take_expert(choice.score_TE[:, None], expert_Tk)
    if cfg.norm_topk_prob:
        chosen_Tk = _take_expert(choice.score_TE[:, None], choice.expert_Tk)
        sum_T1 = chosen_Tk.sum(-1, keepdims=True)
        is_sigmoid = cfg.scoring == "sigmoid"
        weight_Tk = weight_Tk / (sum_T1 + _TINY if is_sigmoid else jnp.maximum(sum_T1, _EPSILON))
    if cfg.routed_scale != 1:
        weight_Tk = weight_Tk * cfg.routed_scale
    return Assignment(
        expert_Tk,
        slot_Tk,
        jnp.where(is_kept_Tk, weight_Tk, 0.0),
        is_kept_Tk,
        is_recycled_Tk,
        count_E,
    )


def balance_loss(choice: Choice, is_valid_T: jax.Array) -> jax.Array:
    """Returns E * sum_e f_e * P_e of one group, float32 scalar, for the choices before capacity.

    f_e is the share of valid tokens that chose e (the sum is k) and P_e their mean probability.
    This equals both official formulas (docs/model.md, Mixture of experts).  Perfect balance gives
    1.0 for k = 1.
    """
    num_experts = choice.probs_TE.shape[-1]
    chosen_TE = jax.nn.one_hot(choice.expert_Tk, num_experts, dtype=jnp.float32).sum(-2)
    return num_experts * jnp.sum(
        _masked_mean(chosen_TE, is_valid_T) * _masked_mean(choice.probs_TE, is_valid_T)
    )


def z_loss(logits_TE: jax.Array, is_valid_T: jax.Array) -> jax.Array:
    """Returns the router's mean squared log-partition over valid tokens, float32 scalar.

    ST-MoE, arXiv 2202.08906, eq. 5.
    """
    return _masked_mean(
        jax.nn.logsumexp(logits_TE.astype(jnp.float32), axis=-1)[:, None] ** 2, is_valid_T
    )[0]


def health(choice: Choice, assignment: Assignment, is_valid_T: jax.Array) -> dict[str, jax.Array]:
    """Returns one group's metrics, float32 sums over its valid tokens.

    The sums of several groups, micro-batches or hosts add up to those of the batch, whatever their
    padding.  Exact up to 2^24 choices.

    wished_E: choices of each expert, before any capacity.
    served_E: choices that each expert serves.
    recycled: choices that were moved.
    entropy: of the router, in nats.
    tokens: number of valid tokens.
    """
    probs_TE, num_experts = choice.probs_TE, choice.probs_TE.shape[1]
    is_valid_Tk = jnp.broadcast_to(is_valid_T[:, None], choice.expert_Tk.shape)
    entropy_T = -jnp.sum(probs_TE * jnp.log(jnp.maximum(probs_TE, 1e-30)), axis=-1)
    sums = {
        "wished_E": _one_hot(choice.expert_Tk, is_valid_Tk, num_experts).sum((0, 1)),
        "served_E": _one_hot(
            assignment.expert_Tk, is_valid_Tk & assignment.is_kept_Tk, num_experts
        ).sum((0, 1)),
        "recycled": assignment.is_recycled_Tk.sum(),
        "entropy": jnp.where(is_valid_T, entropy_T, 0.0).sum(),
        "tokens": is_valid_T.sum(),
    }
    return {name: total.astype(jnp.float32) for name, total in sums.items()}


def _one_hot(expert_n: jax.Array, is_counted_n: jax.Array, num_experts: int) -> jax.Array:
    """Returns int32 [..., E]: 1 at the expert of each counted choice."""
    return jax.nn.one_hot(
        jnp.where(is_counted_n, expert_n, num_experts), num_experts, dtype=jnp.int32
    )


def _take_expert(values_xE: jax.Array, expert_x: jax.Array) -> jax.Array:
    """Returns values[..., expert] of each of the experts [...]; leading dims broadcast.

    Selects and sums: a TPU looks numbers up one at a time, 23 times slower for 16 experts.
    """
    is_chosen_xE = expert_x[..., None] == jnp.arange(values_xE.shape[-1])
    return jnp.where(is_chosen_xE, values_xE, 0).sum(-1)


def _masked_mean(x_TX: jax.Array, is_valid_T: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(is_valid_T[:, None], x_TX, 0.0), axis=0) / jnp.maximum(
        is_valid_T.sum(), 1
    ).astype(jnp.float32)


def _recycle_once(
    is_over_n: jax.Array, free_E: jax.Array, num_slots: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gives the i-th overflow the i-th of the shuffled free slots.

    Returns:
      (expert int32 [n], whether the choice got a slot bool [n]).
    """
    # S = all (expert, slot) pairs.
    is_free_S = (jnp.arange(num_slots)[None, :] < free_E[:, None]).reshape(-1)
    order_S = jnp.argsort(jnp.where(is_free_S, jax.random.uniform(key, is_free_S.shape), 2.0))
    shuffled_expert_S = order_S // num_slots
    rank_n = jnp.cumsum(is_over_n) - 1
    has_slot_n = is_over_n & (rank_n < free_E.sum())
    return shuffled_expert_S[jnp.where(has_slot_n, rank_n, 0)].astype(jnp.int32), has_slot_n


def _recycle_distinct(
    expert_n: jax.Array,
    is_kept_n: jax.Array,
    is_over_n: jax.Array,
    free_E: jax.Array,
    num_slots: int,
    num_tokens: int,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As `_recycle_once`, but a token gets an expert twice only if no other expert is free.

    Draws in rounds.  Each round shuffles the free slots and accepts the draws that do not repeat
    an expert of their token.  It also settles the first remaining overflow with a draw among the
    experts that its token does not have.  So there are at most as many rounds as overflows, and
    nearly always three or four.
    """
    num_experts = free_E.shape[0]
    token_n = jnp.arange(expert_n.shape[0]) % num_tokens
    has_TE = jnp.zeros((num_tokens, num_experts), bool).at[token_n, expert_n].max(is_kept_n)

    def unsettled(state):
        _, _, is_left_n, free_E, _, _ = state
        return is_left_n.any() & (free_E.sum() > 0)

    def one_round(state):
        new_n, is_recycled_n, is_left_n, free_E, has_TE, key = state
        key, shuffle_key, first_key = jax.random.split(key, 3)
        # The first remaining overflow draws among the experts it lacks, or else any free one.
        first = jnp.argmax(is_left_n)
        lacks_E = (free_E > 0) & ~has_TE[token_n[first]]
        allowed_E = jnp.where(lacks_E.any(), lacks_E, free_E > 0)
        first_expert = jax.random.categorical(
            first_key, jnp.where(allowed_E, jnp.log(free_E.astype(jnp.float32)), -jnp.inf)
        )
        new_n, is_recycled_n = (
            new_n.at[first].set(first_expert.astype(jnp.int32)),
            is_recycled_n.at[first].set(True),
        )
        is_left_n, free_E = is_left_n.at[first].set(False), free_E.at[first_expert].add(-1)
        has_TE = has_TE.at[token_n[first], first_expert].set(True)
        # The other overflows draw together.
        draw_n, got_n = _recycle_once(is_left_n, free_E, num_slots, shuffle_key)
        draw_nE = _one_hot(draw_n, got_n, num_experts)
        draw_kTE = draw_nE.reshape(-1, num_tokens, num_experts)
        nth_draw_nE = jnp.cumsum(draw_kTE, axis=0).reshape(draw_nE.shape)
        is_first_draw_n = _take_expert(nth_draw_nE, draw_n) == 1
        accept_n = got_n & is_first_draw_n & ~has_TE[token_n, draw_n]
        free_E = free_E - _one_hot(draw_n, accept_n, num_experts).sum(0)
        has_TE = has_TE.at[token_n, draw_n].max(accept_n)
        return (
            jnp.where(accept_n, draw_n, new_n),
            is_recycled_n | accept_n,
            is_left_n & ~accept_n,
            free_E,
            has_TE,
            key,
        )

    state = (expert_n.astype(jnp.int32), jnp.zeros_like(is_over_n), is_over_n, free_E, has_TE, key)
    new_n, is_recycled_n, *_ = jax.lax.while_loop(unsettled, one_round, state)
    return new_n, is_recycled_n
