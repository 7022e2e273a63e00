"""Laws of routing: conservation, capacity, priority, weights and the recycling draw, on random
groups of tokens.

Letters: g groups (independent cases), T tokens, k choices, E experts.
"""

import dataclasses
import math
import operator
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax.config import MoeConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.layers.ffn.moe import routing
from support.models import fast_jit

NUM_GROUPS = 16
DISPATCHES = ("recycle", "drop", "dropless")
# (T, E, k, capacity_factor, min_capacity): every static shape is compiled once and met with many
# random groups.
EXACT, TIGHT, LOOSE, AT_LEAST, TOP_2, TOP_2_LOOSE, TOP_3_TIGHT = SHAPES = (
    (16, 4, 1, 1.0, 1),
    (17, 8, 1, 0.5, 1),
    (16, 4, 1, 1.25, 1),
    (17, 8, 1, 0.1, 3),
    (12, 4, 2, 1.0, 1),
    (12, 4, 2, 1.5, 1),
    (12, 5, 3, 0.6, 1),
)
ROOM, ROOM_TOP_2 = (16, 4, 1, 4.0, 1), (12, 4, 2, 2.0, 1)


def moe_config(shape, dispatch):
    _, E, k, capacity_factor, min_capacity = shape
    if dispatch == "dropless":  # has no capacity, so shapes share a compilation
        return MoeConfig(num_experts=E, top_k=k, norm_topk_prob=k > 1)
    capacity = {"capacity_factor": capacity_factor, "min_capacity": min_capacity}
    return MoeConfig(num_experts=E, top_k=k, norm_topk_prob=k > 1, dispatch=dispatch, **capacity)


class Routed(NamedTuple):
    """Everything routing says about g groups, as numpy."""

    is_valid_gT: np.ndarray
    choice: routing.Choice
    assignment: routing.Assignment
    figures: dict[str, np.ndarray]

    def groups(self):
        num_groups = len(self.is_valid_gT)
        return [jax.tree.map(operator.itemgetter(g), self) for g in range(num_groups)]


def _route(logits_TE, is_valid_T, key, cfg):
    choice = routing.choose(logits_TE, cfg)
    assignment = routing.assign(choice, is_valid_T, cfg, key)
    figures = routing.health(choice, assignment, is_valid_T)
    figures["aux"] = routing.balance_loss(choice, is_valid_T)
    figures["z"] = routing.z_loss(logits_TE, is_valid_T)
    return Routed(is_valid_T, choice, assignment, figures)


_route_groups = fast_jit(jax.vmap(_route, in_axes=(0, 0, 0, None)), static_argnums=3)


def route(logits_gTE, is_valid_gT, keys_g, cfg):
    """The production functions, vmapped over groups as the layer does."""
    return jax.tree.map(np.asarray, _route_groups(logits_gTE, is_valid_gT, keys_g, cfg))


def route_often(logits_TE, cfg, num_draws, seed):
    """One group of valid tokens with `num_draws` keys."""
    logits_gTE = np.tile(np.asarray(logits_TE, np.float32), (num_draws, 1, 1))
    return route(
        logits_gTE,
        np.ones(logits_gTE.shape[:2], bool),
        jax.random.split(jax.random.key(seed), num_draws),
        cfg,
    ).assignment


def random_groups(shape, seed, skew, padding, ties):
    """Logits that prefer the low experts the more the larger `skew`, and a mask with `padding` as
    the chance of a pad token.
    """
    T, E, *_ = shape
    rng = np.random.default_rng(seed)
    logits_gTE = rng.normal(size=(NUM_GROUPS, T, E)) - skew * np.arange(E)
    if ties:
        logits_gTE = np.round(logits_gTE)
    return (
        logits_gTE.astype(np.float32),
        rng.random((NUM_GROUPS, T)) >= padding,
        jax.random.split(jax.random.key(seed), NUM_GROUPS),
    )


def cases(*shapes):
    return st.fixed_dictionaries(
        {
            "shape": st.sampled_from(shapes),
            "seed": st.integers(0, 2**31 - 1),
            "skew": st.sampled_from([0.0, 0.3, 1.0, 8.0]),
            "padding": st.sampled_from([0.0, 0.25, 0.8, 1.0]),
            "ties": st.booleans(),
        }
    )


def random_cases(*shapes, dispatches=DISPATCHES):
    """Runs the test on random cases of each dispatch, always the same ones; each case is
    NUM_GROUPS groups.
    """

    def decorate(test):
        test = settings(max_examples=25, derandomize=True)(
            given(case=cases(*(shapes or SHAPES)))(test)
        )
        return pytest.mark.parametrize("dispatch", dispatches)(test)

    return decorate


def routed(case, dispatch):
    """(config, capacity, Routed) of a case."""
    cfg = moe_config(case["shape"], dispatch)
    return cfg, routing.capacity(cfg, case["shape"][0]), route(*random_groups(**case), cfg)


# Conservation and capacity


@pytest.mark.cases(2)
@random_cases()
@pytest.mark.heavy
def test_slots_are_packed_unique_and_within_capacity(case, dispatch):
    cfg, num_slots, result = routed(case, dispatch)
    for _, _, assignment, _ in result.groups():
        assert assignment.count_E.sum() == assignment.is_kept_Tk.sum()
        for e in range(cfg.num_experts):
            slots = np.sort(
                assignment.slot_Tk[(assignment.expert_Tk == e) & assignment.is_kept_Tk]
            )
            np.testing.assert_array_equal(slots, np.arange(assignment.count_E[e]))
        if dispatch != "dropless":
            assert assignment.count_E.max() <= num_slots
        assert (assignment.slot_Tk[~assignment.is_kept_Tk] == 0).all()
        assert (assignment.is_kept_Tk | ~assignment.is_recycled_Tk).all()


@random_cases()
def test_every_valid_choice_is_served_or_counted_as_dropped(case, dispatch):
    cfg, num_slots, result = routed(case, dispatch)
    for valid_T, choice, assignment, figures in result.groups():
        num_choices = valid_T.sum() * cfg.top_k
        demand_E = np.bincount(choice.expert_Tk[valid_T].reshape(-1), minlength=cfg.num_experts)
        served = {
            "recycle": min(num_choices, cfg.num_experts * num_slots),
            "drop": np.minimum(demand_E, num_slots).sum(),
            "dropless": num_choices,
        }[dispatch]
        assert assignment.is_kept_Tk[valid_T].sum() == served
        np.testing.assert_array_equal(figures["wished_E"], demand_E)
        assert figures["served_E"].sum() == served
        num_recycled = (
            served - np.minimum(demand_E, num_slots).sum() if dispatch == "recycle" else 0
        )
        assert assignment.is_recycled_Tk.sum() == num_recycled
        assert figures["recycled"] == num_recycled


@random_cases(dispatches=("recycle", "drop"))
def test_padding_takes_no_capacity_and_has_no_weight(case, dispatch):
    _, _, (is_valid_gT, _, assignments, _) = routed(case, dispatch)
    assert not assignments.is_kept_Tk[~is_valid_gT].any()
    assert not assignments.weight_Tk[~is_valid_gT].any()


def test_padding_does_not_change_what_the_others_get():
    # The same tokens, alone and between pad tokens whose logits would fill the favourite expert.
    cfg = MoeConfig(num_experts=4, dispatch="drop", min_capacity=3, capacity_factor=0.1)
    logits_TE = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32) - np.arange(
        4, dtype=np.float32
    )
    padded_TE = np.zeros((12, 4), np.float32) + np.asarray([9, 0, 0, 0], np.float32)
    padded_TE[1::2] = logits_TE
    is_valid_T = np.arange(12) % 2 == 1
    (alone,) = route(logits_TE[None], np.ones((1, 6), bool), None, cfg).groups()
    (among,) = route(padded_TE[None], is_valid_T[None], None, cfg).groups()
    alone, among = alone.assignment, among.assignment
    for name in ("expert_Tk", "slot_Tk", "weight_Tk", "is_kept_Tk"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(among, name)[is_valid_T])
    np.testing.assert_array_equal(alone.count_E, among.count_E)
    assert not alone.is_kept_Tk.all()


@random_cases(dispatches=("dropless",))
def test_dropless_serves_padding_as_the_official_code_does(case, dispatch):
    _, _, (_, choice, assignment, _) = routed(case, dispatch)
    assert assignment.is_kept_Tk.all() and (assignment.weight_Tk > 0).all()
    np.testing.assert_array_equal(assignment.expert_Tk, choice.expert_Tk)


@pytest.mark.heavy
@settings(max_examples=5, derandomize=True)  # each is compiled
@given(data=st.data())
def test_groups_of_any_size_are_recycled_as_in_a_simulation(data):
    """Random tokens, experts, choices and capacities; the tests above have a few of each."""
    T, E = data.draw(st.integers(1, 24), "T"), data.draw(st.integers(2, 9), "E")
    k = data.draw(st.integers(1, min(3, E)), "k")
    shape = (
        T,
        E,
        k,
        data.draw(st.sampled_from([0.2, 0.7, 1.0, 1.3, 2.0]), "factor"),
        data.draw(st.integers(1, 3), "min_capacity"),
    )
    case = data.draw(cases(shape))
    _, num_slots, result = routed(case, "recycle")
    for valid_T, choice, assignment, figures in result.groups():
        stays_Tk, slot_Tk = simulate_drop(choice.expert_Tk, valid_T, E, num_slots)
        is_filled_ES = np.zeros((E, num_slots), bool)
        is_filled_ES[choice.expert_Tk[stays_Tk], slot_Tk[stays_Tk]] = True
        num_recycled = num_dropped = 0
        for over in (valid_T[:, None] & ~stays_Tk).ravel().nonzero()[0]:
            t, j = divmod(over, k)
            if not assignment.is_recycled_Tk[t, j]:
                num_dropped += 1
                continue
            place = assignment.expert_Tk[t, j], assignment.slot_Tk[t, j]
            assert not is_filled_ES[place]  # nobody else has this slot
            is_filled_ES[place] = True
            num_recycled += 1
        assert num_dropped == 0 or is_filled_ES.all()  # dropped only when nothing is free
        np.testing.assert_array_equal(assignment.is_kept_Tk & ~assignment.is_recycled_Tk, stays_Tk)
        np.testing.assert_array_equal(assignment.is_kept_Tk.sum() + num_dropped, valid_T.sum() * k)
        np.testing.assert_array_equal(assignment.count_E, is_filled_ES.sum(1))
        np.testing.assert_array_equal(figures["served_E"], is_filled_ES.sum(1))
        assert figures["recycled"] == num_recycled
        assert figures["wished_E"].sum() - figures["served_E"].sum() == num_dropped


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


@random_cases()
def test_first_come_first_served_in_choice_major_order(case, dispatch):
    cfg, num_slots, result = routed(case, dispatch)
    num_slots = case["shape"][0] * cfg.top_k if dispatch == "dropless" else num_slots
    for valid_T, choice, assignment, _ in result.groups():
        valid_T = valid_T | (dispatch == "dropless")
        is_kept_Tk, slot_Tk = simulate_drop(choice.expert_Tk, valid_T, cfg.num_experts, num_slots)
        stays_Tk = assignment.is_kept_Tk & ~assignment.is_recycled_Tk
        np.testing.assert_array_equal(stays_Tk, is_kept_Tk)
        np.testing.assert_array_equal(assignment.slot_Tk[stays_Tk], slot_Tk[is_kept_Tk])
        np.testing.assert_array_equal(assignment.expert_Tk[stays_Tk], choice.expert_Tk[is_kept_Tk])
        if (
            dispatch == "recycle" and cfg.top_k == 1
        ):  # overflowing tokens take free slots in token order
            over_t = np.flatnonzero((valid_T[:, None] & ~is_kept_Tk)[:, 0])
            num_free = cfg.num_experts * num_slots - is_kept_Tk.sum()
            np.testing.assert_array_equal(
                np.flatnonzero(assignment.is_recycled_Tk[:, 0]), over_t[:num_free]
            )


@random_cases(ROOM, ROOM_TOP_2, dispatches=("drop", "recycle"))
def test_without_overflow_every_dispatch_is_plain_top_k(case, dispatch):
    case = case | {"padding": 0.0}
    cfg, num_slots, result = routed(case, dispatch)
    assert num_slots == case["shape"][0]
    _, _, plain = routed(case, "dropless")
    jax.tree.map(np.testing.assert_array_equal, result.assignment, plain.assignment)
    np.testing.assert_array_equal(plain.assignment.expert_Tk, plain.choice.expert_Tk)
    assert plain.assignment.is_kept_Tk.all() and not result.assignment.is_recycled_Tk.any()
    top_gTk = np.sort(plain.choice.probs_TE, axis=-1)[..., ::-1][..., : cfg.top_k]
    np.testing.assert_array_equal(
        np.take_along_axis(plain.choice.probs_TE, plain.choice.expert_Tk, -1), top_gTk
    )


def test_ties_go_to_the_lowest_index():
    assert (
        routing.choose(jnp.zeros((2, 5)), MoeConfig(num_experts=5, top_k=3)).expert_Tk.tolist()
        == [[0, 1, 2]] * 2
    )


# Weights


@random_cases()
def test_weight_is_the_tokens_own_probability_of_the_expert_that_serves_it(case, dispatch):
    cfg, _, (_, choice, assignment, _) = routed(case, dispatch)
    logits_gTE = random_groups(**case)[0].astype(np.float64)
    shifted_gTE = np.exp(logits_gTE - logits_gTE.max(-1, keepdims=True))
    probs_gTE = shifted_gTE / shifted_gTE.sum(-1, keepdims=True)
    weight_gTk = np.take_along_axis(probs_gTE, assignment.expert_Tk, -1)
    if cfg.top_k > 1:  # over the original choices, whatever was dropped or moved
        weight_gTk = weight_gTk / np.maximum(
            np.take_along_axis(probs_gTE, choice.expert_Tk, -1).sum(-1, keepdims=True), 1.19e-7
        )
    np.testing.assert_allclose(
        assignment.weight_Tk, np.where(assignment.is_kept_Tk, weight_gTk, 0), rtol=4e-6, atol=1e-12
    )


def test_top_k_normaliser_is_clamped():
    # A fabricated choice: the top 2 of a softmax over so few experts cannot be so improbable.
    choice = routing.Choice(*2 * [jnp.full((1, 3), 1e-8)], jnp.asarray([[0, 1]]))
    weights = routing.assign(
        choice, jnp.ones(1, bool), MoeConfig(num_experts=3, top_k=2, norm_topk_prob=True), None
    ).weight_Tk
    np.testing.assert_allclose(weights, np.full((1, 2), 1e-8 / 1.19e-7), rtol=1e-6)


# Recycling


@random_cases(EXACT, LOOSE, TOP_2, TOP_2_LOOSE, dispatches=("recycle",))
def test_recycling_drops_nothing_from_factor_one_on(case, dispatch):
    _, _, (is_valid_gT, _, assignment, figures) = routed(case, dispatch)
    assert assignment.is_kept_Tk[is_valid_gT].all()
    np.testing.assert_array_equal(figures["served_E"].sum(-1), figures["wished_E"].sum(-1))


@random_cases(TIGHT, TOP_3_TIGHT, dispatches=("recycle",))
def test_recycling_fills_every_slot_below_factor_one(case, dispatch):
    _, num_slots, (_, _, assignment, _) = routed(case | {"padding": 0.0}, dispatch)
    T, E, k, *_ = case["shape"]
    np.testing.assert_array_equal(assignment.count_E, np.full((NUM_GROUPS, E), num_slots))
    assert (~assignment.is_kept_Tk).sum((1, 2)).tolist() == [T * k - E * num_slots] * NUM_GROUPS


def test_paper_example_of_factor_0_8_drops_exactly_320_of_1600():
    cfg = MoeConfig(num_experts=16, dispatch="recycle", capacity_factor=0.8)
    assert routing.capacity(cfg, 1600) == 80
    logits_TE = np.random.default_rng(0).normal(size=(1600, 16)) - 0.3 * np.arange(16)
    keys_g = jax.random.split(jax.random.key(1), 1)
    _, _, assignment, figures = route(
        logits_TE[None].astype(np.float32), np.ones((1, 1600), bool), keys_g, cfg
    )
    assert (~assignment.is_kept_Tk).sum() == 320
    np.testing.assert_array_equal(assignment.count_E[0], np.full(16, 80))
    np.testing.assert_array_equal(
        [figures["wished_E"].sum(), figures["served_E"].sum()], [1600, 1280]
    )


def chi_square_p(draws, proportions):
    """Probability of counts at least this uneven if `draws` have these `proportions`; an
    impossible draw fails at once.
    """
    proportions = np.asarray(proportions, float)
    counts = np.bincount(draws, minlength=len(proportions))
    possible = proportions > 0
    assert not counts[~possible].any(), counts
    return scipy.stats.chisquare(
        counts[possible], counts.sum() * proportions[possible] / proportions.sum()
    ).pvalue


def test_paper_figure_2_moves_the_overflow_to_a_random_free_expert():
    # Five experts of capacity 2; A, C and D want expert 1, B wants expert 4; D, the last of three,
    # goes to a free slot.
    cfg = MoeConfig(num_experts=5, dispatch="recycle", capacity_factor=2.5)
    assert routing.capacity(cfg, 4) == 2
    assignment = route_often(5 * np.eye(5)[[1, 4, 1, 1]], cfg, num_draws=1000, seed=0)
    expert_gT = assignment.expert_Tk[..., 0]
    assert (expert_gT[:, :3] == [1, 4, 1]).all() and assignment.is_recycled_Tk[:, 3].all()
    assert chi_square_p(expert_gT[:, 3], [2, 0, 2, 2, 1]) > 1e-3


@pytest.fixture(scope="module")
def five_recycled():
    """Experts that serve tokens 4 to 8, the overflow of expert 0, in 4000 draws: free slots are 0,
    1, 2, 2 of four each.
    """
    wishes = [0] * 9 + [1] * 3 + [2] * 2 + [3] * 2
    assignment = route_often(
        6 * np.eye(4)[wishes], MoeConfig(num_experts=4, dispatch="recycle"), num_draws=4000, seed=7
    )
    assert (
        assignment.is_recycled_Tk[..., 0] == (np.arange(16) // 4 == 1) | (np.arange(16) == 8)
    ).all()
    return assignment.expert_Tk[:, 4:9, 0]


@pytest.mark.parametrize("nth", range(5))
def test_recycled_experts_are_drawn_in_proportion_to_spare_capacity(five_recycled, nth):
    assert chi_square_p(five_recycled[:, nth], [0, 1, 2, 2]) > 1e-3


def test_recycled_experts_are_drawn_without_replacement(five_recycled):
    # All 30 orders of the multiset {1, 2, 2, 3, 3} are equally likely.
    assert (np.sort(five_recycled) == [1, 2, 2, 3, 3]).all()
    orders, which = np.unique(five_recycled, axis=0, return_inverse=True)
    assert len(orders) == 30
    assert chi_square_p(which.reshape(-1), np.ones(30)) > 1e-3


@random_cases(TOP_2, TOP_2_LOOSE, TOP_3_TIGHT, dispatches=("recycle",))
def test_a_recycled_choice_repeats_an_expert_of_its_token_only_if_nothing_else_is_free(
    case, dispatch
):
    # Free slots only become fewer and a token's experts only more.  So a token that had to repeat
    # an expert, because it had all that were free, still has all that are free at the end.
    _, num_slots, result = routed(case, dispatch)
    for _, _, assignment, _ in result.groups():
        free = set(np.flatnonzero(assignment.count_E < num_slots).tolist())
        for experts_k, is_kept_k, is_moved_k in zip(
            assignment.expert_Tk, assignment.is_kept_Tk, assignment.is_recycled_Tk, strict=True
        ):
            has = experts_k[is_kept_k].tolist()
            if len(set(has)) < len(has):
                assert is_moved_k.any() and free <= set(has)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "capacity", "outcomes"),
    [
        # The last token finds 0 and 1 full; the others have two slots each.
        (3, 5, 2, {(a, b) for a in (2, 3, 4) for b in (2, 3, 4) if a != b}),
        # Only expert 2 is left: it serves the token twice rather than once.
        (3, 3, 2, {(2, 2)}),
    ],
)
def test_when_all_want_the_same_two_experts_the_last_gets_two_others(
    num_tokens, num_experts, capacity, outcomes
):
    factor = capacity * num_experts / (2 * num_tokens)
    cfg = MoeConfig(num_experts=num_experts, top_k=2, dispatch="recycle", capacity_factor=factor)
    assert routing.capacity(cfg, num_tokens) == capacity
    logits_TE = np.tile([4, 3] + [0] * (num_experts - 2), (num_tokens, 1))
    expert_gTk = route_often(logits_TE, cfg, num_draws=200, seed=3).expert_Tk
    assert (expert_gTk[:, :-1] == [0, 1]).all()
    assert {tuple(pair) for pair in expert_gTk[:, -1].tolist()} == outcomes


def test_top_2_draws_in_proportion_to_spare_capacity_among_the_experts_a_token_lacks():
    # Capacity 2: the third token overflows from 0 and 1; the fourth takes a slot of 2 and of 3;
    # two are free at 4.
    cfg = MoeConfig(num_experts=5, top_k=2, dispatch="recycle", capacity_factor=1.25)
    logits_TE = np.asarray([[4, 3, 0, 0, 0], [4, 3, 0, 0, 0], [4, 3, 0, 0, 0], [0, 0, 4, 3, 0]])
    assert routing.capacity(cfg, 4) == 2
    expert_gk = route_often(logits_TE, cfg, num_draws=2000, seed=5).expert_Tk[:, 2]
    assert chi_square_p(expert_gk[:, 0], [0, 0, 1, 1, 2]) > 1e-3
    assert (expert_gk[:, 0] != expert_gk[:, 1]).all()


# The key


@pytest.mark.parametrize("shape", [EXACT, TOP_2], ids=["top-1", "top-2"])
def test_the_draw_is_a_function_of_the_key(shape):
    cfg = moe_config(shape, "recycle")
    logits_gTE, is_valid_gT, _ = random_groups(shape, 0, 1.0, 0.0, False)
    same_gTE = np.broadcast_to(logits_gTE[:1], logits_gTE.shape)
    keys_g = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        jax.random.key(0), jnp.arange(NUM_GROUPS)
    )
    first, again = (route(same_gTE, is_valid_gT, keys_g, cfg) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (
        len(np.unique(first.assignment.expert_Tk.reshape(NUM_GROUPS, -1), axis=0))
        >= NUM_GROUPS - 1
    )


# Capacity and group size


@pytest.mark.parametrize(
    ("capacity_factor", "k", "tokens", "num_experts", "min_capacity", "expected"),
    [
        (1.0, 1, 16, 4, 1, 4),
        (1.1, 1, 40, 4, 1, 11),
        (1.12, 1, 50, 4, 1, 14),  # 14.000000000000002 in binary
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
    cfg = MoeConfig(
        num_experts, k, dispatch="drop", capacity_factor=capacity_factor, min_capacity=min_capacity
    )
    assert routing.capacity(cfg, tokens) == expected
    assert routing.capacity(dataclasses.replace(cfg, dispatch="recycle"), tokens) == expected
    assert routing.capacity(dataclasses.replace(cfg, dispatch="dropless"), tokens) == tokens


@settings(derandomize=True)
@given(
    percent=st.integers(1, 400),
    k=st.integers(1, 8),
    tokens=st.integers(1, 5000),
    num_experts=st.integers(8, 64),
    least=st.integers(1, 9),
)
def test_capacity_is_the_exact_ceiling(percent, k, tokens, num_experts, least):
    cfg = MoeConfig(
        num_experts, k, dispatch="recycle", capacity_factor=percent / 100, min_capacity=least
    )
    exact = math.ceil(Fraction(percent, 100) * k * tokens / num_experts)
    assert routing.capacity(cfg, tokens) == min(max(least, exact), tokens)


@pytest.mark.parametrize(
    ("group_size", "batch_size", "seq_len", "expected"),
    [(0, 3, 16, 16), (8, 3, 16, 8), (16, 3, 16, 16), (48, 3, 16, 48), (32, 4, 16, 32)],
)
def test_group_size(group_size, batch_size, seq_len, expected):
    assert routing.group_size(MoeConfig(4, group_size=group_size), batch_size, seq_len) == expected


@pytest.mark.parametrize(
    ("group_size", "batch_size", "seq_len"), [(5, 3, 16), (24, 3, 16), (32, 3, 16), (64, 2, 16)]
)
def test_tokens_that_do_not_split_into_groups_are_refused(group_size, batch_size, seq_len):
    with pytest.raises(
        ConfigError,
        match=rf"group_size = {group_size} .*{seq_len}.*divides {batch_size * seq_len}\.",
    ):
        routing.group_size(MoeConfig(4, group_size=group_size), batch_size, seq_len)


# Losses and figures


@random_cases()
def test_figures_against_the_official_formulas(case, dispatch):
    cfg, _, result = routed(case, dispatch)
    E = cfg.num_experts
    for logits_TE, (valid_T, choice, assignment, figures) in zip(
        random_groups(**case)[0], result.groups(), strict=True
    ):
        served = assignment.expert_Tk[assignment.is_kept_Tk & valid_T[:, None]]
        np.testing.assert_array_equal(figures["served_E"], np.bincount(served, minlength=E))
        np.testing.assert_array_equal(
            figures["wished_E"], np.bincount(choice.expert_Tk[valid_T].ravel(), minlength=E)
        )
        assert figures["recycled"] == np.count_nonzero(assignment.is_recycled_Tk[valid_T])
        assert figures["tokens"] == np.count_nonzero(valid_T)
        if not valid_T.any():
            assert not any(value.any() for value in figures.values())
            continue
        logits_TE = logits_TE[valid_T].astype(np.float64)
        log_z_T = scipy.special.logsumexp(logits_TE, axis=-1)
        probs_TE = np.exp(logits_TE - log_z_T[:, None])
        chosen_TE = (choice.expert_Tk[valid_T][:, :, None] == np.arange(E)).sum(1)
        aux_of_top_1 = E * np.sum(probs_TE.mean(0) * chosen_TE.mean(0))  # official, k = 1
        aux_of_top_k = E**2 * np.mean(chosen_TE.mean(0) * probs_TE.mean(0))  # official, k > 1
        assert figures["aux"] == pytest.approx(
            aux_of_top_1 if cfg.top_k == 1 else aux_of_top_k, rel=1e-5
        )
        assert figures["z"] == pytest.approx(np.mean(log_z_T**2), rel=1e-5, abs=1e-6)
        assert figures["entropy"] == pytest.approx(
            scipy.stats.entropy(probs_TE, axis=-1).sum(), rel=1e-4, abs=1e-5
        )


@random_cases(EXACT, TOP_2, dispatches=("recycle", "drop"))
def test_losses_are_those_of_the_original_choice(case, dispatch):
    _, _, plain = routed(case, "dropless")
    _, _, result = routed(case, dispatch)
    jax.tree.map(np.testing.assert_array_equal, result.choice, plain.choice)
    for name in ("aux", "z", "entropy"):
        np.testing.assert_array_equal(result.figures[name], plain.figures[name])


def test_balance_loss_is_one_when_balanced_and_its_gradient_evens_the_load():
    cfg = MoeConfig(num_experts=4)

    @fast_jit
    @jax.value_and_grad
    def loss(logits_TE):
        return routing.balance_loss(routing.choose(logits_TE, cfg), jnp.ones(16, bool))

    assert float(loss(8.0 * jnp.eye(4)[jnp.arange(16) % 4])[0]) == pytest.approx(1.0)
    _, gradient_TE = loss(jnp.zeros((16, 4)).at[:, 2].set(1.0))
    assert (gradient_TE[:, 2] > 0).all() and (gradient_TE[:, [0, 1, 3]] < 0).all()
