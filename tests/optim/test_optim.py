"""Learning-rate schedules, parameter groups and AdamW against numbers made elsewhere."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hunyuan_jax.config import OptimizerConfig, ScheduleConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.optim.build import build_optimizer
from hunyuan_jax.optim.groups import assign_groups, default_groups
from hunyuan_jax.optim.schedule import build_schedule
from support.adamw import CFG, SETTINGS, nest, numpy_adamw, on_device
from support.specs import specs_like

LAYER = {
    "attn_norm/scale_D": "norms_and_biases",
    "mlp_norm/scale_D": "norms_and_biases",
    "attn/wq_DNH": "matrices",
    "attn/wo_NHD": "matrices",
    "attn/q_norm_H": "norms_and_biases",
    "attn/k_norm_H": "norms_and_biases",
    "attn/bq_NH": "norms_and_biases",
    "attn/bo_D": "norms_and_biases",
}
PRODUCER = {
    "attn/wk_DKH": "matrices",
    "attn/wv_DKH": "matrices",
    "attn/bk_KH": "norms_and_biases",
    "attn/bv_KH": "norms_and_biases",
}
MLP = {"mlp/w_gate_DF": "matrices", "mlp/w_up_DF": "matrices", "mlp/w_down_FD": "matrices"}
MOE = {
    "moe/router_DE": "router",
    "moe/shared/w_gate_DF": "matrices",
    "moe/shared/w_up_DF": "matrices",
    "moe/shared/w_down_FD": "matrices",
    "moe/experts/w_gate_EDF": "experts",
    "moe/experts/w_up_EDF": "experts",
    "moe/experts/w_down_EFD": "experts",
}
ENDS = {
    "embed/embedding_VD": "embedding",
    "final_norm/scale_D": "norms_and_biases",
    "lm_head/w_DV": "matrices",
}


def model_groups(feed_forward):
    """path -> expected group of a model of CLA pairs."""
    layers = {
        "groups/layer_0/": LAYER | PRODUCER | feed_forward,
        "groups/layer_1/": LAYER | feed_forward,
    }
    return ENDS | {
        prefix + path: name for prefix, layer in layers.items() for path, name in layer.items()
    }


def values(cfg, num_steps, steps):
    schedule = build_schedule(cfg, num_steps)
    return np.array([schedule(step) for step in steps])


# The HF trainer's own numbers: 10 steps at 4e-3 -> 4e-4, and the first, second and last line of
# the README's log of 100 steps.
HF_LR = [
    0.0,
    0.004,
    0.003891446717414635,
    0.00357887999761416,
    0.0031000000000000003,
    0.002512566719800475,
]
HF_LR += [
    0.0018874332801995255,
    0.0013000000000000006,
    0.0008211200023858398,
    0.0005085532825853651,
]


def test_cosine_with_min_lr_is_the_official_one():
    cfg = ScheduleConfig(name="cosine_with_min_lr", peak_lr=4e-3, min_lr=4e-4, warmup_steps=1)
    np.testing.assert_allclose(values(cfg, 10, range(10)), HF_LR, rtol=0, atol=2e-7 * 4e-3)
    demo = dataclasses.replace(cfg, peak_lr=5e-6, min_lr=6e-7)
    np.testing.assert_allclose(
        values(demo, 100, [1, 2, 100, 150]), [5e-6, 4.998892393243008e-06, 6e-7, 6e-7], rtol=1e-6
    )
    long_warmup = dataclasses.replace(cfg, warmup_steps=4)
    np.testing.assert_allclose(
        values(long_warmup, 4, range(5)), [0.0, 1e-3, 2e-3, 3e-3, 4e-3], rtol=1e-6
    )


def test_three_phase_values_at_the_boundaries():
    cfg = ScheduleConfig(
        peak_lr=1.0, warmup_steps=100, decay_ratio=0.4, anneal_fraction=0.1, anneal_ratio=0.2
    )
    steps = [0, 49, 99, 299, 499, 899, 949, 999, 2000]
    quarter = 0.4 + 0.6 * 0.5 * (1 + math.cos(math.pi / 4))
    np.testing.assert_allclose(
        values(cfg, 1000, steps), [0.01, 0.5, 1.0, quarter, 0.7, 0.4, 0.3, 0.2, 0.2], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("warmup", "fraction", "num_steps"),
    [(0, 0.05, 200), (1, 0.0, 200), (20, 0.25, 80), (60, 0.5, 100), (40, 1.0, 100)],
)
def test_three_phase_is_continuous_and_never_rises_after_warmup(warmup, fraction, num_steps):
    cfg = ScheduleConfig(peak_lr=1.0, warmup_steps=warmup, anneal_fraction=fraction)
    lr = values(cfg, num_steps, range(num_steps))
    changes = np.diff(lr)
    # No phase of these runs moves by more than 1/20 a step; the phases' levels lie 0.2 or more
    # apart.
    assert np.abs(changes).max() < 0.051
    assert np.all(changes[: max(warmup - 1, 0)] > 0)
    assert np.all(changes[max(warmup - 1, 0) :] < 1e-6)
    assert lr[max(warmup - 1, 0)] == 1.0
    assert lr[-1] == pytest.approx(cfg.anneal_ratio if fraction else cfg.decay_ratio, rel=1e-6)


def test_three_phase_of_short_runs():
    cfg = ScheduleConfig(peak_lr=1.0, warmup_steps=0)
    np.testing.assert_array_equal(values(cfg, 1, [0]), [1.0])
    np.testing.assert_allclose(
        values(cfg, 2, [0, 1]), [1.0, 0.1], rtol=1e-6
    )  # the ramp takes at least one step
    np.testing.assert_allclose(values(cfg, 3, [0, 1, 2]), [1.0, 0.3, 0.1], rtol=1e-6)
    all_warmup = dataclasses.replace(cfg, warmup_steps=4)
    np.testing.assert_allclose(values(all_warmup, 4, range(4)), [0.25, 0.5, 0.75, 1.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["three_phase", "cosine_with_min_lr"])
def test_schedule_jits_to_float32_under_strict_promotion(name):
    schedule = build_schedule(ScheduleConfig(name=name, warmup_steps=3), 10)
    with jax.numpy_dtype_promotion("strict"):
        lr = jax.jit(jax.vmap(schedule))(jnp.arange(10))
    assert lr.dtype == jnp.float32 and schedule(0).shape == ()
    np.testing.assert_allclose(lr, [schedule(step) for step in range(10)], rtol=1e-6)


@pytest.mark.parametrize(("feed_forward", "is_moe"), [(MOE, True), (MLP, False)])
def test_every_parameter_has_the_expected_group(feed_forward, is_moe):
    expected = model_groups(feed_forward)
    groups = default_groups(OptimizerConfig(), is_moe=is_moe)
    assert assign_groups(specs_like(nest(expected)), groups) == nest(expected)
    # Every role is in one group.
    roles = [role for group in groups for role in group.roles]
    assert len(roles) == len(set(roles))


def test_group_or_parameter_left_over_is_an_error():
    dense = specs_like(nest(dict.fromkeys(model_groups(MLP), 0)))
    moe = specs_like(nest(dict.fromkeys(model_groups(MOE), 0)))
    cfg = OptimizerConfig()
    with pytest.raises(
        ConfigError,
        match=r"'experts' \(role expert\) has none of the 29 parameters, for example "
        r"embed/embedding_VD",
    ):
        assign_groups(dense, default_groups(cfg, is_moe=True))
    with pytest.raises(
        ConfigError,
        match=r"groups/layer_0/moe/experts/w_down_EFD has the role expert, which is in no "
        r"optimizer group; the groups are norms_and_biases \(norm and bias\)",
    ):
        build_optimizer(cfg, optax.constant_schedule(1.0), moe, is_moe=False)
    no_matrices = tuple(g for g in default_groups(cfg, is_moe=False) if g.name != "matrices")
    with pytest.raises(ConfigError, match=r"attn/w\w+ has the role matrix, which is in no"):
        assign_groups(dense, no_matrices)


def random_tree(rng, scale=1.0, shape=(2, 8)):
    return {path: (scale * rng.standard_normal(shape)).astype(np.float32) for path in SETTINGS}


def run_optimizer(cfg, schedule, params, grads_per_step):
    """The flat parameters after one update per tree of gradients, through the jitted production
    chain.
    """
    optimizer = build_optimizer(cfg, schedule, specs_like(nest(params)), is_moe=True)

    tree = on_device(params)
    with jax.numpy_dtype_promotion("strict"):
        state, step = optimizer.init(tree), jax.jit(optimizer.step)
        for grads in grads_per_step:
            tree, state, grad_norm = step(on_device(grads), state, tree)
            np.testing.assert_allclose(
                grad_norm, np.sqrt(sum(np.sum(np.square(g)) for g in grads.values())), rtol=1e-6
            )
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def test_updates_equal_a_numpy_adamw_with_groups_and_clip():
    rng = np.random.default_rng(0)
    params = random_tree(rng)
    grads = [
        random_tree(rng, scale) for scale in (3.0, 0.01, 0.5, 0.002, 0.03)
    ]  # norms of 36 down to 0.02: clipped and not
    schedule = build_schedule(ScheduleConfig(peak_lr=0.1, warmup_steps=2), 5)
    expected = numpy_adamw(CFG, [float(schedule(step)) for step in range(5)], params, grads)
    got = run_optimizer(CFG, schedule, params, grads)
    for path in SETTINGS:
        # float32 against float64 over five steps of size up to 0.1.
        np.testing.assert_allclose(got[path], expected[path], rtol=0, atol=2e-6, err_msg=path)


def test_decay_is_the_only_change_without_gradients():
    ones = {path: np.ones((2, 3), np.float32) for path in SETTINGS}
    zeros = {path: np.zeros((2, 3), np.float32) for path in SETTINGS}
    got = run_optimizer(CFG, optax.constant_schedule(0.5), ones, [zeros])
    decayed = {
        "lm_head/w_DV": 0.95,
        "groups/layer_0/attn/wq_DNH": 0.95,
        "groups/layer_0/moe/router_DE": 0.95,
        "groups/layer_0/moe/shared/w_up_DF": 0.95,
        "groups/layer_0/moe/experts/w_up_EDF": 0.9875,
    }
    for path in SETTINGS:
        np.testing.assert_allclose(
            got[path], np.full((2, 3), decayed.get(path, 1.0)), rtol=1e-6, err_msg=path
        )


def test_expert_ratio_scales_the_experts_update_and_no_other():
    rng = np.random.default_rng(1)
    grads = on_device(random_tree(rng))
    params = jax.tree.map(
        jnp.zeros_like, grads
    )  # what they are after a step is the update itself, without rounding

    def first_update(ratio):
        cfg = dataclasses.replace(CFG, expert_lr_ratio=ratio)
        optimizer = build_optimizer(
            cfg, optax.constant_schedule(0.01), specs_like(params), is_moe=True
        )
        return optimizer.step(grads, optimizer.init(params), params)[0]

    full, quarter = first_update(1.0), first_update(0.25)
    full["groups"]["layer_0"]["moe"]["experts"]["w_up_EDF"] *= (
        0.25  # a power of two: the equality is exact
    )
    jax.tree.map(np.testing.assert_array_equal, quarter, full)


def test_state_is_arrays_that_mirror_the_parameters():
    shapes = nest({path: jax.ShapeDtypeStruct((2, 8), jnp.float32) for path in SETTINGS})
    optimizer = build_optimizer(
        CFG, optax.constant_schedule(0.01), specs_like(shapes), is_moe=True
    )
    state = jax.eval_shape(optimizer.init, shapes)
    assert optax.tree.get(state, "mu") == shapes and optax.tree.get(state, "nu") == shapes
    counts = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == ()]
    assert [leaf.dtype for leaf in counts] == [jnp.int32] * 2
    assert len(jax.tree.leaves(state)) == 2 * len(SETTINGS) + len(counts)


def test_sharded_parameters_keep_their_sharding_and_values():
    # Explicit axes over every device there is (one is enough to trace the sharding checks).
    num_devices = jax.device_count()
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    rng = np.random.default_rng(2)
    flat = {name: random_tree(rng, shape=(2, 8 * num_devices)) for name in ("params", "grads")}
    params, grads = (on_device(tree) for tree in flat.values())
    optimizer = build_optimizer(
        CFG, optax.constant_schedule(0.01), specs_like(params), is_moe=True
    )
    expected = jax.jit(optimizer.step)(grads, optimizer.init(params), params)[0]
    with jax.set_mesh(mesh):
        sharded_params, sharded_grads = jax.device_put((params, grads), sharding)
        new_params, state, _ = jax.jit(optimizer.step)(
            sharded_grads, jax.jit(optimizer.init)(sharded_params), sharded_params
        )
    for leaf in jax.tree.leaves(
        (new_params, optax.tree.get(state, "mu"), optax.tree.get(state, "nu"))
    ):
        assert leaf.sharding == sharding
    # The norm is summed in another order.
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5), new_params, expected
    )
