"""Decode attention: every implementation against the reference, its own definition against loops,
compilation for TPUs and GPUs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import testing, tpu_compiler
from pallas_kernels.decode_attention import api, cases, reference, splits, tpu, triton

# Empty, one step, inside a block, a whole block, across a block's edge, full; starts at 0, inside
# and behind the first block.
LENGTHS, STARTS = [0, 16, 77, 128, 257, 300], [0, 0, 40, 3, 130, 0]
TPU_CONFIGS = {
    "1 split": tpu.Config(128, 1, 1),
    "2 splits": tpu.Config(128, 1, 2),
    "3 splits": tpu.Config(300, 1, 3),
    "2 pages a block": tpu.Config(128, 2, 2),
    "3 pages a block": tpu.Config(128, 3, 1),
}
TRITON_CONFIGS = [triton.Config(16, 64, num_splits, 4, 3) for num_splits in (1, 2, 5)]

_reference, _xla = jax.jit(reference.reference), jax.jit(reference.xla)


def _inputs(case, lengths=LENGTHS, starts=STARTS):
    seed = testing.fresh_seed()
    print(f"seed {seed}")  # pytest shows it when a test fails
    args = cases.inputs(case, seed, lengths, starts)
    return args, _reference(*args, case.H**-0.5)


def _rows(x_ns, table_Bm):
    """Each row's pages, one after another, by loops."""
    if table_Bm is None:
        return x_ns
    return np.stack([np.concatenate([x_ns[page] for page in row]) for row in table_Bm])


@pytest.mark.parametrize("name", ["draft", "int8", "pages", "pages int8"])
def test_reference_is_what_loops_compute(name):
    case = cases.SMALL[name]
    args, out_BTNH = _inputs(case)
    group, table_Bm = args[7:]
    q_BTNH = np.asarray(args[0].astype(jnp.float32))
    k_BSKH, v_BSKH, k_scale_BSK, v_scale_BSK = (
        None if x_Pns is None else _rows(np.asarray(x_Pns.astype(jnp.float32))[group], table_Bm)
        for x_Pns in (*args[1:3], *args[5:7])
    )
    if case.is_int8:
        k_BSKH, v_BSKH = k_BSKH * k_scale_BSK[..., None], v_BSKH * v_scale_BSK[..., None]
    expected_BTNH = np.zeros(q_BTNH.shape)
    for b, t, n in np.ndindex(*q_BTNH.shape[:3]):
        seen = slice(STARTS[b], LENGTHS[b] - case.T + t + 1)
        if LENGTHS[b]:
            k_SH, v_SH = (
                x[b, seen, n // (case.N // case.K)].astype(np.float64) for x in (k_BSKH, v_BSKH)
            )
            p_S = np.exp(k_SH @ q_BTNH[b, t, n] * case.H**-0.5)
            expected_BTNH[b, t, n] = p_S @ v_SH / p_S.sum()
    testing.assert_close(out_BTNH, expected_BTNH, case.dtype)


@pytest.mark.parametrize("name", cases.SMALL)
def test_xla_is_the_reference(name):
    case = cases.SMALL[name]
    args, expected_BTNH = _inputs(case)
    testing.assert_close(_xla(*args, case.H**-0.5), expected_BTNH, case.dtype)


# The interpreter is slow: not all cases with all configs.
@pytest.mark.parametrize(
    ("name", "config_name"),
    [
        *(("draft", config_name) for config_name in ("1 split", "2 splits", "3 splits")),
        *(("pages", config_name) for config_name in TPU_CONFIGS if config_name != "3 splits"),
        ("pages int8", "2 pages a block"),
        ("one", "2 splits"),
        ("most", "2 splits"),
        ("float32", "1 split"),
        ("int8", "2 splits"),
        ("int8 float32", "1 split"),
    ],
)
def test_tpu_is_the_reference_without_races(name, config_name):
    case = cases.SMALL[name]
    args, expected_BTNH = _inputs(case)
    with testing.interpreted_tpu() as interpret:
        out_BTNH = jax.block_until_ready(
            tpu.run(*args, case.H**-0.5, cfg=TPU_CONFIGS[config_name], interpret=interpret)
        )
    testing.assert_close(out_BTNH, expected_BTNH, case.dtype)
    assert not out_BTNH[0].any()


@pytest.mark.parametrize(
    ("name", "num_splits"),
    [
        *((name, 2) for name in cases.SMALL),
        ("draft", 1),
        *((name, 5) for name in ("draft", "int8", "pages")),
    ],
)
def test_triton_is_the_reference(name, num_splits):
    case = cases.SMALL[name]
    (cfg,) = (cfg for cfg in TRITON_CONFIGS if cfg.num_splits == num_splits)
    args, expected_BTNH = _inputs(case)
    out_BTNH = triton.run(*args, case.H**-0.5, cfg=cfg, interpret=True)
    testing.assert_close(out_BTNH, expected_BTNH, case.dtype)
    assert not out_BTNH[0].any()


def test_any_lengths_and_starts():
    case = cases.SMALL["float32"]
    rng = np.random.default_rng()
    lengths = rng.integers(case.T, case.S + 1, case.B)
    print(f"lengths {lengths}")
    args, expected_BTNH = _inputs(case, lengths, rng.integers(0, lengths - case.T + 1))
    testing.assert_close(_xla(*args, case.H**-0.5), expected_BTNH, "float32")
    testing.assert_close(
        triton.run(*args, case.H**-0.5, cfg=TRITON_CONFIGS[1], interpret=True),
        expected_BTNH,
        "float32",
    )
    with testing.interpreted_tpu() as interpret:
        out_BTNH = jax.block_until_ready(
            tpu.run(*args, case.H**-0.5, cfg=TPU_CONFIGS["2 splits"], interpret=interpret)
        )
    testing.assert_close(out_BTNH, expected_BTNH, "float32")


@pytest.mark.parametrize("num_splits", [1, 2, 7])
def test_splits_share_all_visible_blocks(num_splits):
    for start, length in [(0, 0), (0, 1), (0, 640), (70, 600), (63, 65), (600, 640)]:
        blocks = []
        for split in range(num_splits):
            first, end = (
                int(x)
                for x in splits.blocks_of_split(
                    split, jnp.int32(start), jnp.int32(length), 64, num_splits
                )
            )
            blocks += range(first, end)
            assert end - first <= -(-10 // num_splits)  # what the TPU's grid has room for
        assert blocks == list(range(start // 64, -(-length // 64)))


def test_api_serves_every_device_and_passes_all_on():
    case = cases.SMALL["draft"]
    args, _ = _inputs(case)
    q_BTNH, k_BSKH, v_BSKH, length_B, start_B = args[:5]
    expected_BTNH = reference.reference(*args, 0.3)
    call = functools.partial(
        api.decode_attention, q_BTNH, k_BSKH, v_BSKH, length_B, start_B=start_B, scale=0.3
    )
    testing.assert_close(call(device_kind="cpu"), expected_BTNH, case.dtype)
    testing.assert_close(
        call(device_kind="cpu", implementation="reference"), expected_BTNH, case.dtype
    )
    testing.assert_close(
        call(device_kind="NVIDIA H200", interpret=True), expected_BTNH, case.dtype
    )
    with testing.interpreted_tpu() as interpret:
        testing.assert_close(
            jax.block_until_ready(call(device_kind="TPU v5", interpret=interpret)),
            expected_BTNH,
            case.dtype,
        )


def test_api_defaults_are_the_whole_cache_and_the_head_dims_root():
    case = cases.SMALL["int8"]
    args, expected_BTNH = _inputs(case, starts=[0] * case.B)
    out_BTNH = api.decode_attention(
        *args[:4], device_kind="cpu", k_scale_BSK=args[5], v_scale_BSK=args[6]
    )
    testing.assert_close(out_BTNH, expected_BTNH, case.dtype)


@pytest.mark.parametrize(
    ("device_kind", "is_kernel"),
    [
        ("cpu", False),
        ("TPU v5", True),
        ("TPU v6 lite", True),
        ("NVIDIA H200", True),
        ("AMD", False),
    ],
)
def test_the_device_chooses(device_kind, is_kernel):
    shapes = cases.SMALL["one"].shapes()[:4]
    jaxpr = jax.make_jaxpr(functools.partial(api.decode_attention, device_kind=device_kind))(
        *shapes
    )
    assert ("pallas_call" in str(jaxpr)) == is_kernel


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_BTNH": (2, 1, 8)}, r"must be \[B, T, N, H\].*reshape"),
        ({"v_BSKH": (2, 32, 2, 24)}, r"must be \[B, T, N, H\].*reshape"),
        ({"q_BTNH": (3, 1, 8, 16)}, "agree in batch and head dim; slice"),
        ({"q_BTNH": (2, 1, 7, 16)}, "7 query heads cannot share 2 kv heads.*multiple of K"),
        (
            {
                "q_BTNH": (2, 1, 8, 12),
                "k_BSKH": (2, 32, 2, 12),
                "v_BSKH": (2, 32, 2, 12),
                "implementation": "pallas_tpu",
                "device_kind": "TPU v5",
            },
            "needs a head dim that is a multiple of 8, not 12; pad",
        ),
        ({"q_BTNH": (2, 17, 8, 16)}, "17 query tokens for 32 slots.*1 to 16.*flash_attention"),
        ({"q_BTNH": "float16"}, "q is float16, must be bfloat16 or float32; cast"),
        (
            {"k_BSKH": "float32"},
            "cache is float32 and bfloat16, must be bfloat16 as q or int8; cast",
        ),
        ({"length_B": (3,)}, r"length_B is int32\[3\], must be int32\[2\]"),
        ({"start_B": "float32"}, r"start_B is float32\[2\], must be int32\[2\]"),
        ({"k_scale_BSK": (2, 32, 2)}, "k_scale_BSK is given with a cache of bfloat16; pass"),
        (
            {"k_BSKH": "int8", "v_BSKH": "int8"},
            "k_scale_BSK is missing with a cache of int8; pass",
        ),
        (
            {"k_BSKH": "int8", "v_BSKH": "int8", "k_scale_BSK": (2, 32)},
            r"k_scale_BSK is float32\[2, 32\], must be float32\[2, 32, 2\]",
        ),
        ({"implementation": "pallas_gpu"}, "no implementation 'pallas_gpu'; it has pallas_tpu"),
        (
            {"implementation": "pallas_tpu"},
            "on 'cpu': pallas_tpu: needs a device of the family TPU",
        ),
        (
            {"implementation": ["pallas_triton", "pallas_tpu"]},
            "pallas_triton: needs.*pallas_tpu: needs",
        ),
    ],
)
def test_bad_arguments_are_explained(change, message):
    shapes = {
        "q_BTNH": (2, 1, 8, 16),
        "k_BSKH": (2, 32, 2, 16),
        "v_BSKH": (2, 32, 2, 16),
        "length_B": (2,),
        "start_B": (2,),
    }
    dtypes = {"length_B": "int32", "start_B": "int32", "k_scale_BSK": "float32"}
    shapes |= {name: value for name, value in change.items() if isinstance(value, tuple)}
    dtypes |= {name: value for name, value in change.items() if isinstance(value, str)}
    kwargs = {
        name: jnp.zeros(shape, dtypes.get(name, "bfloat16")) for name, shape in shapes.items()
    }
    with pytest.raises(ValueError, match=message):
        api.decode_attention(
            **kwargs,
            device_kind=change.get("device_kind", "cpu"),
            implementation=change.get("implementation"),
        )


def _call(device_kind, q_BTNH, k_BSKH, v_BSKH, length_B, start_B, k_scale_BSK, v_scale_BSK):
    scales = {"k_scale_BSK": k_scale_BSK, "v_scale_BSK": v_scale_BSK}
    return api.decode_attention(
        q_BTNH, k_BSKH, v_BSKH, length_B, start_B=start_B, device_kind=device_kind, **scales
    )


_KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}


_SLOW = [
    pytest.param(chip, "T=1 int8", marks=pytest.mark.slow) for chip in ("v5e", "v5p", "tpu7x")
]
_SLOW += [pytest.param("v5p", "T=16", marks=pytest.mark.slow)]


@pytest.mark.parametrize(
    ("chip", "name"), [*((chip, "T=1") for chip in _KINDS), ("v6e", "T=1 int8"), *_SLOW]
)
def test_compiles_for_a_tpu_without_copying_the_cache(chip, name):
    pytest.importorskip("libtpu")
    tpu_compiler.prepare()
    compiled = tpu_compiler.compile_for(
        chip, functools.partial(_call, _KINDS[chip]), *cases.BENCH[name].shapes()
    )
    assert 'custom_call_target="tpu_custom_call"' in compiled.as_text()
    assert (
        compiled.memory_analysis().argument_size_in_bytes < 1.01 * cases.BENCH[name].cache_bytes()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * cases.BENCH[name].cache_bytes()


@pytest.mark.parametrize("name", ["one", "most", "float32", "int8 float32"])
def test_small_sizes_compile_for_a_tpu(name):
    pytest.importorskip("libtpu")
    tpu_compiler.prepare()
    tpu_compiler.compile_for(
        "v5p", functools.partial(_call, "TPU v5"), *cases.SMALL[name].shapes()
    )


def test_a_head_dim_of_128_is_not_copied_if_stored_slots_last():
    pytest.importorskip("libtpu")
    tpu_compiler.prepare()
    shapes = cases.BENCH["T=1 H=128"].shapes()
    B, S, K, H = shapes[1].shape

    def call(q_BTNH, k_BKHS, v_BKHS, *rest):
        return _call(
            "TPU v5", q_BTNH, *(x_BKHS.transpose(0, 3, 1, 2) for x_BKHS in (k_BKHS, v_BKHS)), *rest
        )

    compiled = tpu_compiler.compile_for(
        "v5p", call, shapes[0], *[jax.ShapeDtypeStruct((B, K, H, S), "bfloat16")] * 2, *shapes[3:]
    )
    assert (
        compiled.memory_analysis().temp_size_in_bytes
        < 0.1 * cases.BENCH["T=1 H=128"].cache_bytes()
    )


@pytest.mark.slow
def test_the_most_scores_in_float32_fit():
    pytest.importorskip("libtpu")
    tpu_compiler.prepare()
    tpu_compiler.compile_for(
        "v5p",
        functools.partial(_call, "TPU v5"),
        *cases.BENCH["T=16"]._replace(dtype="float32").shapes(),
    )


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", [*cases.BENCH, *cases.SMALL])
def test_lowers_for_a_gpu(name):
    case = cases.BENCH.get(name) or cases.SMALL[name]
    assert "triton" in testing.lower_for_gpu(
        functools.partial(_call, "NVIDIA H200"), *case.shapes()
    )


def test_configs_fit_the_chip():
    draft, full = cases.BENCH["T=4"], cases.BENCH["T=16"]
    by_chip = {
        kind: tpu.config(kind, *(x.shape for x in draft.shapes()[:2]), "bfloat16")
        for kind in ("TPU v4", "TPU v5", "TPU v6 lite")
    }
    assert by_chip == {
        "TPU v4": tpu.Config(1024, 2),
        "TPU v5": tpu.Config(2048, 2),
        "TPU v6 lite": tpu.Config(2048, 1),
    }
    assert tpu.config(
        "TPU v6 lite", *(x.shape for x in full.shapes()[:2]), "bfloat16"
    ) == tpu.Config(2048, 1)
    assert tpu.config(
        "TPU v6 lite", *(x.shape for x in full.shapes()[:2]), "float32"
    ) == tpu.Config(1024, 1)
    assert triton.config(*(x.shape for x in draft.shapes()[:2])).num_splits == 17
    assert triton.config((1, 1, 8, 64), (1, 128, 8, 64)).num_splits == 1
