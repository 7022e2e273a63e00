"""Weight inheritance: what a student is of the larger model that it is cut out of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hunyuan_jax.config import DistillConfig, MoeConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.layers import rope
from hunyuan_jax.layers.protocols import Sequence
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.model.stack import run_group
from hunyuan_jax.post.inherit import inherit, kept_layers, require_fits, scores
from support.larger import DENSE, MIXTURE, logits_of, mesh, params_of, positions, tokens
from support.models import fast_jit


def cut(params, theirs, ours, importance=None, **fields):
    specs = [abstract_model(cfg, mesh())[1] for cfg in (theirs, ours)]
    run = fast_jit(
        lambda params, importance: inherit(
            params, scores(importance, specs[0]), *specs, DistillConfig(**fields)
        )
    )
    found = run(params, params if importance is None else importance)
    jax.tree.map(lambda a, spec: a.shape == spec.shape or pytest.fail(f"{spec}"), found, specs[1])
    return found


def test_a_student_of_the_same_shape_is_the_model():
    params = params_of(MIXTURE)
    found = cut(params, MIXTURE, MIXTURE)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_a_student_of_whole_groups_runs_those_of_the_model():
    params, student = params_of(DENSE), dataclasses.replace(DENSE, num_layers=4)
    graph_def = abstract_model(DENSE, mesh())[0]

    @fast_jit
    def run(params, groups):
        model = nnx.merge(graph_def, params)
        sequence = Sequence(rope.cos_sin(positions(), DENSE), jnp.ones_like(positions()))
        x_BTD = model.embed(tokens(), DENSE.dtype)
        definition, stack = nnx.split(model.groups)
        for group in groups:
            layers = nnx.merge(definition, jax.tree.map(lambda a, g=group: a[g], stack)).layers()
            x_BTD, _, _ = run_group(layers, x_BTD, sequence, None, group, None, False)
        return model.logits(model.final_norm(x_BTD))

    for fields, groups in (
        ({"inherit": "first"}, [0, 1]),
        ({"inherit": "magnitude"}, [0, 2]),
        ({"groups": (1, 2)}, [1, 2]),
    ):
        found = logits_of(student)(cut(params, DENSE, student, **fields))
        layers = [2 * group + place for group in groups for place in (0, 1)]
        assert kept_layers(DENSE, student, DistillConfig(**fields), {}).tolist() == layers
        expected = run(params, [jnp.asarray(group) for group in groups])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_largest_heads_and_columns_are_kept():
    """What is small is zero here, so the student says what the model says."""
    params, rng = jax.tree.map(np.asarray, params_of(DENSE)), np.random.default_rng(0)
    student = dataclasses.replace(DENSE, num_heads=4, num_kv_heads=2, intermediate_size=5)

    def without(array, axis, kept_P):
        keep = np.zeros((array.shape[0], array.shape[axis]))
        for group, kept in enumerate(kept_P):
            keep[group, kept] = 1
        shape = [n if i in (0, axis) else 1 for i, n in enumerate(array.shape)]
        return array * keep.reshape(shape).astype(np.float32)

    kv = [rng.permutation(4)[:2] for _ in range(3)]
    heads = [np.concatenate([2 * pair, 2 * pair + 1]) for pair in kv]
    for layer in params["groups"].values():
        columns = [rng.permutation(12)[:5] for _ in range(3)]
        for name, axis, kept in (
            ("wq_DNH", 2, heads),
            ("wo_NHD", 1, heads),
            ("wk_DKH", 2, kv),
            ("wv_DKH", 2, kv),
        ):
            if name in layer["attn"]:
                layer["attn"][name] = without(layer["attn"][name], axis, kept)
        for name, axis in (("w_gate_DF", 2), ("w_up_DF", 2), ("w_down_FD", 1)):
            layer["mlp"][name] = without(layer["mlp"][name], axis, columns)
    expected = logits_of(DENSE)(params)
    found = logits_of(student)(cut(params, DENSE, student))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    # Whatever the weights are, if something else says what matters.
    zeros = jax.tree.map(np.zeros_like, params)
    for layer in zeros["groups"].values():
        layer["mlp"]["w_up_DF"][:, :, 2:7] = 1
    found = cut(params, DENSE, student, importance=zeros)
    np.testing.assert_array_equal(
        found["groups"]["layer_1"]["mlp"]["w_down_FD"],
        params["groups"]["layer_1"]["mlp"]["w_down_FD"][:, 2:7],
    )


def scaled(array, axis, index):
    array = np.array(array)
    np.moveaxis(array, axis, 0)[index] *= 10
    return array


def test_queries_of_each_head_experts_and_the_stream_are_cut_alike_everywhere():
    params = params_of(MIXTURE)
    student = dataclasses.replace(
        MIXTURE,
        hidden_size=10,
        num_heads=4,  # one query head of each K/V head
        moe=dataclasses.replace(MIXTURE.moe, num_experts=2, intermediate_size=7),
    )
    stream, experts = np.array([0, 2, 3, 5, 6, 7, 9, 11, 12, 15]), np.array([1, 3])
    for layer in params["groups"].values():
        layer["attn"]["wq_DNH"] = scaled(layer["attn"]["wq_DNH"], 2, np.arange(1, 8, 2))
        for name, array in layer["moe"]["experts"].items():
            layer["moe"]["experts"][name] = scaled(array, 1, experts)
    params = jax.tree.map(
        lambda a, spec: scaled(a, spec.dims.index("embed"), stream) if "embed" in spec.dims else a,
        params,
        abstract_model(MIXTURE, mesh())[1],
    )
    found = cut(params, MIXTURE, student)
    np.testing.assert_array_equal(
        found["embed"]["embedding_VD"], params["embed"]["embedding_VD"][:, stream]
    )
    np.testing.assert_array_equal(
        found["final_norm"]["scale_D"], params["final_norm"]["scale_D"][stream]
    )
    for place, layer in params["groups"].items():
        ours, moe = found["groups"][place], layer["moe"]
        np.testing.assert_array_equal(
            ours["attn"]["wq_DNH"], layer["attn"]["wq_DNH"][:, stream][:, :, 1::2]
        )
        np.testing.assert_array_equal(
            ours["moe"]["router_DE"], moe["router_DE"][:, stream][..., experts]
        )
        np.testing.assert_array_equal(ours["moe"]["bias_E"], moe["bias_E"][:, experts])


def test_layers_of_several_stacks_are_counted_from_the_bottom():
    theirs = dataclasses.replace(MIXTURE, cla_share_factor=1, num_layers=5, num_dense_layers=2)
    ours = dataclasses.replace(theirs, num_layers=4)
    units = {"groups": {"groups": np.array([0.1, 0.3, 0.2])}}
    assert kept_layers(theirs, ours, DistillConfig(), units).tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({"hidden_size": 32}, {}, r"config.model.hidden_size = 32 is above the 16 of NAME = 'M'"),
        ({"num_layers": 8}, {}, r"num_layers = 8 is above the 6"),
        ({"num_kv_heads": 2}, {}, r"num_heads / num_kv_heads = 4 is above the 2"),
        ({"rms_norm_eps": 1e-6}, {}, r"NAME = 'M' holds a model with rms_norm_eps = 1e-05"),
        ({"moe": MoeConfig()}, {}, r"NAME = 'M' holds a model with moe.num_experts = 4"),
        ({"num_layers": 4}, {"groups": (0,)}, r"groups = \(0,\) must name 2 of the 3 groups"),
        ({"num_layers": 2}, {"groups": (3,)}, r"groups = \(3,\) must name 1 of the 3 groups"),
    ],
)
def test_a_student_that_cannot_be_cut_out_is_refused(changes, fields, message):
    ours = dataclasses.replace(MIXTURE, **changes)
    with pytest.raises(ConfigError, match=message):
        require_fits("M", MIXTURE, ours, DistillConfig(**fields), "NAME")
