"""Parameter, FLOP and cache counts against the published figures, the real modules and the traced
matmuls.
"""

import dataclasses
import functools
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from hunyuan_jax import presets
from hunyuan_jax.config import ModelConfig, MoeConfig
from hunyuan_jax.model.count import Counts, count
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel.mesh import single_device_mesh

PARTS = ("embedding", "head", "attention", "mlp", "experts", "shared", "router", "norms")
SMALL = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=20,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=32,
    cla_share_factor=2,
    moe=MoeConfig(num_experts=4, num_shared_experts=1),
)


def module_sizes(cfg):
    """path -> number of parameters of the real module, without allocating it."""
    state = jax.eval_shape(
        lambda key: nnx.state(Transformer(cfg, single_device_mesh(), key)), jax.random.key(0)
    )
    return {
        "/".join(map(str, path)): math.prod(leaf.shape) for path, leaf in nnx.to_flat_state(state)
    }


def part_of(path):
    """The part of Counts that a parameter belongs to, decided by its name."""
    owners = {
        "embed/": "embedding",
        "lm_head/": "head",
        "/experts/": "experts",
        "/shared/": "shared",
        "/router_DE": "router",
        "/bias_E": "router",
        "/mlp/": "mlp",
    }
    return next(
        (part for piece, part in owners.items() if piece in path),
        "norms" if "norm" in path else "attention",
    )


@pytest.mark.parametrize(
    ("preset", "total", "active", "kv_bytes"),
    [
        ("a52b_instruct", 388_701_405_440, 51_322_077_440, 81_920),
        ("a52b", 388_698_128_640, 51_318_800_640, 81_920),
        ("a13b", 80_393_183_232, 12_747_448_320, 131_072),
        ("hy3", 295_033_543_488, 20_675_730_240, 327_680),
        ("hy_mt2_30b", 30_064_719_872 + 6_016, 3_451_860_992 + 6_016, 98_304),
        # By hand: V D + L (D H (2 N + 2 K) + 3 D F + 2 D + 2 H) + D, the embedding being the head
        # too.
        ("dense_0_5b", 539_010_048, 539_010_048, 98_304),
        ("dense_1_8b", 1_791_080_448, 1_791_080_448, 65_536),
        ("dense_4b", 4_221_757_440, 4_221_757_440, 147_456),
        ("dense_7b", 7_504_568_320, 7_504_568_320, 131_072),
    ],
)
def test_released_models_have_the_published_counts(preset, total, active, kv_bytes):
    counts = count(getattr(presets, preset)())
    assert (counts.total, counts.active, counts.kv_bytes_per_token) == (total, active, kv_bytes)


def test_parts_of_the_instruct_model():
    # Specification section 1, checked there on the official module.
    counts = count(presets.a52b_instruct())
    assert {name: getattr(counts, name) for name in PARTS} == {
        "embedding": 825_753_600,
        "head": 0,
        "attention": 5_505_024_000,
        "mlp": 0,
        "experts": 359_871_283_200,
        "shared": 22_491_955_200,
        "router": 6_553_600,
        "norms": 835_840,
    }
    untied = count(dataclasses.replace(presets.a52b_instruct(), tie_embeddings=False))
    assert (untied.total, untied.active, untied.head) == (
        389_527_159_040,
        52_147_831_040,
        825_753_600,
    )
    assert untied.flops_per_token == counts.flops_per_token


@pytest.mark.parametrize(
    "preset",
    [
        "a52b_instruct",
        "a52b",
        "a13b",
        "dense_0_5b",
        "dense_1_8b",
        "dense_4b",
        "dense_7b",
        "hy3",
        "hy_mt2_30b",
        "tiny",
        "bench",
        "bench_hy3",
    ],
)
def test_presets_have_as_many_parameters_as_their_modules(preset):
    cfg = getattr(presets, preset)()
    counts = count(cfg)
    assert sum(module_sizes(cfg).values()) == counts.total + counts.mtp


configs = st.builds(
    lambda groups, share, kv, heads_per_kv, moe, **kwargs: ModelConfig(
        num_layers=groups * share,
        cla_share_factor=share,
        num_kv_heads=kv,
        num_heads=kv * heads_per_kv,
        moe=moe,
        max_position=8,
        **kwargs,
    ),
    groups=st.integers(1, 3),
    share=st.sampled_from([1, 2, 4]),
    kv=st.integers(1, 3),
    heads_per_kv=st.integers(1, 3),
    moe=st.one_of(
        st.just(MoeConfig()),
        st.integers(2, 5).flatmap(
            lambda num_experts: st.builds(
                MoeConfig,
                num_experts=st.just(num_experts),
                top_k=st.integers(1, num_experts),
                num_shared_experts=st.integers(0, 2),
            )
        ),
    ),
    vocab_size=st.integers(3, 17),
    hidden_size=st.integers(1, 13),
    intermediate_size=st.integers(1, 11),
    head_dim=st.sampled_from([4, 6]),
    use_qk_norm=st.booleans(),
    attention_bias=st.booleans(),
    tie_embeddings=st.booleans(),
)


@settings(max_examples=30, derandomize=True)
@given(cfg=configs)
def test_every_part_is_the_size_of_its_parameters(cfg):
    counts = count(cfg)
    sizes = module_sizes(cfg)
    by_part = {
        name: sum(size for path, size in sizes.items() if part_of(path) == name) for name in PARTS
    }
    assert by_part == {name: getattr(counts, name) for name in PARTS}
    assert counts.total == sum(sizes.values())
    served = cfg.moe.top_k / cfg.moe.num_experts
    assert counts.active == pytest.approx(counts.total - (1 - served) * counts.experts, abs=0.5)


def dot_flops(jaxpr):
    """2 * multiplications of every dot_general, a scan's body counted as often as it runs."""
    flops = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            flops += (
                2
                * math.prod(eqn.outvars[0].aval.shape)
                * math.prod(eqn.invars[0].aval.shape[dim] for dim in contract)
            )
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        flops += times * sum(dot_flops(sub) for sub in jaxprs_in_params(eqn.params))
    return flops


@pytest.mark.parametrize(
    "changes",
    [
        {"moe": MoeConfig()},
        {
            "moe": MoeConfig(),
            "tie_embeddings": False,
            "cla_share_factor": 1,
            "attention_bias": True,
        },
        {"moe": MoeConfig(num_experts=4, num_shared_experts=1, dispatch="drop")},
        {"moe": MoeConfig(num_experts=4, top_k=2, dispatch="drop")},
    ],
    ids=["dense", "dense untied", "moe", "top-2"],
)
def test_flops_are_those_of_the_traced_matmuls(changes):
    cfg = dataclasses.replace(SMALL, **changes)
    B, T = 2, 16
    model = nnx.eval_shape(
        functools.partial(Transformer, cfg, single_device_mesh()), jax.random.key(0)
    )
    graph_def, state = nnx.split(model)

    def forward(state, tokens_BT):
        model = nnx.merge(graph_def, state)
        return model.logits(model(tokens_BT, tokens_BT, jnp.ones_like(tokens_BT)).hidden_BTD)

    traced = dot_flops(
        jax.make_jaxpr(forward)(state, jax.ShapeDtypeStruct((B, T), jnp.int32)).jaxpr
    )
    # This attention computes the whole T x T square: a query's mean cost is that of a causal one
    # in a sequence of 2 T - 1.
    assert 3 * traced == count(cfg, seq_len=2 * T - 1).flops_per_token * B * T


def test_flops_grow_with_the_sequence_by_the_attention_term():
    cfg = presets.a52b()
    short, long = (count(cfg, seq_len=n).flops_per_token for n in (4096, 32_768))
    assert long - short == 6 * 64 * 6400 * (32_768 - 4096)
    assert (
        short == 6 * 51_317_964_800 + 6 * 64 * 6400 * 4097
    )  # active parameters without the 835,840 norm scales


def test_cache_bytes_follow_sharing_heads_and_dtype():
    assert count(SMALL).kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert (
        count(dataclasses.replace(SMALL, cla_share_factor=1)).kv_bytes_per_token
        == 2 * count(SMALL).kv_bytes_per_token
    )
    assert (
        count(dataclasses.replace(SMALL, cla_share_factor=4)).kv_bytes_per_token * 2
        == count(SMALL).kv_bytes_per_token
    )
    assert (
        count(dataclasses.replace(SMALL, dtype="bfloat16")).kv_bytes_per_token * 2
        == count(SMALL).kv_bytes_per_token
    )
    assert (
        count(dataclasses.replace(SMALL, num_kv_heads=4)).kv_bytes_per_token
        == 2 * count(SMALL).kv_bytes_per_token
    )


def test_counting_loads_no_jax():
    code = (
        "import sys, hunyuan_jax.model.count; assert 'jax' not in sys.modules and 'flax' not in "
        "sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_counts_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        count(SMALL).total = 1
    assert [field.name for field in dataclasses.fields(Counts)][2:-3] == list(PARTS)


def test_counting_imports_no_jax():
    code = "import sys, hunyuan_jax.model.count; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
