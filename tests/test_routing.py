"""Laws of routing: conservation, capacity, priority, weights and the recycling draw, on random groups of tokens.

Letters: g groups (independent cases), T tokens, k choices, E experts.
"""

import dataclasses
import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax.config import ConfigError, MoeConfig
from hunyuan_jax.model import routing

NUM_GROUPS = 16
DISPATCHES = ("recycle", "drop", "dropless")
# (T, E, k, capacity_factor, min_capacity): every static shape is compiled once and met with many random groups.
SHAPES = (
    (16, 4, 1, 1.0, 1),
    (24, 8, 1, 0.5, 1),
    (15, 4, 1, 1.25, 1),
    (12, 8, 1, 0.1, 3),
    (9, 1, 1, 0.5, 1),
    (16, 4, 2, 1.0, 1),
    (12, 6, 3, 0.6, 1),
    (10, 4, 2, 1.5, 1),
    (5, 3, 3, 1.0, 2),
)


def moe_config(shape, dispatch):
    _, E, k, capacity_factor, min_capacity = shape
    return MoeConfig(num_experts=E, top_k=k, dispatch=dispatch, capacity_factor=capacity_factor, min_capacity=min_capacity)


@functools.partial(jax.jit, static_argnames="cfg")
def route(logits_gTE, is_valid_gT, keys_g, cfg):
    """The production functions, vmapped over groups as the layer does."""
    choice = jax.vmap(functools.partial(routing.choose, cfg=cfg))(logits_gTE)
    return choice, jax.vmap(lambda c, valid_T, key: routing.assign(c, valid_T, cfg, key))(choice, is_valid_gT, keys_g)


def random_groups(shape, seed, skew, padding, ties):
    """Logits that prefer the low experts the more the larger `skew`, and a mask with `padding` as the chance of a pad token."""
    T, E, *_ = shape
    rng = np.random.default_rng(seed)
    logits_gTE = rng.normal(size=(NUM_GROUPS, T, E)) - skew * np.arange(E)
    if ties:
        logits_gTE = np.round(logits_gTE)
    return logits_gTE.astype(np.float32), rng.random((NUM_GROUPS, T)) >= padding, jax.random.split(jax.random.key(seed), NUM_GROUPS)


groups = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(SHAPES),
        "seed": st.integers(0, 2**31 - 1),
        "skew": st.sampled_from([0.0, 0.3, 1.0, 8.0]),
        "padding": st.sampled_from([0.0, 0.25, 0.8, 1.0]),
        "ties": st.booleans(),
    }
)
random_cases = functools.partial(settings, deadline=None, derandomize=True)


def routed(case, dispatch):
    """(config, capacity, valid [g, T], choice, assignment) as numpy."""
    cfg = moe_config(case["shape"], dispatch)
    logits_gTE, is_valid_gT, keys_g = random_groups(**case)
    choice, assignment = route(logits_gTE, is_valid_gT, keys_g, cfg)
    num_slots = routing.capacity(cfg, case["shape"][0])
    return cfg, num_slots, is_valid_gT, jax.tree.map(np.asarray, choice), jax.tree.map(np.asarray, assignment)


def one_group(tree, g):
    return jax.tree.map(lambda a: a[g], tree)


# Conservation and capacity


@random_cases(max_examples=60)
@given(case=groups, dispatch=st.sampled_from(DISPATCHES))
def test_slots_are_packed_unique_and_within_capacity(case, dispatch):
    cfg, num_slots, _, _, assignments = routed(case, dispatch)
    for g in range(NUM_GROUPS):
        assignment = one_group(assignments, g)
        assert assignment.count_E.sum() == assignment.is_kept_Tk.sum()
        for e in range(cfg.num_experts):
            slots = np.sort(assignment.slot_Tk[(assignment.expert_Tk == e) & assignment.is_kept_Tk])
            np.testing.assert_array_equal(slots, np.arange(assignment.count_E[e]))
        if dispatch != "dropless":
            assert assignment.count_E.max() <= num_slots
        assert (assignment.slot_Tk[~assignment.is_kept_Tk] == 0).all()
        assert (assignment.is_kept_Tk | ~assignment.is_recycled_Tk).all()


@random_cases(max_examples=60)
@given(case=groups, dispatch=st.sampled_from(DISPATCHES))
def test_every_valid_choice_is_served_or_counted_as_dropped(case, dispatch):
    cfg, num_slots, is_valid_gT, choices, assignments = routed(case, dispatch)
    health_g = jax.tree.map(np.asarray, jax.vmap(routing.health)(choices, assignments, jnp.asarray(is_valid_gT)))
    for g in range(NUM_GROUPS):
        choice, assignment, valid_T = one_group(choices, g), one_group(assignments, g), is_valid_gT[g]
        num_choices = valid_T.sum() * cfg.top_k
        num_served = assignment.is_kept_Tk[valid_T].sum()
        demand_E = np.bincount(choice.expert_Tk[valid_T].reshape(-1), minlength=cfg.num_experts)
        expected = {
            "recycle": min(num_choices, cfg.num_experts * num_slots),
            "drop": np.minimum(demand_E, num_slots).sum(),
            "dropless": num_choices,
        }[dispatch]
        assert num_served == expected
        assert health_g["dropped"][g] == pytest.approx((num_choices - num_served) / max(num_choices, 1))
        num_over = np.maximum(demand_E - num_slots, 0).sum()
        num_recycled = num_over - (num_choices - expected) if dispatch == "recycle" else 0
        assert assignment.is_recycled_Tk.sum() == num_recycled
        assert health_g["recycled"][g] == pytest.approx(num_recycled / max(num_choices, 1))


@random_cases(max_examples=40)
@given(case=groups, dispatch=st.sampled_from(["recycle", "drop"]))
def test_padding_takes_no_capacity_and_has_no_weight(case, dispatch):
    _, _, is_valid_gT, _, assignments = routed(case, dispatch)
    assert not assignments.is_kept_Tk[~is_valid_gT].any()
    assert not assignments.weight_Tk[~is_valid_gT].any()


def test_padding_does_not_change_what_the_others_get():
    # The same tokens, alone and between pad tokens whose logits would fill the favourite expert.
    cfg = MoeConfig(num_experts=4, dispatch="drop", min_capacity=3, capacity_factor=0.1)
    logits_TE = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32) - np.arange(4, dtype=np.float32)
    padded_TE = np.zeros((12, 4), np.float32) + [9, 0, 0, 0]
    padded_TE[1::2] = logits_TE
    is_valid_T = np.arange(12) % 2 == 1
    alone, among = (
        routing.assign(routing.choose(jnp.asarray(logits, jnp.float32), cfg), jnp.asarray(valid), cfg, None)
        for logits, valid in ((logits_TE, np.ones(6, bool)), (padded_TE, is_valid_T))
    )
    for name in ("expert_Tk", "slot_Tk", "weight_Tk", "is_kept_Tk"):
        np.testing.assert_array_equal(getattr(alone, name), np.asarray(getattr(among, name))[is_valid_T])
    np.testing.assert_array_equal(alone.count_E, among.count_E)


def test_dropless_serves_padding_as_the_official_code_does():
    cfg = MoeConfig(num_experts=4, dispatch="dropless")
    choice = routing.choose(jax.random.normal(jax.random.key(0), (8, 4)), cfg)
    assignment = routing.assign(choice, jnp.zeros(8, bool), cfg, None)
    assert assignment.is_kept_Tk.all() and (assignment.weight_Tk > 0).all() and assignment.count_E.sum() == 8


# Who is kept


def simulate_drop(expert_Tk, valid_T, num_experts, num_slots):
    """First come first served in choice-major order: (is_kept, slot) [T, k]."""
    used_E = np.zeros(num_experts, int)
    is_kept_Tk, slot_Tk = np.zeros(expert_Tk.shape, bool), np.zeros(expert_Tk.shape, int)
    for j in range(expert_Tk.shape[1]):
        for t in range(expert_Tk.shape[0]):
            e = expert_Tk[t, j]
            if valid_T[t] and used_E[e] < num_slots:
                is_kept_Tk[t, j], slot_Tk[t, j] = True, used_E[e]
                used_E[e] += 1
    return is_kept_Tk, slot_Tk


@random_cases(max_examples=60)
@given(case=groups, dispatch=st.sampled_from(DISPATCHES))
def test_first_come_first_served_in_choice_major_order(case, dispatch):
    cfg, num_slots, is_valid_gT, choices, assignments = routed(case, dispatch)
    for g in range(NUM_GROUPS):
        choice, assignment = one_group(choices, g), one_group(assignments, g)
        valid_T = np.ones_like(is_valid_gT[g]) if dispatch == "dropless" else is_valid_gT[g]
        is_kept_Tk, slot_Tk = simulate_drop(choice.expert_Tk, valid_T, cfg.num_experts, num_slots)
        stays_Tk = assignment.is_kept_Tk & ~assignment.is_recycled_Tk
        np.testing.assert_array_equal(stays_Tk, is_kept_Tk)
        np.testing.assert_array_equal(assignment.slot_Tk[stays_Tk], slot_Tk[is_kept_Tk])
        np.testing.assert_array_equal(assignment.expert_Tk[stays_Tk], choice.expert_Tk[is_kept_Tk])
        if dispatch == "recycle" and cfg.top_k == 1:  # overflowing tokens take free slots in token order
            over_t = np.flatnonzero((valid_T[:, None] & ~is_kept_Tk)[:, 0])
            num_free = cfg.num_experts * num_slots - is_kept_Tk.sum()
            np.testing.assert_array_equal(np.flatnonzero(assignment.is_recycled_Tk[:, 0]), over_t[:num_free])


@random_cases(max_examples=40)
@given(case=groups)
def test_without_overflow_all_dispatches_are_plain_top_k(case):
    shape = (*case["shape"][:3], 1000.0, 1)  # capacity = every token
    case = case | {"shape": shape, "padding": 0.0}
    T, _, k, *_ = shape
    _, num_slots, _, choices, plain = routed(case, "dropless")
    assert num_slots == T
    np.testing.assert_array_equal(plain.expert_Tk, choices.expert_Tk)
    assert plain.is_kept_Tk.all() and not plain.is_recycled_Tk.any()
    top_gTk = np.sort(choices.probs_TE, axis=-1)[..., ::-1][..., :k]
    np.testing.assert_array_equal(np.take_along_axis(choices.probs_TE, choices.expert_Tk, -1), top_gTk)
    for dispatch in ("drop", "recycle"):
        jax.tree.map(np.testing.assert_array_equal, routed(case, dispatch)[4], plain)


def test_ties_go_to_the_lowest_index():
    assert routing.choose(jnp.zeros((2, 5)), MoeConfig(num_experts=5, top_k=3)).expert_Tk.tolist() == [[0, 1, 2]] * 2


# Weights


@random_cases(max_examples=60)
@given(case=groups, dispatch=st.sampled_from(DISPATCHES))
def test_weight_is_the_tokens_own_probability_of_the_expert_that_serves_it(case, dispatch):
    cfg, _, _, choices, assignments = routed(case, dispatch)
    logits_gTE, *_ = random_groups(**case)
    shifted_gTE = np.exp(logits_gTE.astype(np.float64) - logits_gTE.max(-1, keepdims=True))
    probs_gTE = shifted_gTE / shifted_gTE.sum(-1, keepdims=True)
    weight_gTk = np.take_along_axis(probs_gTE, assignments.expert_Tk, -1)
    if cfg.top_k > 1:  # over the original choices, whatever was dropped or moved
        weight_gTk = weight_gTk / np.maximum(np.take_along_axis(probs_gTE, choices.expert_Tk, -1).sum(-1, keepdims=True), 1.19e-7)
    np.testing.assert_allclose(assignments.weight_Tk, np.where(assignments.is_kept_Tk, weight_gTk, 0), rtol=2e-6, atol=1e-12)


def test_top_k_normaliser_is_clamped():
    # k = 2 of equal probabilities 1e-8: a fabricated choice, since a top-2 of a softmax cannot be so small.
    choice = routing.Choice(jnp.full((1, 3), 1e-8), jnp.asarray([[0, 1]]))
    weights = routing.assign(choice, jnp.ones(1, bool), MoeConfig(num_experts=3, top_k=2), None).weight_Tk
    np.testing.assert_allclose(weights, np.full((1, 2), 1e-8 / 1.19e-7), rtol=1e-6)


# Recycling


@random_cases(max_examples=40)
@given(case=groups.filter(lambda case: case["shape"][3] >= 1))
def test_recycling_drops_nothing_from_factor_one_on(case):
    _, _, is_valid_gT, _, assignments = routed(case, "recycle")
    assert assignments.is_kept_Tk[is_valid_gT].all()


@random_cases(max_examples=30)
@given(case=groups.filter(lambda case: case["shape"][3] < 1))
def test_recycling_fills_every_slot_below_factor_one(case):
    case = case | {"padding": 0.0}
    cfg, num_slots, _, _, assignments = routed(case, "recycle")
    T, E, k = case["shape"][:3]
    full = num_slots if E * num_slots <= T * k else None
    if full:
        np.testing.assert_array_equal(assignments.count_E, np.full((NUM_GROUPS, E), full))
        assert (~assignments.is_kept_Tk).sum((1, 2)).tolist() == [T * cfg.top_k - E * num_slots] * NUM_GROUPS


def test_paper_example_of_factor_0_8_drops_exactly_320_of_1600():
    cfg = MoeConfig(num_experts=16, dispatch="recycle", capacity_factor=0.8)
    assert routing.capacity(cfg, 1600) == 80
    logits_TE = jax.random.normal(jax.random.key(0), (1600, 16)) - 0.3 * jnp.arange(16.0)
    choice, assignment = route(logits_TE[None], jnp.ones((1, 1600), bool), jax.random.split(jax.random.key(1), 1), cfg)
    assert int((~assignment.is_kept_Tk).sum()) == 320
    np.testing.assert_array_equal(assignment.count_E[0], np.full(16, 80))
    dropped = routing.health(one_group(choice, 0), one_group(assignment, 0), jnp.ones(1600, bool))["dropped"]
    assert float(dropped) == pytest.approx(0.2)


def test_paper_figure_2_moves_the_overflow_to_a_random_free_expert():
    # Five experts of capacity 2; A, C and D want expert 1, B wants expert 4: D, the third, lands on any of 0, 2, 3 or 4.
    cfg = MoeConfig(num_experts=5, dispatch="recycle", capacity_factor=2.5)
    assert routing.capacity(cfg, 4) == 2
    logits_TE = 5.0 * jax.nn.one_hot(jnp.asarray([1, 4, 1, 1]), 5)
    keys_g = jax.random.split(jax.random.key(0), 400)
    _, assignment = route(jnp.tile(logits_TE, (400, 1, 1)), jnp.ones((400, 4), bool), keys_g, cfg)
    expert_gT = np.asarray(assignment.expert_Tk[..., 0])
    assert (expert_gT[:, :3] == [1, 4, 1]).all() and assignment.is_recycled_Tk[:, 3].all()
    # Free slots: two at 0, 2 and 3, one at 4.
    assert chi_square_p(expert_gT[:, 3], [2, 0, 2, 2, 1]) > 1e-3


def chi_square_p(draws, proportions):
    """Probability of counts at least this uneven if `draws` have these `proportions`; an impossible draw fails at once."""
    proportions = np.asarray(proportions, float)
    counts = np.bincount(draws, minlength=len(proportions))
    possible = proportions > 0
    assert counts[~possible].sum() == 0
    return scipy.stats.chisquare(counts[possible], counts.sum() * proportions[possible] / proportions.sum()).pvalue


@pytest.fixture(scope="module")
def recycled_many_times():
    """Wishes with 4, 2, 1 and 0 tokens over capacity 4, drawn with 4000 keys: free slots 0, 1, 2, 4 before seven... see below."""
    wishes = [0] * 9 + [1] * 3 + [2] * 2 + [3] * 2  # T = 16, capacity 4: five overflow, free slots 0, 1, 2, 2
    cfg = MoeConfig(num_experts=4, dispatch="recycle")
    logits_gTE = np.tile(6.0 * np.eye(4, dtype=np.float32)[wishes], (4000, 1, 1))
    _, assignment = route(logits_gTE, np.ones((4000, 16), bool), jax.random.split(jax.random.key(7), 4000), cfg)
    return np.asarray(assignment.expert_Tk[..., 0]), np.asarray(assignment.is_recycled_Tk[..., 0])


@pytest.mark.parametrize("token", [4, 5, 6, 7, 8])
def test_recycled_experts_are_drawn_in_proportion_to_spare_capacity(recycled_many_times, token):
    expert_gT, is_recycled_gT = recycled_many_times
    assert is_recycled_gT[:, 4:9].all() and is_recycled_gT.sum() == 5 * 4000
    assert chi_square_p(expert_gT[:, token], [0, 1, 2, 2]) > 1e-3


def test_recycled_experts_are_drawn_without_replacement(recycled_many_times):
    # All orders of the multiset {1, 2, 2, 3, 3} are equally likely: 30 of them.
    expert_gT, _ = recycled_many_times
    assert (np.sort(expert_gT[:, 4:9]) == [1, 2, 2, 3, 3]).all()
    _, order_g = np.unique(expert_gT[:, 4:9], axis=0, return_inverse=True)
    assert chi_square_p(order_g.reshape(-1), np.ones(30)) > 1e-3


@random_cases(max_examples=60)
@given(case=groups.filter(lambda case: case["shape"][2] > 1))
def test_a_recycled_choice_repeats_an_expert_of_its_token_only_if_nothing_else_is_free(case):
    # Free slots only become fewer and a token's experts only more, so what was true at the draw is true of the end: a token with an
    # expert twice has every expert that is still free.  Draws that were not forced to repeat show up here when slots remain.
    cfg, num_slots, _, _, assignments = routed(case, "recycle")
    for g in range(NUM_GROUPS):
        assignment = one_group(assignments, g)
        free = set(np.flatnonzero(assignment.count_E < num_slots))
        for experts_k, is_kept_k, is_recycled_k in zip(
            assignment.expert_Tk, assignment.is_kept_Tk, assignment.is_recycled_Tk, strict=True
        ):
            has = experts_k[is_kept_k].tolist()
            if len(set(has)) < len(has):
                assert free <= set(has)
                assert is_recycled_k.any()


@pytest.mark.parametrize(
    ("choices", "capacity", "expected"),
    [
        # Both tokens want 0 and 1; of 2 and 3 each has one slot.  Second choices overflow: the first token's, then the second's.
        ([[0, 1], [0, 1]], 1, {(0, 2), (0, 3), (1, 2), (1, 3)}),
        # Two slots everywhere, three tokens want 0 and 1: the third has neither and needs two different experts of 2 and 3.
        ([[0, 1], [0, 1], [0, 1]], 2, {(0, 1), (2, 3), (3, 2)}),
    ],
)
def test_small_groups_recycle_to_distinct_experts(choices, capacity, expected):
    T, E = len(choices), 4
    cfg = MoeConfig(num_experts=E, top_k=2, dispatch="recycle", capacity_factor=capacity * E / (2 * T))
    assert routing.capacity(cfg, T) == capacity
    logits_TE = np.zeros((T, E), np.float32)
    for t, (first, second) in enumerate(choices):
        logits_TE[t, first], logits_TE[t, second] = 4, 3
    keys_g = jax.random.split(jax.random.key(3), 200)
    _, assignment = route(np.tile(logits_TE, (200, 1, 1)), np.ones((200, T), bool), keys_g, cfg)
    assert assignment.is_kept_Tk.all()
    seen = {tuple(pair) for pair in np.asarray(assignment.expert_Tk).reshape(-1, 2).tolist()}
    assert all(len(set(pair)) == 2 for pair in seen) or capacity == 1
    assert seen >= expected if capacity == 2 else True


def test_a_token_takes_a_repeated_expert_rather_than_none():
    # One token, three choices, capacity 2 at two... every slot but those of its own experts is taken: it must repeat.
    cfg = MoeConfig(num_experts=2, top_k=2, dispatch="recycle", capacity_factor=1.0)
    choice = routing.Choice(jnp.asarray([[0.9, 0.1], [0.8, 0.2]]), jnp.asarray([[0, 1], [0, 0]]))
    # A fabricated second choice of token 1 for expert 0, which is full: only a slot at 1 is left, and token 1 lacks it.
    assignment = routing.assign(choice, jnp.ones(2, bool), cfg, jax.random.key(0))
    assert assignment.expert_Tk.tolist() == [[0, 1], [0, 1]] and assignment.is_recycled_Tk.tolist() == [[False, False], [False, True]]


def test_first_forced_draw_of_top_k_is_in_proportion_to_spare_capacity_of_the_experts_it_lacks():
    # Token 0..3 want (0, 1); capacity 2 -> tokens 2 and 3 overflow; a fifth wants (2, 3).  Free slots: 2 and 3 one each, 4 two.
    cfg = MoeConfig(num_experts=5, top_k=2, dispatch="recycle", capacity_factor=1.0)
    assert routing.capacity(cfg, 5) == 2
    logits_TE = np.zeros((5, 5), np.float32)
    logits_TE[:4, 0], logits_TE[:4, 1], logits_TE[4, 2], logits_TE[4, 3] = 5, 4, 5, 4
    _, assignment = route(np.tile(logits_TE, (2000, 1, 1)), np.ones((2000, 5), bool), jax.random.split(jax.random.key(5), 2000), cfg)
    assert chi_square_p(np.asarray(assignment.expert_Tk)[:, 2, 0], [0, 0, 1, 1, 2]) > 1e-3


# The key


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[5]], ids=["top-1", "top-2"])
def test_the_draw_is_a_function_of_the_key(shape):
    cfg = moe_config(shape, "recycle")
    logits_gTE, is_valid_gT, _ = random_groups(shape, 0, 1.0, 0.0, False)
    same_gTE = np.broadcast_to(logits_gTE[:1], logits_gTE.shape)
    keys_g = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), jnp.arange(NUM_GROUPS))
    _, first = route(same_gTE, is_valid_gT, keys_g, cfg)
    _, again = route(same_gTE, is_valid_gT, keys_g, cfg)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    outcomes = np.unique(np.asarray(first.expert_Tk).reshape(NUM_GROUPS, -1), axis=0)
    assert len(outcomes) >= NUM_GROUPS - 1


@pytest.mark.parametrize("dispatch", ["drop", "dropless"])
def test_only_recycling_needs_a_key(dispatch):
    cfg = moe_config(SHAPES[0], dispatch)
    choice = routing.choose(jnp.zeros((16, 4)), cfg)
    routing.assign(choice, jnp.ones(16, bool), cfg, None)


# Capacity and group size


@pytest.mark.parametrize(
    ("capacity_factor", "k", "tokens", "num_experts", "min_capacity", "expected"),
    [
        (1.0, 1, 16, 4, 1, 4),
        (1.1, 1, 40, 4, 1, 11),  # 11.000000000000002 in binary
        (1.0, 1, 17, 4, 1, 5),
        (1.25, 2, 16, 8, 1, 5),
        (0.1, 1, 16, 8, 1, 1),
        (0.1, 1, 16, 8, 3, 3),
        (1.0, 1, 2, 8, 8, 2),  # never above the group
        (100.0, 4, 16, 4, 1, 16),
        (1.0, 1, 262_144, 16, 1, 16_384),
    ],
)
def test_capacity_examples(capacity_factor, k, tokens, num_experts, min_capacity, expected):
    cfg = MoeConfig(num_experts, k, dispatch="drop", capacity_factor=capacity_factor, min_capacity=min_capacity)
    assert routing.capacity(cfg, tokens) == expected
    assert routing.capacity(dataclasses.replace(cfg, dispatch="recycle"), tokens) == expected
    assert routing.capacity(dataclasses.replace(cfg, dispatch="dropless"), tokens) == tokens


@settings(deadline=None, derandomize=True)
@given(
    percent=st.integers(1, 400), k=st.integers(1, 8), tokens=st.integers(1, 5000), num_experts=st.integers(8, 64), least=st.integers(1, 9)
)
def test_capacity_is_the_exact_ceiling(percent, k, tokens, num_experts, least):
    cfg = MoeConfig(num_experts, k, dispatch="recycle", capacity_factor=percent / 100, min_capacity=least)
    exact = math.ceil(Fraction(percent, 100) * k * tokens / num_experts)
    assert routing.capacity(cfg, tokens) == min(max(least, exact), tokens)


@pytest.mark.parametrize(
    ("group_size", "batch_size", "seq_len", "expected"), [(0, 3, 16, 16), (8, 3, 16, 8), (16, 3, 16, 16), (48, 3, 16, 48), (32, 4, 16, 32)]
)
def test_group_size(group_size, batch_size, seq_len, expected):
    assert routing.group_size(MoeConfig(4, group_size=group_size), batch_size, seq_len) == expected


@pytest.mark.parametrize(("group_size", "batch_size", "seq_len"), [(5, 3, 16), (24, 3, 16), (32, 3, 16), (64, 2, 16)])
def test_tokens_that_do_not_split_into_groups_are_refused(group_size, batch_size, seq_len):
    with pytest.raises(ConfigError, match=rf"group_size = {group_size} .*{seq_len}.*divides {batch_size * seq_len}\."):
        routing.group_size(MoeConfig(4, group_size=group_size), batch_size, seq_len)


# Losses and figures


def numpy_losses(logits_TE, expert_Tk):
    """(aux, z) as the specification and the paper write them, for tokens that are all valid."""
    logits_TE = logits_TE.astype(np.float64)
    log_z_T = np.log(np.exp(logits_TE).sum(-1))
    probs_TE = np.exp(logits_TE - log_z_T[:, None])
    T, E = probs_TE.shape
    chosen_TE = np.zeros((T, E))
    for t in range(T):
        chosen_TE[t, expert_Tk[t]] = 1
    if expert_Tk.shape[1] == 1:
        aux = E * np.sum(probs_TE.mean(0) * chosen_TE.mean(0))  # specification 5.2
    else:
        aux = E**2 * np.mean(chosen_TE.mean(0) * probs_TE.mean(0))  # specification 5.3
    return aux, np.mean(log_z_T**2)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("padding", [0.0, 0.4])
def test_losses_against_the_official_formulas(k, padding):
    cfg = MoeConfig(num_experts=5, top_k=k)
    rng = np.random.default_rng(k)
    logits_TE = (2 * rng.normal(size=(40, 5)) + rng.normal(size=5)).astype(np.float32)
    is_valid_T = rng.random(40) >= padding
    choice = routing.choose(jnp.asarray(logits_TE), cfg)
    aux, z = numpy_losses(logits_TE[is_valid_T], np.asarray(choice.expert_Tk)[is_valid_T])
    assert float(routing.balance_loss(choice, jnp.asarray(is_valid_T))) == pytest.approx(aux, rel=1e-5)
    assert float(routing.z_loss(jnp.asarray(logits_TE), jnp.asarray(is_valid_T))) == pytest.approx(z, rel=1e-5)


def test_balance_loss_is_one_when_balanced_and_its_gradient_evens_the_load():
    cfg = MoeConfig(num_experts=4)
    balanced = routing.choose(8.0 * jnp.eye(4)[jnp.arange(16) % 4], cfg)
    assert float(routing.balance_loss(balanced, jnp.ones(16, bool))) == pytest.approx(1.0)
    logits_TE = jnp.zeros((16, 4)).at[:, 2].set(1.0)
    gradient_TE = jax.grad(lambda logits: routing.balance_loss(routing.choose(logits, cfg), jnp.ones(16, bool)))(logits_TE)
    assert (gradient_TE[:, 2] > 0).all() and (gradient_TE[:, :2] < 0).all()


@random_cases(max_examples=20)
@given(case=groups)
def test_recycling_changes_neither_the_choice_nor_the_losses(case):
    _, _, is_valid_gT, before, _ = routed(case, "dropless")
    _, _, _, after, _ = routed(case, "recycle")
    jax.tree.map(np.testing.assert_array_equal, before, after)
    aux_g = [jax.vmap(routing.balance_loss)(choice, jnp.asarray(is_valid_gT)) for choice in (before, after)]
    np.testing.assert_array_equal(*aux_g)


def test_figures_of_an_empty_group_are_finite_and_zero():
    cfg = MoeConfig(num_experts=4, dispatch="recycle")
    logits_TE, is_valid_T = jnp.ones((8, 4)), jnp.zeros(8, bool)
    choice = routing.choose(logits_TE, cfg)
    assignment = routing.assign(choice, is_valid_T, cfg, jax.random.key(0))
    figures = routing.health(choice, assignment, is_valid_T) | {
        "aux": routing.balance_loss(choice, is_valid_T),
        "z": routing.z_loss(logits_TE, is_valid_T),
    }
    assert all(not np.asarray(value).any() for value in figures.values()), figures


@random_cases(max_examples=40)
@given(case=groups, dispatch=st.sampled_from(DISPATCHES))
def test_load_and_entropy_figures(case, dispatch):
    cfg, _, is_valid_gT, choices, assignments = routed(case, dispatch)
    figures_g = jax.vmap(routing.health)(choices, assignments, jnp.asarray(is_valid_gT))
    for g in range(NUM_GROUPS):
        valid_T = is_valid_gT[g]
        served = assignments.expert_Tk[g][assignments.is_kept_Tk[g] & valid_T[:, None]]
        load_E = np.bincount(served, minlength=cfg.num_experts) / max(served.size, 1)
        np.testing.assert_allclose(figures_g["load_E"][g], load_E, atol=1e-6)
        entropy_T = scipy.stats.entropy(choices.probs_TE[g].astype(np.float64), axis=-1)
        assert float(figures_g["entropy"][g]) == pytest.approx(entropy_T[valid_T].mean() if valid_T.any() else 0.0, rel=1e-4, abs=1e-5)
