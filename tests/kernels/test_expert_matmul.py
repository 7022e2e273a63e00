"""Expert matmuls: every implementation against the float32 reference, the TPU's in Pallas'
interpreter.

Letters as in pallas_kernels/expert_matmul/api.py.
"""

import dataclasses
import functools
import importlib.util
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chips, testing, tpu_compiler
from pallas_kernels.expert_matmul import Quantized, api, cases, reference, swiglu, tpu, xla
from pallas_kernels.expert_matmul import quantized as rows
from support.models import fast_jit

BY_NAME = {case.name: case for case in cases.SMALL}
SEED = testing.fresh_seed()
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install '.[tpu]'",
)


@pytest.fixture(params=[False], ids=[""])
def small_blocks(monkeypatch, request):
    """Blocks so small that every case has several in each dim; the parameter is `whole_blocks`."""
    small = tpu.Config(
        whole_blocks=request.param,
        group_rows=64,
        block_rows=(128, 64),
        block_cols=(128, 128),
        contraction_part=96,
        gradient_rows=128,
        gradient_in=128,
        gradient_out=128,
    )
    monkeypatch.setitem(tpu.CONFIGS, "v5p", small)


def gradients_of(case, seed, **options):
    """Output and all gradients of one implementation; the incoming gradient holds NaN where rows
    hold no data, as x does.
    """
    print(f"seed {seed}")  # pytest shows it when a test fails
    arrays = case.arrays(seed)
    count_es = arrays.pop("count_es")
    dy = np.random.default_rng(seed + 1).standard_normal(arrays["x_eCD"].shape)
    is_valid_eC = rows.is_valid(count_es, arrays["x_eCD"].shape[:2])
    dy_eCD = jnp.where(is_valid_eC[..., None], jnp.asarray(dy, case.dtype), jnp.nan)

    return output_and_gradients(
        arrays, count_es, dy_eCD, tuple(options.items()), tpu.CONFIGS["v5p"]
    )


@functools.partial(fast_jit, static_argnums=(3, 4))
def output_and_gradients(arrays, count_es, dy_eCD, options, blocks):
    del blocks  # those of `tpu.CONFIGS`, with which the program changes
    y_eCD, pullback = jax.vjp(
        lambda arrays: swiglu(count_es=count_es, **arrays, **dict(options)), arrays
    )
    return {"y_eCD": y_eCD, **pullback(dy_eCD)[0]}


@functools.cache
def expected(case, seed):
    return gradients_of(case, seed, device_kind="cpu", implementation="reference")


@pytest.mark.cases(3)
@pytest.mark.parametrize("case", cases.SMALL, ids=lambda case: case.name)
def test_xla(case):
    actual = gradients_of(case, SEED, device_kind="cpu")
    # Sums over F of products of rounded numbers cancel: the weight's gradient may be off by two
    # roundings of a bfloat16.
    actual.pop("row_weight_eC") if case.dtype == "bfloat16" else None
    testing.assert_close(actual, {name: expected(case, SEED)[name] for name in actual}, case.dtype)


@pytest.mark.parametrize(
    ("name", "small_blocks"),
    [
        pytest.param("odd", False, marks=pytest.mark.slow),
        pytest.param("many_blocks", False, marks=pytest.mark.slow),
        pytest.param("many_blocks", True, marks=pytest.mark.slow),
        ("dense_odd", False),
    ],
    indirect=["small_blocks"],
)
@pytest.mark.heavy
def test_tpu(name, small_blocks):
    case = BY_NAME[name]
    cases_of_one_shape = [case]
    if case.fill == "random":
        cases_of_one_shape.append(dataclasses.replace(case, fill=0.0))  # no expert has a row
    for same in cases_of_one_shape:
        with testing.interpreted_tpu() as interpret:
            actual = gradients_of(
                same, SEED, device_kind="TPU v5", implementation="pallas_tpu", interpret=interpret
            )
        testing.assert_close(actual, expected(same, SEED), case.dtype)


@pytest.mark.parametrize("name", [pytest.param("half", marks=pytest.mark.slow), "float32"])
def test_tpu_with_the_blocks_of_real_chips(name):
    case = BY_NAME[name]
    with testing.interpreted_tpu() as interpret:
        actual = gradients_of(
            case, SEED, device_kind="TPU v6 lite", implementation="pallas_tpu", interpret=interpret
        )
    testing.assert_close(actual, expected(case, SEED), case.dtype)


@pytest.mark.parametrize("small_blocks", [False, True], indirect=True)
def test_rows_are_served_wherever_they_lie_and_the_others_are_not_touched(small_blocks):
    # The rows in use, and what comes out for them, do not depend on what lies between them, nor on
    # where their source block starts.
    case = dataclasses.replace(BY_NAME["half"], D=64, F=128)
    arrays = case.arrays(SEED)
    count_es = jnp.asarray([[5, 0, 64, 33]], jnp.int32)
    with testing.interpreted_tpu() as interpret:
        options = {"device_kind": "TPU v5", "implementation": "pallas_tpu", "interpret": interpret}
        weights = {name: a for name, a in arrays.items() if name.startswith("w_")}
        x_eCD = jnp.where(
            rows.is_valid(count_es, (1, case.C))[..., None],
            jnp.nan_to_num(arrays["x_eCD"]),
            jnp.nan,
        )
        run = fast_jit(functools.partial(swiglu, **options))
        apart_eCD = run(x_eCD, arrays["row_weight_eC"], count_es, **weights)
        used = np.flatnonzero(rows.is_valid(count_es, (1, case.C))[0])
        together_eCD = run(x_eCD[:, used], arrays["row_weight_eC"][:, used], None, **weights)
    np.testing.assert_array_equal(apart_eCD[:, used], together_eCD)
    unused = np.setdiff1d(np.arange(case.C), used)
    np.testing.assert_array_equal(apart_eCD[:, unused], 0.0)


@pytest.mark.parametrize("fill", ["none", 1.0])
def test_the_weight_gradient_in_several_parts_of_its_inputs(fill):
    # 768 inputs are three trips of the loop over parts of 256; without counts they are written,
    # with counts added up.
    case = cases.Case("wide", e=1, sources=2, rows_per_source=32, D=768, F=128, fill=fill)
    rng = np.random.default_rng()
    x_eCI, dy_eCO = (
        jnp.asarray(rng.standard_normal((1, case.C, width)), jnp.bfloat16)
        for width in (case.D, case.F)
    )
    with testing.interpreted_tpu() as interpret:
        run = functools.partial(
            tpu.weight_gradient, dtype=jnp.float32, device_kind="TPU v5", interpret=interpret
        )
        dw_eIO = fast_jit(run)(x_eCI, dy_eCO, case.counts())
    testing.assert_close(
        dw_eIO[0],
        np.asarray(x_eCI[0], np.float32).T @ np.asarray(dy_eCO[0], np.float32),
        "float32",
    )


@pytest.mark.parametrize(
    ("small_blocks", "num_rows"), [(False, {64}), (True, {64, 128})], indirect=["small_blocks"]
)
def test_a_whole_block_may_be_one_product(small_blocks, num_rows):
    x_eCI, w_eIO, count_es = (
        jnp.zeros((1, 256, 64)),
        jnp.zeros((1, 64, 128)),
        jnp.zeros((1, 2), jnp.int32),
    )
    text = str(
        jax.make_jaxpr(functools.partial(tpu.matmul, device_kind="TPU v5"))(x_eCI, w_eIO, count_es)
    )
    assert {int(rows) for rows in re.findall(r"f32\[(\d+),128\] = dot_general", text)} == num_rows


@pytest.mark.parametrize("count", [0, 1, 32, 33, 64, 128])
def test_the_work_is_that_of_the_granules_in_use(count):
    listed = tpu._Granules(jnp.full((2, 4), count, jnp.int32), 2, 512, 256)
    per_block = -(-count // 32) * 2
    np.testing.assert_array_equal(listed.num, [per_block] * 4)
    starts = [
        block * 128 + granule * 32 for block in range(2) for granule in range(-(-count // 32))
    ]
    for block_offsets in np.asarray(listed.offset).reshape(4, 8):
        np.testing.assert_array_equal(block_offsets[:per_block], starts)
        assert (block_offsets < 256).all()
    np.testing.assert_array_equal(listed.is_full, [count == 128] * 4)


def test_an_empty_block_fetches_nothing_new():
    listed = tpu._Granules(jnp.asarray([[0, 0], [64, 0], [0, 0], [0, 3]], jnp.int32), 4, 128, 64)
    np.testing.assert_array_equal(listed.num, [0, 0, 2, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(listed.source, [2, 2, 2, 2, 2, 2, 2, 7])


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    ("dtype", "groups"), [("int8", 1), ("int8", 4), ("int4", 2), ("float8_e4m3fn", 1)]
)
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_quantised_weights(dtype, groups, implementation, small_blocks):
    case = dataclasses.replace(BY_NAME["one_block"], sources=2, D=128, F=256)
    arrays = case.arrays(0)
    rng = np.random.default_rng(1)
    for name in ("w_gate_eDF", "w_up_eDF", "w_down_eFD"):
        e, num_in, num_out = arrays[name].shape
        values = jnp.asarray(rng.integers(-7, 8, (e, num_in, num_out)), jnp.float32).astype(dtype)
        scale = jnp.asarray(
            rng.uniform(0.5, 2.0, (e, groups, num_out)) * num_in**-0.5 / 4, jnp.float32
        )
        arrays[name] = Quantized(values, scale)
        # The definition, independent of `dequantized`: every row times the scale of its group.
        plain = np.asarray(values, np.float32) * np.repeat(scale, num_in // groups, axis=1)
        np.testing.assert_allclose(rows.dequantized(arrays[name], jnp.float32), plain, rtol=1e-6)
    want = swiglu(**arrays, device_kind="cpu", implementation="reference")
    with testing.interpreted_tpu() as interpret:
        options = (
            {"device_kind": "cpu"}
            if implementation == "xla"
            else {"device_kind": "TPU v5", "interpret": interpret}
        )
        got = swiglu(**arrays, implementation=implementation, **options)
    testing.assert_close(got, want, case.dtype)


def test_the_reference_is_swiglu_as_written():
    case = BY_NAME["dense_odd"]
    arrays = {
        name: np.asarray(a, np.float64) for name, a in case.arrays(0).items() if a is not None
    }
    gate, up = (arrays["x_eCD"][0] @ arrays[name][0] for name in ("w_gate_eDF", "w_up_eDF"))
    plain = (arrays["row_weight_eC"][0][:, None] * gate / (1 + np.exp(-gate)) * up) @ arrays[
        "w_down_eFD"
    ][0]
    y_eCD = swiglu(**case.arrays(0), device_kind="cpu", implementation="reference")
    assert testing.relative_error(y_eCD[0], plain) < 1e-6


@pytest.mark.parametrize("module", [reference, xla, tpu])
def test_every_implementation_has_the_same_operations(module):
    assert all(
        callable(getattr(module, name))
        for name in (
            "refuse",
            "gate_up",
            "matmul",
            "gated_gradient",
            "input_gradient",
            "weight_gradient",
        )
    )


# What is refused


def test_a_named_implementation_that_cannot_says_why():
    arrays = BY_NAME["one_block"].arrays(0)
    with pytest.raises(ValueError, match=r"pallas_tpu: needs a device of the family TPU"):
        swiglu(**arrays, device_kind="cpu", implementation="pallas_tpu")
    with pytest.raises(ValueError, match=r"no implementation 'palas'.*reference"):
        swiglu(**arrays, device_kind="cpu", implementation="palas")
    with pytest.raises(ValueError, match=r"pallas_tpu: needs .*; pallas_gpu: needs "):
        swiglu(**arrays, device_kind="cpu", implementation=["pallas_tpu", "pallas_gpu"])


def test_a_list_takes_the_first_that_can_and_none_always_finds_one():
    what = ((1, 256, 256), (1, 256, 512), jnp.dtype("bfloat16"), False)
    pick = functools.partial(api.choose, "expert_matmul", api._CANDIDATES)
    assert pick(["pallas_tpu", "reference", "xla"], "cpu", *what).name == "reference"
    chosen = {
        kind: pick(None, kind, *what).name
        for kind in ("cpu", "TPU v5", "TPU v5 lite", "NVIDIA H200", "NVIDIA A100", "")
    }
    assert chosen == {
        "cpu": "xla",
        "TPU v5": "pallas_tpu",
        "TPU v5 lite": "pallas_tpu",
        "NVIDIA H200": "pallas_gpu",
        "NVIDIA A100": "xla",
        "": "xla",
    }


def test_a_contraction_beyond_the_vector_memory_is_refused():
    assert "does not fit the vector memory" in tpu.refuse(
        "TPU v5", (1, 128, 2**20), (1, 2**20, 128), jnp.bfloat16, False
    )
    assert tpu.refuse("TPU v5", (1, 4096, 6400), (1, 6400, 18304), jnp.bfloat16, False) is None
    assert "float16" in tpu.refuse("TPU v5", (1, 128, 128), (1, 128, 128), jnp.float16, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"w_up_eDF": jnp.zeros((1, 128, 255), jnp.bfloat16)},
            r"w_up has shape \(1, 128, 255\).*must be \(1, 128, 256\)",
        ),
        (
            {"w_gate_eDF": jnp.zeros((1, 128, 256), jnp.float32)},
            "w_gate is float32 and x is bfloat16; cast",
        ),
        ({"row_weight_eC": jnp.zeros((1, 127))}, r"row_weight has shape \(1, 127\).*\(1, 128\)"),
        (
            {"count_es": jnp.zeros((1, 5), jnp.int32)},
            r"count has shape \(1, 5\).*divide the 128 rows",
        ),
        (
            {"w_up_eDF": Quantized(jnp.zeros((1, 128, 256), jnp.int8), jnp.zeros((1, 1, 256)))},
            "quantise all three, or none",
        ),
    ],
)
def test_what_does_not_fit_together(change, message):
    with pytest.raises(ValueError, match=message):
        swiglu(**BY_NAME["one_block"].arrays(0) | change, device_kind="cpu")


# The real compilers


def loss_gradients(chip, arrays, count_es):
    def loss(arrays):
        return (
            swiglu(
                count_es=count_es,
                **arrays,
                device_kind=chips.CHIPS[chip].device_kinds[0],
                implementation="pallas_tpu",
            )
            .astype(jnp.float32)
            .sum()
        )

    return jax.grad(loss)(arrays)


# Each chip and each case once; with `-m slow` all pairs.
_COMPILED = [("v5e", "odd"), ("v5p", "float32"), ("v6e", "dense"), ("tpu7x", "odd")]


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "name"),
    [
        *_COMPILED,
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in itertools.product(
                ("v5e", "v5p", "v6e", "tpu7x"), ("odd", "float32", "dense")
            )
            if pair not in _COMPILED
        ),
    ],
)
def test_compiles_for_tpus(chip, name):
    tpu_compiler.prepare()
    shapes = BY_NAME[name].shapes()
    count_es = shapes.pop("count_es")
    text = tpu_compiler.compile_for(
        chip, functools.partial(loss_gradients, chip), shapes, count_es
    ).as_text()
    # gate_up, down's two gradients, two parts of dx, two more weight gradients; the forward down
    # product is not needed.
    assert text.count('custom_call_target="tpu_custom_call"') == 7


@needs_libtpu
@pytest.mark.parametrize("dtype", ["int8", "int4", "float8_e4m3fn"])
def test_quantised_weights_compile_for_tpus(dtype):
    tpu_compiler.prepare()
    S = jax.ShapeDtypeStruct

    def quantised(num_in, num_out):
        return Quantized(S((2, num_in, num_out), dtype), S((2, 2, num_out), jnp.float32))

    args = (
        S((2, 64, 256), jnp.bfloat16),
        S((2, 4), jnp.int32),
        quantised(256, 512),
        quantised(256, 512),
        quantised(512, 256),
    )
    compiled = tpu_compiler.compile_for(
        "v6e",
        lambda x, count, *w: swiglu(
            x, None, count, *w, device_kind="TPU v6 lite", implementation="pallas_tpu"
        ),
        *args,
    )
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.slow  # about half a minute each: the blocks are large
@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_the_real_size_compiles_for_tpus(chip):
    tpu_compiler.prepare()
    shapes = cases.A52B.shapes()
    count_es = shapes.pop("count_es")
    compiled = tpu_compiler.compile_for(
        chip, functools.partial(loss_gradients, chip), shapes, count_es
    )
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 7
