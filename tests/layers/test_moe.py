"""The mixture-of-experts layer: dispatch and its inverse, the same result on every mesh, tiles,
remat and errors.

Letters: g groups, T tokens, k choices, E experts, e experts on a shard, C capacity, D model, F
ffn, n tiles, b rows a tile.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax.config import LoraConfig, ModelConfig, MoeConfig
from hunyuan_jax.layers import loss
from hunyuan_jax.layers.ffn.moe import dispatch, experts, routing
from hunyuan_jax.layers.ffn.moe import layer as moe
from hunyuan_jax.layers.ffn.moe.layer import router_metrics
from hunyuan_jax.model.count import count
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel import island, rules
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.params.abstract import shardings
from hunyuan_jax.train.state import abstract_model
from pallas_kernels import expert_matmul
from support.models import assert_close, fast_jit, filled, mesh_of

SMALL = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=8,
    num_kv_heads=8,
    head_dim=8,
    max_position=16,
    moe=MoeConfig(
        num_experts=8,
        num_shared_experts=1,
        dispatch="recycle",
        aux_loss_weight=0.05,
        z_loss_weight=0.01,
    ),
)
BATCH, LENGTH = 8, 12


def small(**changes):
    """SMALL with fields of the mixture changed."""
    return dataclasses.replace(SMALL, moe=dataclasses.replace(SMALL.moe, **changes))


# The same result on every mesh


@functools.cache
def batch():
    """(tokens, positions, segments, targets) [B, T] with padding at the end of some rows and two
    documents in one.
    """
    rng = np.random.default_rng(0)
    tokens_BT, targets_BT = rng.integers(0, SMALL.vocab_size, (2, BATCH, LENGTH)).astype(np.int32)
    segments_BT = np.ones((BATCH, LENGTH), np.int32)
    segments_BT[1, 5:], segments_BT[4, 9:], segments_BT[6, 4:] = 0, 0, 2
    return (
        tokens_BT,
        np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_BT.shape),
        segments_BT,
        targets_BT,
    )


@functools.cache
def initial_params(intermediate_size):
    """The parameters of every variant of SMALL as numpy."""
    cfg = dataclasses.replace(SMALL, intermediate_size=intermediate_size)
    model = filled(functools.partial(Transformer, cfg, single_device_mesh(), jax.random.key(0)))
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))


def train_step(cfg, mesh):
    """(loss, figures, gradients) of one step with parameters and batch laid out by the rules
    table.
    """
    graph_def, specs = abstract_model(cfg, mesh)
    params = jax.device_put(initial_params(cfg.intermediate_size), shardings(specs))
    data = [jax.device_put(a, rules.sharding(mesh, ("batch", "seq"), a.shape)) for a in batch()]

    def loss_fn(params, tokens_BT, positions_BT, segments_BT, targets_BT, key):
        model = nnx.merge(graph_def, params)
        output = model(tokens_BT, positions_BT, segments_BT, key=key, is_training=True)
        entropy = loss.mean_loss(
            model.token_losses(output.hidden_BTD, targets_BT),
            (segments_BT > 0).astype(jnp.float32),
        )
        return entropy + loss.router_loss(output.stats, cfg.moe), output.stats

    step = fast_jit(jax.value_and_grad(loss_fn, has_aux=True))
    (total, stats), grads = jax.tree.map(np.asarray, step(params, *data, jax.random.key(3)))
    return total, stats, grads


@functools.cache
def train_step_alone(cfg):
    return train_step(cfg, single_device_mesh())


# (dispatch, k, (data, expert, tensor, replica), columns of an expert): 1 to 8 expert shards, alone
# and mixed with the other axes.  250 columns are 256 in use where `data` gathers an expert's rows.
MESHES = [
    ("recycle", 2, (2, 2, 2), 24),
    ("drop", 2, (4, 2, 1), 250),
    ("dropless", 2, (1, 4, 2), 24),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("recycle", 1, (1, 8, 1), 24),
            ("recycle", 1, (2, 2, 1), 250),
            ("dropless", 1, (2, 2, 1), 250),
            ("dropless", 1, (2, 2, 1, 2), 24),
            ("recycle", 1, (4, 1, 2), 24),
            ("recycle", 1, (2, 4, 1), 24),
            ("drop", 1, (1, 4, 2), 24),
            ("drop", 1, (1, 8, 1), 24),
            ("dropless", 1, (1, 8, 1), 24),
        )
    ),
]


@pytest.mark.cases(2)
@pytest.mark.heavy
@pytest.mark.parametrize(("way", "k", "sizes", "columns"), MESHES)
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(way, k, sizes, columns):
    # Capacity factor 1 with uneven wishes: about a third of the choices are recycled, or dropped.
    cfg = dataclasses.replace(small(dispatch=way, top_k=k), intermediate_size=columns)
    total, stats, grads = train_step(cfg, mesh_of(*sizes))
    total_alone, stats_alone, grads_alone = train_step_alone(cfg)
    assert_close(total, total_alone, 1e-6)
    for name in stats:  # load, recycled and dropped are counts: the same assignment
        assert_close(stats[name], stats_alone[name], 1e-5)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), grads, grads_alone)
    # Gradients have the shapes of what a train state and its checkpoints hold.
    assert sum(gradient.size for gradient in jax.tree.leaves(grads)) == count(cfg).total
    figures = router_metrics(stats)
    moved = {"recycle": "recycled_L", "drop": "dropped_L"}.get(way)
    assert moved is None or figures[moved].min() > 0.02
    assert (figures["recycled_L"] > 0).any() == (way == "recycle") and (
        figures["dropped_L"] > 0
    ).any() == (way == "drop")


def assignments_on(mesh, cfg, x_BTD, router_DE, is_valid_BT, group_size):
    """The real assignment of every group [B * T / group_size, ...] of a layer, seen through a spy
    in the experts' place.
    """
    seen = {}

    stored = {"router": {"router_DE": ("embed", "router_experts")}, "experts": {}}

    def body(weights, x_BTD, is_valid_BT, key_data):
        def spy(weights, x_gTD, assignment):
            seen["assignment"] = assignment
            return jnp.zeros_like(x_gTD)

        moe.route_and_serve(
            weights,
            x_BTD,
            is_valid_BT,
            key_data,
            serve=spy,
            dims=stored,
            cfg=cfg,
            group_size=group_size,
            kernels={},
            lora_cfg=LoraConfig(),
        )
        return seen["assignment"]

    fn = island.island(
        body,
        mesh,
        stored,
        (("batch", "seq", "embed"), ("batch", "seq"), ()),
        routing.Assignment(*[("batch",)] * 6),
    )
    weights = {"router": {"router_DE": router_DE}, "experts": {}}
    return jax.tree.map(
        np.asarray,
        fast_jit(fn)(weights, x_BTD, is_valid_BT, jax.random.key_data(jax.random.key(5))),
    )


@pytest.mark.parametrize(("k", "group_size"), [(1, 6), (1, 12), (2, 24)])
def test_the_assignment_is_the_same_bit_for_bit_on_every_mesh(k, group_size):
    cfg = small(top_k=k).moe
    rng = np.random.default_rng(1)
    x_BTD = rng.normal(size=(BATCH, LENGTH, 16)).astype(np.float32)
    router_DE = np.eye(16, 8, dtype=np.float32)  # small products, exact on every mesh
    x_BTD[..., :8] -= 0.3 * np.arange(8, dtype=np.float32)
    args = (x_BTD, router_DE, rng.random((BATCH, LENGTH)) < 0.9, group_size)
    alone = assignments_on(single_device_mesh(), cfg, *args)
    assert (
        alone.expert_Tk.shape == (BATCH * LENGTH // group_size, group_size, k)
        and alone.is_recycled_Tk.any()
    )
    jax.tree.map(
        np.testing.assert_array_equal, assignments_on(mesh_of(2, 2, 2), cfg, *args), alone
    )


# The key reaches every step, layer and group


@pytest.mark.heavy
def test_steps_layers_and_groups_draw_with_different_keys(monkeypatch):
    seen = []
    original = routing.assign

    def spy(choice, is_valid_T, cfg, key):
        jax.debug.callback(
            lambda data: seen.append(tuple(np.asarray(data).tolist())), jax.random.key_data(key)
        )
        return original(choice, is_valid_T, cfg, key)

    monkeypatch.setattr(routing, "assign", spy)
    cfg = dataclasses.replace(SMALL, num_layers=4, cla_share_factor=2)
    model = filled(functools.partial(Transformer, cfg, single_device_mesh(), jax.random.key(0)))
    tokens_BT, positions_BT, segments_BT, _ = (a[:2] for a in batch())
    step = fast_jit(lambda key: model(tokens_BT, positions_BT, segments_BT, key=key).hidden_BTD)
    for seed in range(3):
        jax.block_until_ready(step(jax.random.key(seed)))
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 3 * 4 * 2
    jax.block_until_ready(step(jax.random.key(2)))
    jax.effects_barrier()
    assert len(set(seen)) == 3 * 4 * 2


# Dispatch and its inverse


@functools.cache
def random_assignment(way, k, num_groups, num_tokens, num_experts, seed=0):
    """(config, x, assignment, choice of weights) of a few random groups with some padding."""
    cfg = MoeConfig(num_experts, k, dispatch=way, capacity_factor=0.75)
    rng = np.random.default_rng(seed)
    x_gTD = rng.normal(size=(num_groups, num_tokens, 5)).astype(np.float32)
    logits_gTE = rng.normal(size=(num_groups, num_tokens, num_experts)).astype(
        np.float32
    ) - 0.5 * np.arange(num_experts, dtype=np.float32)

    def route(logits_TE, is_valid_T, key):
        return routing.assign(routing.choose(logits_TE, cfg), is_valid_T, cfg, key)

    is_valid_gT = rng.random((num_groups, num_tokens)) < 0.9
    return (
        cfg,
        x_gTD,
        fast_jit(jax.vmap(route))(
            logits_gTE, is_valid_gT, jax.random.split(jax.random.key(seed), num_groups)
        ),
    )


def activation_island(body, mesh, in_logical, out_logical):
    """An island without parameters."""
    fn = island.island(lambda _, *args: body(*args), mesh, {}, in_logical, out_logical)
    return functools.partial(fn, {})


@functools.cache
def compiled_dispatch(mesh, way, num_slots):
    """(x, assignment, scale [E], dy) -> output and gradients of x, weights and scale; expert e
    multiplies by scale_E[e].
    """

    def body(x_gTD, assignment, scale_e):
        if way == "dropless":

            def tiles(x_nbD, weight_nb, e_n, _):
                return x_nbD * (weight_nb * scale_e[e_n][:, None])[..., None]

            return dispatch.dropless(x_gTD, assignment, scale_e.shape[0], tiles)

        def buffers(x_eRD, weight_eR, _):
            return x_eRD * (weight_eR * scale_e[:, None])[..., None]

        return dispatch.by_capacity(x_gTD, assignment, num_slots, buffers)

    fn = activation_island(
        body, mesh, (("batch",), routing.Assignment(*[("batch",)] * 6), ("experts",)), ("batch",)
    )

    def value_and_gradients(x_gTD, assignment, scale_E, dy_gTD):
        y_gTD, pullback = jax.vjp(
            lambda x, w, s: fn(x, assignment._replace(weight_Tk=w), s),
            x_gTD,
            assignment.weight_Tk,
            scale_E,
        )
        return y_gTD, *pullback(dy_gTD)

    return fast_jit(value_and_gradients)


@pytest.mark.cases(7)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("way", ["recycle", "drop", "dropless"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 4, 1), (1, 8, 1)])
def test_each_token_comes_back_from_its_experts_with_its_weight(way, k, sizes):
    cfg, x_gTD, assignment = random_assignment(way, k, num_groups=8, num_tokens=12, num_experts=8)
    run = compiled_dispatch(mesh_of(*sizes), way, routing.capacity(cfg, 12))
    weight_gTk, expert_gTk = np.asarray(assignment.weight_Tk), np.asarray(assignment.expert_Tk)
    dy_gTD = np.random.default_rng(1).normal(size=x_gTD.shape).astype(np.float32)
    for scale_E in (np.ones(8, np.float32), 1.5 ** np.arange(8, dtype=np.float32)):
        y_gTD, dx_gTD, dweight_gTk, dscale_E = run(x_gTD, assignment, scale_E, dy_gTD)
        scale_gT1 = (weight_gTk * scale_E[expert_gTk]).sum(-1, keepdims=True)
        np.testing.assert_allclose(y_gTD, x_gTD * scale_gT1, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dx_gTD, dy_gTD * scale_gT1, rtol=1e-5, atol=1e-6)
        product_gT1 = (x_gTD * dy_gTD).sum(-1, keepdims=True)
        is_kept_gTk = np.asarray(assignment.is_kept_Tk)
        np.testing.assert_allclose(
            dweight_gTk, is_kept_gTk * scale_E[expert_gTk] * product_gT1, rtol=1e-5, atol=1e-4
        )
        expected_E = np.bincount(
            expert_gTk.ravel(), (weight_gTk * product_gT1).ravel(), minlength=8
        )
        np.testing.assert_allclose(dscale_E, expected_E, rtol=1e-4, atol=1e-4)


def test_buffers_hold_each_row_once_and_no_weight_after_the_counts():
    cfg, x_gTD, assignment = random_assignment(
        "drop", 1, num_groups=4, num_tokens=16, num_experts=4
    )
    num_slots = routing.capacity(cfg, 16)
    seen = {}

    def body(x_gTD, assignment):
        def spy(x_eRD, weight_eR, count_es):
            seen.update(x=x_eRD, weight=weight_eR, count=count_es)
            return x_eRD

        dispatch.by_capacity(x_gTD, assignment, num_slots, spy)
        return seen["x"], seen["weight"], seen["count"]

    logical = (("batch",), routing.Assignment(*[("batch",)] * 6))
    x_ERD, weight_ER, count_Es = fast_jit(
        activation_island(body, mesh_of(1, 2, 1), logical, (("experts",),) * 3)
    )(x_gTD, assignment)
    np.testing.assert_array_equal(
        count_Es, np.asarray(assignment.count_E).T
    )  # two groups from each of two shards, in order
    x_EgCD, weight_EgC = (
        np.asarray(x_ERD).reshape(4, 4, num_slots, 5),
        np.asarray(weight_ER).reshape(4, 4, num_slots),
    )
    for e, g in itertools.product(range(4), range(4)):
        count = int(count_Es[e, g])
        tokens = np.flatnonzero(
            np.asarray(assignment.is_kept_Tk[g, :, 0] & (assignment.expert_Tk[g, :, 0] == e))
        )
        np.testing.assert_array_equal(x_EgCD[e, g, :count], x_gTD[g, tokens])
        np.testing.assert_array_equal(
            weight_EgC[e, g, :count], np.asarray(assignment.weight_Tk)[g, tokens, 0]
        )
        assert not weight_EgC[e, g, count:].any()
    assert (np.asarray(count_Es) < num_slots).any()


# Tiles


@settings(derandomize=True)
@given(num_rows=st.integers(1, 10**6), num_experts=st.integers(1, 512))
def test_a_tile_is_a_power_of_two_that_pads_at_most_as_much_as_there_is(num_rows, num_experts):
    tile = dispatch.tile_size(num_rows, num_experts)
    assert tile & (tile - 1) == 0 and tile >= 8
    # The last tile of each expert may be nearly empty.
    assert num_experts * tile <= max(num_rows, 8 * num_experts)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k"), [(64, 8, 1), (64, 32, 2), (3, 16, 1), (256, 4, 2)]
)
@pytest.mark.parametrize("expert_shards", [1, 4])
def test_dropless_work_is_proportional_to_tokens(num_tokens, num_experts, k, expert_shards):
    num_groups = 4
    _, x_gTD, assignment = random_assignment("dropless", k, num_groups, num_tokens, num_experts)
    shapes = []

    def body(x_gTD, assignment):
        def spy(x_nbD, weight_nb, tile_expert_n, num_tiles):
            shapes.append(x_nbD.shape)
            seen.extend([tile_expert_n, num_tiles[None]])
            return x_nbD

        seen = []
        dispatch.dropless(x_gTD, assignment, num_experts // expert_shards, spy)
        return tuple(seen)

    logical = (("batch",), routing.Assignment(*[("batch",)] * 6))
    fn = activation_island(
        body, mesh_of(1, expert_shards, 1), logical, (("experts",), ("experts",))
    )
    tile_expert_n, num_tiles_s = (
        np.asarray(a).reshape(expert_shards, -1) for a in fast_jit(fn)(x_gTD, assignment)
    )
    num_rows, (n, b, _) = num_groups * num_tokens * k, shapes[-1]
    # Allocated: room for the worst case, all rows on one shard; computed: full tiles plus at most
    # one per expert.
    assert n <= num_rows // b + num_experts // expert_shards
    count_E = np.asarray(assignment.count_E).sum(0)
    assert (
        num_tiles_s[:, 0].tolist() == (-(-count_E // b)).reshape(expert_shards, -1).sum(1).tolist()
    )
    assert num_tiles_s.sum() <= num_rows / b + num_experts
    for shard, tiles_e in enumerate((-(-count_E // b)).reshape(expert_shards, -1)):
        used_n = tile_expert_n[shard, : tiles_e.sum()]
        np.testing.assert_array_equal(used_n, np.repeat(np.arange(len(tiles_e)), tiles_e))


def numpy_tiles(x_nbD, w_eDF, tile_expert_n, num_tiles):
    y_nbF = np.zeros((*x_nbD.shape[:2], w_eDF.shape[2]), np.float32)
    for i in range(num_tiles):
        y_nbF[i] = x_nbD[i] @ w_eDF[tile_expert_n[i]]
    return y_nbF


@fast_jit
def tile_matmul_and_gradients(x_nbD, w_eDF, tile_expert_n, num_tiles, dy_nbF):
    y_nbF, pullback = jax.vjp(
        lambda x, w: experts.tile_matmul(x, w, tile_expert_n, num_tiles), x_nbD, w_eDF
    )
    return y_nbF, *pullback(dy_nbF)


@pytest.mark.parametrize("num_tiles", [0, 1, 4, 6])
def test_tile_matmul_and_its_gradients(num_tiles):
    rng = np.random.default_rng(0)
    x_nbD, w_eDF, dy_nbF = (
        rng.normal(size=shape).astype(np.float32) for shape in ((6, 8, 5), (3, 5, 7), (6, 8, 7))
    )
    tile_expert_n = np.asarray([0, 0, 2, 2, 2, 1], np.int32)
    y_nbF, dx_nbD, dw_eDF = tile_matmul_and_gradients(
        x_nbD, w_eDF, tile_expert_n, num_tiles, dy_nbF
    )
    np.testing.assert_allclose(
        y_nbF, numpy_tiles(x_nbD, w_eDF, tile_expert_n, num_tiles), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        dx_nbD,
        numpy_tiles(dy_nbF, w_eDF.swapaxes(1, 2), tile_expert_n, num_tiles),
        rtol=1e-5,
        atol=1e-5,
    )
    expected_eDF = np.zeros_like(w_eDF)
    for i in range(num_tiles):
        expected_eDF[tile_expert_n[i]] += x_nbD[i].T @ dy_nbF[i]
    np.testing.assert_allclose(dw_eDF, expected_eDF, rtol=1e-5, atol=1e-5)


def test_what_lies_in_unused_tiles_and_experts_does_not_leak():
    rng = np.random.default_rng(0)
    x_nbD, w_eDF, dy_nbF = (
        rng.normal(size=shape).astype(np.float32) for shape in ((6, 8, 5), (3, 5, 7), (6, 8, 7))
    )
    tile_expert_n = np.asarray([0, 0, 2, 2, 1, 1], np.int32)
    clean = tile_matmul_and_gradients(x_nbD, w_eDF, tile_expert_n, 4, dy_nbF)
    x_nbD[4:], dy_nbF[4:], w_eDF[1] = np.nan, np.nan, np.nan
    for dirty, expected in zip(
        tile_matmul_and_gradients(x_nbD, w_eDF, tile_expert_n, 4, dy_nbF), clean, strict=True
    ):
        np.testing.assert_array_equal(dirty, expected)


def test_tiles_and_buffers_agree_on_the_swiglu():
    rng = np.random.default_rng(0)
    x_eRD = rng.normal(size=(3, 16, 5)).astype(np.float32)
    weights = [
        rng.normal(size=shape).astype(np.float32) for shape in ((3, 5, 7), (3, 5, 7), (3, 7, 5))
    ]
    gate_eRF, up_eRF = (np.einsum("eRD,eDF->eRF", x_eRD, w) for w in weights[:2])
    weight_eR = rng.normal(size=(3, 16)).astype(np.float32)
    expected_eRD = weight_eR[..., None] * np.einsum(
        "eRF,eFD->eRD", gate_eRF / (1 + np.exp(-gate_eRF)) * up_eRF, weights[2]
    )
    buffers_eRD = fast_jit(functools.partial(expert_matmul.swiglu, device_kind="cpu"))(
        x_eRD, weight_eR, None, *weights
    )
    tiles = (
        x_eRD.reshape(6, 8, 5),
        weight_eR.reshape(6, 8),
        np.repeat(np.arange(3), 2),
        np.int32(6),
    )
    tiles_nbD = fast_jit(experts.swiglu_tiles)(*tiles, *weights)
    np.testing.assert_allclose(buffers_eRD, expected_eRD, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.asarray(tiles_nbD).reshape(3, 16, 5), expected_eRD, rtol=1e-5, atol=1e-5
    )


# The layer against every expert on every token


def plain_layer(params, x_MD, k):
    """shared(x) + sum over the k best experts of p_e / sum of the k best p * expert_e(x), with all
    experts computed.
    """

    def swiglu(x_MD, w_gate, w_up, w_down):
        return (jax.nn.silu(x_MD @ w_gate) * (x_MD @ w_up)) @ w_down

    probs_ME = jax.nn.softmax(x_MD @ params["router_DE"])
    best_M1 = jnp.sort(probs_ME, axis=-1)[:, -k, None]
    weight_ME = jnp.where(probs_ME >= best_M1, probs_ME, 0)
    if k > 1:
        weight_ME = weight_ME / weight_ME.sum(-1, keepdims=True)
    names = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")
    out_EMD = jax.vmap(swiglu, in_axes=(None, 0, 0, 0))(
        x_MD, *(params["experts"][name] for name in names)
    )
    shared = params.get("shared")
    shared_MD = (
        swiglu(x_MD, *(shared[name] for name in ("w_gate_DF", "w_up_DF", "w_down_FD")))
        if shared
        else 0
    )
    return shared_MD + jnp.einsum("EMD,ME->MD", out_EMD, weight_ME)


@pytest.mark.parametrize(("k", "num_shared"), [(1, 1), (2, 0), (2, 2)])
def test_layer_is_shared_plus_weighted_experts(k, num_shared):
    cfg = small(dispatch="dropless", top_k=k, norm_topk_prob=k > 1, num_shared_experts=num_shared)
    layer = filled(functools.partial(moe.Moe, cfg, single_device_mesh(), jax.random.key(0)))
    graph_def, state = nnx.split(layer)
    params = nnx.to_pure_dict(state)
    assert (
        not num_shared
        or params["shared"]["w_gate_DF"].shape[1] == num_shared * cfg.intermediate_size
    )
    x_BTD, dy_BTD = np.random.default_rng(0).normal(size=(2, 2, 5, 16)).astype(np.float32)

    @fast_jit
    def both(params, x_BTD):
        def ours(params, x_BTD):
            return nnx.merge(graph_def, params)(x_BTD, jnp.ones((2, 5), bool), None)[0]

        def plain(params, x_BTD):
            return plain_layer(params, x_BTD.reshape(10, 16), k).reshape(2, 5, 16)

        outputs = []
        for fn in (ours, plain):
            y_BTD, pullback = jax.vjp(fn, params, x_BTD)
            outputs.append((y_BTD, pullback(jnp.asarray(dy_BTD))))
        return outputs

    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), *both(params, x_BTD))


def test_padding_reaches_only_the_shared_expert_under_a_capacity():
    layer = filled(functools.partial(moe.Moe, SMALL, single_device_mesh(), jax.random.key(0)))
    x_BTD = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    is_valid_BT = np.arange(6) < np.asarray([[6], [2]])
    y_BTD, _ = fast_jit(lambda x, valid: layer(x, valid, jax.random.key(1)))(x_BTD, is_valid_BT)
    shared_BTD = fast_jit(lambda x: layer.shared(x, is_valid_BT, None)[0])(x_BTD)
    routed_BT = np.abs(np.asarray(y_BTD) - np.asarray(shared_BTD)).max(-1) > 1e-6
    np.testing.assert_array_equal(routed_BT, is_valid_BT)


def test_router_stays_float32_in_bfloat16_and_so_does_its_choice():
    cfg = dataclasses.replace(small(dispatch="dropless"), dtype="bfloat16")
    layer = filled(functools.partial(moe.Moe, cfg, single_device_mesh(), jax.random.key(0)))
    x_BTD = jax.random.normal(jax.random.key(1), (2, 6, 16), jnp.bfloat16)
    logits_BTE = moe.router_logits(x_BTD, layer.router_DE[...])
    assert logits_BTE.dtype == jnp.float32
    expected_BTE = np.asarray(x_BTD, np.float64) @ np.asarray(layer.router_DE[...], np.float64)
    np.testing.assert_allclose(logits_BTE, expected_BTE, rtol=1e-5, atol=1e-5)
    y_BTD, stats = fast_jit(lambda x: layer(x, jnp.ones((2, 6), bool), None))(x_BTD)
    assert y_BTD.dtype == jnp.bfloat16 and all(
        figure.dtype == jnp.float32 for figure in stats.values()
    )


# Errors


@pytest.mark.parametrize(
    ("sizes", "group_size", "holds"), [((8, 1, 1), 24, 1), ((2, 2, 2), 48, 2)]
)
def test_a_group_that_would_be_split_over_chips_is_refused_with_sizes(sizes, group_size, holds):
    cfg = small(group_size=group_size)
    layer = filled(functools.partial(moe.Moe, cfg, mesh_of(*sizes), jax.random.key(0)))
    shards = math.prod(sizes[:2])
    expected = (
        rf"group of {group_size} tokens .* each of the {shards} batch shards holds {holds} "
        rf"sequences of 12\. .* divides {holds * 12}"
    )
    with pytest.raises(ValueError, match=expected):
        jax.eval_shape(
            lambda x, valid: layer(x, valid, jax.random.key(0)),
            jnp.zeros((8, 12, 16)),
            jnp.ones((8, 12), bool),
        )


def test_recycling_without_a_key_is_refused():
    layer = filled(functools.partial(moe.Moe, SMALL, single_device_mesh(), jax.random.key(0)))
    with pytest.raises(ValueError, match=r"'recycle'.*needs a key; pass one, or use 'dropless'"):
        layer(jnp.zeros((2, 4, 16)), jnp.ones((2, 4), bool), None)


# Rematerialisation


@functools.cache
def bytes_kept(remat):
    """Bytes of what the forward pass hands to the backward pass, parameters included."""
    cfg = dataclasses.replace(SMALL, remat=remat)
    graph_def, *_ = abstract_model(cfg, single_device_mesh())
    tokens_BT, positions_BT, segments_BT, _ = batch()

    def hidden(params):
        return nnx.merge(graph_def, params)(
            tokens_BT, positions_BT, segments_BT, key=jax.random.key(3)
        ).hidden_BTD

    residuals = jax.eval_shape(
        lambda params: jax.vjp(hidden, params)[1], initial_params(SMALL.intermediate_size)
    )
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))


@pytest.mark.cases(1)
@pytest.mark.heavy
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_number(remat):
    total, stats, grads = train_step_alone(dataclasses.replace(SMALL, remat=remat))
    total_none, stats_none, grads_none = train_step_alone(SMALL)
    # Enough is recycled for the gradients to show it, were the draw another one in the backward
    # pass.
    assert SMALL.moe.dispatch == "recycle" and router_metrics(stats)["recycled_L"].min() > 0.1
    assert_close(total, total_none, 1e-6)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-6), stats, stats_none)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), grads, grads_none)


def test_rematerialisation_keeps_less_for_the_backward_pass():
    params = sum(a.nbytes for a in jax.tree.leaves(initial_params(SMALL.intermediate_size)))
    stream = (
        BATCH * LENGTH * SMALL.hidden_size * 4
    )  # the residual stream: it is all that "full" keeps of a layer
    none, dots, full = (bytes_kept(remat) - params for remat in ("none", "dots", "full"))
    assert full < (SMALL.num_layers + 4) * stream
    # "dots" keeps every product with weights: q, k, v, o, and gate and up of the shared expert.
    width = (
        2 * SMALL.num_heads * SMALL.head_dim
        + SMALL.hidden_size
        + SMALL.num_kv_heads * SMALL.head_dim
        + 2 * SMALL.intermediate_size
    )
    assert full + SMALL.num_layers * BATCH * LENGTH * width * 4 <= dots < 0.7 * none
