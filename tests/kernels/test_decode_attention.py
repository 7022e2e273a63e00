"""Decode attention: every implementation against the reference, its own definition against loops,
compilation for TPUs and GPUs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import testing, tpu_compiler
from pallas_kernels.decode_attention import (
    api,
    append,
    bench,
    cases,
    reference,
    splits,
    tpu,
    triton,
)

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


def _jitted(function, *args, **options):
    """function(*args, **options) as one program; operation by operation it would be a hundred."""
    return jax.jit(functools.partial(function, **options))(*args)


def _inputs(case, lengths=LENGTHS, starts=STARTS):
    seed = testing.fresh_seed()
    print(f"seed {seed}")  # pytest shows it when a test fails
    args = cases.inputs(case, seed, lengths, starts)
    return args, _comparable(_reference(*args, case.H**-0.5))


def _comparable(found):
    """(out, log-sum-exp) with a number in the place of -inf."""
    out_BTNH, lse_BTN = jax.block_until_ready(found)
    return out_BTNH, jnp.maximum(lse_BTN, -100)


def _rows(x_ns, table_Bm):
    """Each row's pages, one after another, by loops."""
    if table_Bm is None:
        return x_ns
    return np.stack([np.concatenate([x_ns[page] for page in row]) for row in table_Bm])


@pytest.mark.parametrize("name", ["draft", "int8", "pages", "pages int8"])
def test_reference_is_what_loops_compute(name):
    case = cases.SMALL[name]
    args, (out_BTNH, lse_BTN) = _inputs(case)
    group, table_Bm = args[7:]
    q_BTNH = np.asarray(args[0].astype(jnp.float32))
    k_BSKH, v_BSKH, k_scale_BSK, v_scale_BSK = (
        None if x_Pns is None else _rows(np.asarray(x_Pns.astype(jnp.float32))[group], table_Bm)
        for x_Pns in (*args[1:3], *args[5:7])
    )
    if case.is_int8:
        k_BSKH, v_BSKH = k_BSKH * k_scale_BSK[..., None], v_BSKH * v_scale_BSK[..., None]
    expected_BTNH, expected_BTN = np.zeros(q_BTNH.shape), np.full(q_BTNH.shape[:3], -100.0)
    for b, t, n in np.ndindex(*q_BTNH.shape[:3]):
        seen = slice(STARTS[b], LENGTHS[b] - case.T + t + 1)
        if LENGTHS[b]:
            k_SH, v_SH = (
                x[b, seen, n // (case.N // case.K)].astype(np.float64) for x in (k_BSKH, v_BSKH)
            )
            p_S = np.exp(k_SH @ q_BTNH[b, t, n] * case.H**-0.5)
            expected_BTNH[b, t, n] = p_S @ v_SH / p_S.sum()
            expected_BTN[b, t, n] = np.log(p_S.sum())
    testing.assert_close((out_BTNH, lse_BTN), (expected_BTNH, expected_BTN), case.dtype)


@pytest.mark.parametrize("name", cases.SMALL)
def test_xla_is_the_reference(name):
    case = cases.SMALL[name]
    args, expected = _inputs(case)
    testing.assert_close(_comparable(_xla(*args, case.H**-0.5)), expected, case.dtype)


# The interpreter is slow: not all cases with all configs.
@pytest.mark.cases(5)
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
    args, expected = _inputs(case)
    with testing.interpreted_tpu() as interpret:
        options = {"scale": case.H**-0.5, "cfg": TPU_CONFIGS[config_name], "interpret": interpret}
        found = _comparable(_jitted(tpu.run, *args, **options))
    testing.assert_close(found, expected, case.dtype)
    assert not found[0][0].any()


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    ("name", "num_splits"),
    [
        *((name, 2) for name in cases.SMALL),
        ("draft", 1),
        *((name, 5) for name in ("draft", "int8", "pages int8")),
    ],
)
def test_triton_is_the_reference(name, num_splits):
    case = cases.SMALL[name]
    (cfg,) = (cfg for cfg in TRITON_CONFIGS if cfg.num_splits == num_splits)
    args, expected = _inputs(case)
    found = _comparable(_jitted(triton.run, *args, scale=case.H**-0.5, cfg=cfg, interpret=True))
    testing.assert_close(found, expected, case.dtype)
    assert not found[0][0].any()


def test_any_lengths_and_starts():
    case = cases.SMALL["float32"]
    rng = np.random.default_rng()
    lengths = rng.integers(case.T, case.S + 1, case.B)
    print(f"lengths {lengths}")
    args, expected = _inputs(case, lengths, rng.integers(0, lengths - case.T + 1))
    testing.assert_close(_comparable(_xla(*args, case.H**-0.5)), expected, "float32")
    options = {"scale": case.H**-0.5, "cfg": TRITON_CONFIGS[1], "interpret": True}
    found = _jitted(triton.run, *args, **options)
    testing.assert_close(_comparable(found), expected, "float32")
    with testing.interpreted_tpu() as interpret:
        options |= {"cfg": TPU_CONFIGS["2 splits"], "interpret": interpret}
        found = _comparable(_jitted(tpu.run, *args, **options))
    testing.assert_close(found, expected, "float32")


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


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["draft", "pages"])
def test_api_serves_every_device_and_passes_all_on(name):
    case = cases.SMALL[name]
    args, _ = _inputs(case)
    expected = _comparable(_reference(*args, 0.3))

    def call(kind, *args, **options):
        ours = functools.partial(bench.ours, kind)
        return _jitted(ours, *args, scale=0.3, with_lse=True, **options)

    for kind, options in (
        ("cpu", {}),
        ("cpu", {"implementation": "reference"}),
        ("NVIDIA H200", {"interpret": True}),
    ):
        testing.assert_close(_comparable(call(kind, *args, **options)), expected, case.dtype)
    with testing.interpreted_tpu() as interpret:
        found = _comparable(call("TPU v5", *args, interpret=interpret))
    testing.assert_close(found, expected, case.dtype)


def test_api_defaults_are_the_whole_cache_and_the_head_dims_root():
    case = cases.SMALL["int8"]
    args, (expected_BTNH, _) = _inputs(case, starts=[0] * case.B)
    out_BTNH = api.decode_attention(
        *args[:4], group=0, device_kind="cpu", k_scale_PnsK=args[5], v_scale_PnsK=args[6]
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
    shapes = cases.SMALL["one"].shapes()
    jaxpr = jax.make_jaxpr(functools.partial(bench.ours, device_kind))(*shapes)
    assert ("pallas_call" in str(jaxpr)) == is_kernel


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_BTNH": (2, 1, 8)}, r"must be \[B, T, N, H\].*reshape"),
        ({"v_PnsKH": (1, 2, 32, 2, 24)}, r"must be \[B, T, N, H\].*reshape"),
        ({"q_BTNH": (2, 1, 8, 24)}, "agree in head dim; slice"),
        ({"q_BTNH": (3, 1, 8, 16)}, "2 pages for 3 rows: without a table.*pass table_Bm"),
        ({"table_Bm": (3, 4)}, r"table_Bm is int32\[3, 4\], must be int32\[2, pages of a row\]"),
        ({"q_BTNH": (2, 1, 7, 16)}, "7 query heads cannot share 2 kv heads.*multiple of K"),
        (
            {
                "q_BTNH": (2, 1, 8, 12),
                "k_PnsKH": (1, 2, 32, 2, 12),
                "v_PnsKH": (1, 2, 32, 2, 12),
                "implementation": "pallas_tpu",
                "device_kind": "TPU v5",
            },
            "needs a head dim that is a multiple of 8, not 12; pad",
        ),
        (
            {"table_Bm": (2, 4), "implementation": "pallas_tpu", "device_kind": "TPU v5"},
            "needs pages whose slots are a multiple of 128, not 32",
        ),
        (
            {
                "k_PnsKH": (1, 2, 128, 2, 16),
                "v_PnsKH": (1, 2, 128, 2, 16),
                "table_Bm": (2, 2**17),
                "implementation": "pallas_tpu",
                "device_kind": "TPU v5",
            },
            "needs a table of at most 131072 entries, not 262144; larger pages",
        ),
        (
            {
                "k_PnsKH": (1, 2, 24, 2, 16),
                "v_PnsKH": (1, 2, 24, 2, 16),
                "table_Bm": (2, 4),
                "implementation": "pallas_triton",
                "device_kind": "NVIDIA H200",
            },
            "needs pages whose slots are a multiple of 16, not 24",
        ),
        ({"q_BTNH": (2, 17, 8, 16)}, "17 query tokens for 32 slots.*1 to 16.*flash_attention"),
        ({"q_BTNH": "float16"}, "q is float16, must be bfloat16 or float32; cast"),
        (
            {"k_PnsKH": "float32"},
            "cache is float32 and bfloat16, must be bfloat16 as q, int8 or float8_e4m3fn; cast",
        ),
        ({"length_B": (3,)}, r"length_B is int32\[3\], must be int32\[2\]"),
        ({"start_B": "float32"}, r"start_B is float32\[2\], must be int32\[2\]"),
        (
            {"k_scale_PnsK": (1, 2, 32, 2)},
            "k_scale_PnsK is given with a cache of bfloat16; pass",
        ),
        (
            {"k_PnsKH": "int8", "v_PnsKH": "int8"},
            "k_scale_PnsK is missing with a cache of int8; pass",
        ),
        (
            {"k_PnsKH": "int8", "v_PnsKH": "int8", "k_scale_PnsK": (2, 32)},
            r"k_scale_PnsK is float32\[2, 32\], must be float32\[1, 2, 32, 2\]",
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
        "k_PnsKH": (1, 2, 32, 2, 16),
        "v_PnsKH": (1, 2, 32, 2, 16),
        "length_B": (2,),
        "start_B": (2,),
    }
    dtypes = dict.fromkeys(("length_B", "start_B", "table_Bm"), "int32")
    dtypes["k_scale_PnsK"] = "float32"
    shapes |= {name: value for name, value in change.items() if isinstance(value, tuple)}
    dtypes |= {
        name: value
        for name, value in change.items()
        if isinstance(value, str) and name not in ("device_kind", "implementation")
    }
    kwargs = {
        name: jax.ShapeDtypeStruct(shape, dtypes.get(name, "bfloat16"))
        for name, shape in shapes.items()
    }
    options = {
        "device_kind": change.get("device_kind", "cpu"),
        "implementation": change.get("implementation"),
    }
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(api.decode_attention, group=0, **options), **kwargs)


_KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}


_SLOW = [
    pytest.param(chip, "T=1 int8", marks=pytest.mark.slow) for chip in ("v5e", "v5p", "tpu7x")
]
_SLOW += [pytest.param("v5p", "T=16", marks=pytest.mark.slow)]
_SLOW += [
    pytest.param(chip, name, marks=pytest.mark.slow)
    for chip in _KINDS
    for name in ("T=4 pages", "T=1 int8 pages")
]


@pytest.mark.parametrize(
    ("chip", "name"), [*((chip, "T=1") for chip in _KINDS), ("v6e", "T=1 int8"), *_SLOW]
)
def test_compiles_for_a_tpu_without_copying_the_cache(chip, name):
    pytest.importorskip("libtpu")
    tpu_compiler.prepare()
    compiled = tpu_compiler.compile_for(
        chip, functools.partial(bench.ours, _KINDS[chip]), *cases.BENCH[name].shapes()
    )
    assert 'custom_call_target="tpu_custom_call"' in compiled.as_text()
    assert (
        compiled.memory_analysis().argument_size_in_bytes
        < 1.01 * cases.BENCH[name].cache_bytes() * cases.BENCH[name].P
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * cases.BENCH[name].cache_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "most",
        "int8 float32",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("one", "float32")),
    ],
)
def test_small_sizes_compile_for_a_tpu(name):
    pytest.importorskip("libtpu")
    tpu_compiler.prepare()
    tpu_compiler.compile_for(
        "v5p", functools.partial(bench.ours, "TPU v5"), *cases.SMALL[name].shapes()
    )


def test_a_head_dim_of_128_is_not_copied_if_stored_slots_last():
    pytest.importorskip("libtpu")
    tpu_compiler.prepare()
    q, cache, _, *rest = cases.BENCH["T=1 H=128"].shapes()
    P, n, s, K, H = cache.shape

    def call(q_BTNH, k_PnKHs, v_PnKHs, *rest):
        caches = (x_PnKHs.transpose(0, 1, 4, 2, 3) for x_PnKHs in (k_PnKHs, v_PnKHs))
        return bench.ours("TPU v5", q_BTNH, *caches, *rest)

    stored = jax.ShapeDtypeStruct((P, n, K, H, s), "bfloat16")
    compiled = tpu_compiler.compile_for("v5p", call, q, stored, stored, *rest)
    assert (
        compiled.memory_analysis().temp_size_in_bytes
        < 0.1 * cases.BENCH["T=1 H=128"].cache_bytes()
    )


@pytest.mark.parametrize(
    "chip", [pytest.param(chip, marks=[pytest.mark.slow] * (chip != "v6e")) for chip in _KINDS]
)
def test_a_scan_over_groups_neither_copies_the_pages_nor_writes_them_elsewhere(chip):
    pytest.importorskip("libtpu")
    tpu_compiler.prepare()
    case = cases.BENCH["T=1 pages"]._replace(S=1024, P=8)
    q, cache, _, int_B, *_, table = case.shapes()
    new = jax.ShapeDtypeStruct((case.B, case.T, case.K, case.H), case.dtype)

    def step(q_BTNH, k_PnsKH, v_PnsKH, new_BTKH, length_B, table_Bm):
        def one_group(carry, group):
            caches, x_BTNH = carry
            options = {"group": group, "table_Bm": table_Bm, "device_kind": _KINDS[chip]}
            # The new entries depend on the groups before, as in a model.
            new_k_BTKH = new_BTKH + x_BTNH[:, :, : case.K]
            caches = append.append(
                caches, (new_k_BTKH, new_BTKH), slot_B=length_B - case.T, **options
            )
            for _ in range(2):
                x_BTNH += api.decode_attention(x_BTNH, *caches, length_B, **options)
            return (caches, x_BTNH), None

        return jax.lax.scan(one_group, ((k_PnsKH, v_PnsKH), q_BTNH), jnp.arange(case.P))[0]

    compiled = tpu_compiler.compile_for(chip, step, q, cache, cache, new, int_B, table)
    # Not donated here: the results are one copy, and the loop makes no other.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * case.cache_bytes() * case.P


@pytest.mark.slow
def test_the_most_scores_in_float32_fit():
    pytest.importorskip("libtpu")
    tpu_compiler.prepare()
    tpu_compiler.compile_for(
        "v5p",
        functools.partial(bench.ours, "TPU v5"),
        *cases.BENCH["T=16"]._replace(dtype="float32").shapes(),
    )


@pytest.mark.cases(8)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", [*cases.BENCH, *cases.SMALL])
def test_lowers_for_a_gpu(name):
    case = cases.BENCH.get(name) or cases.SMALL[name]
    assert "triton" in testing.lower_for_gpu(
        functools.partial(bench.ours, "NVIDIA H200"), *case.shapes()
    )


def test_configs_fit_the_chip():
    def config(kind, name, dtype="bfloat16", **sizes):
        case = cases.BENCH[name]._replace(**sizes)
        q, cache = case.shapes()[:2]
        return tpu.config(kind, q.shape, cache.shape, dtype, case.num_pages)

    assert config("TPU v4", "T=4") == tpu.Config(1024, 1, 2)
    assert config("TPU v5", "T=4") == tpu.Config(2048, 1, 2)
    assert config("TPU v6 lite", "T=4") == tpu.Config(2048, 1, 1)
    assert config("TPU v6 lite", "T=16") == tpu.Config(2048, 1, 1)
    assert config("TPU v6 lite", "T=16", "float32") == tpu.Config(1024, 1, 1)
    assert config("TPU v6 lite", "T=4 pages") == tpu.Config(128, 16, 1)
    assert config("TPU v6 lite", "T=4 pages", S=512) == tpu.Config(128, 4, 1)
    assert config("TPU v6 lite", "T=4 pages", s=2560) == tpu.Config(1280, 1, 1)
    shapes = [x.shape for x in cases.BENCH["T=4"].shapes()[:2]]
    assert triton.config(*shapes).num_splits == 17
    assert triton.config((1, 1, 8, 64), (1, 1, 128, 8, 64)).num_splits == 1
    assert triton.config((1, 1, 8, 64), (1, 1, 48, 8, 64), 4).block_slots == 16


@pytest.mark.parametrize("num_splits", [1, 2, 3])
def test_work_lists_every_visible_block_once(num_splits):
    cfg = tpu.Config(128, 2, num_splits)
    lengths, starts = np.array([0, 1, 1000, 256, 700, 0]), np.array([0, 0, 300, 255, 600, 5])
    table_Bm = np.arange(6 * 8, dtype=np.int32).reshape(6, 8)[:, ::-1]
    work = _jitted(functools.partial(tpu.list_work, cfg, 128), table_Bm, lengths, starts)
    listed, copies = [], []
    for split, end in enumerate(work.end_i.tolist()):
        assert end <= work.num_blocks
        for row, block, copy_c in zip(
            *(np.asarray(x[split, :end]).tolist() for x in work[:3]), strict=True
        ):
            listed.append((row, block))
            for number, copy in enumerate(copy_c):
                slot = block * 256 + number * 128
                if slot < lengths[row] and slot + 128 > starts[row]:
                    assert copy == table_Bm[row, slot // 128]
                    copies.append(copy)
    assert listed == [
        (row, block)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
        for block in range(start // 256, -(-length // 256))
    ]
    assert len(copies) == len(set(copies)) == 1 + 6 + 1 + 2


def _written(caches, new, group, table_Bm, slot_B):
    """What `append` is to return, by loops."""
    caches = [np.array(cache) for cache in caches]
    for b, t in np.ndindex(*new[0].shape[:2]):
        page, slot = divmod(int(slot_B[b]) + t, caches[0].shape[2])
        if page < table_Bm.shape[1] and table_Bm[b, page] >= 0:
            for cache, x in zip(caches, new, strict=True):
                cache[group, table_Bm[b, page], slot] = x[b, t]
    return caches


@pytest.mark.cases(3)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("num_tokens", "slots"),
    [(1, [0, 127, 128, 383, 5]), (4, [0, 126, 300, 381, 510]), (256, [0, 128, 256, 0, 384])],
)
def test_append_writes_the_tokens_and_nothing_else(dtype, num_tokens, slots):
    rng = np.random.default_rng(0)
    P, n, s, K, H = 2, 9, 256, 2, 16

    def draw(*shape, dtype=dtype):
        return jnp.asarray(rng.integers(-100, 100, shape), dtype)

    # The first row and the last write nothing or less than all.
    table_Bm = np.array([[-1, -1], [7, 2], [3, 8], [0, 5], [6, -1]], np.int32)
    caches, new = [draw(P, n, s, K, H)], [draw(5, num_tokens, K, H)]
    if dtype == "int8":
        caches.append(draw(P, n, s, K, dtype="float32"))
        new.append(draw(5, num_tokens, K, dtype="float32"))
    expected = _written(caches, new, 1, table_Bm, slots)

    def call(**options):
        def write(caches, new, table_Bm, slot_B):
            where = {"group": 1, "table_Bm": table_Bm, "slot_B": slot_B}
            return append.append(caches, new, **where, **options)

        args = tuple(caches), tuple(new), table_Bm, jnp.asarray(slots, jnp.int32)
        return jax.jit(write)(*args)

    np.testing.assert_equal([np.asarray(x) for x in call(device_kind="cpu")], expected)
    with testing.interpreted_tpu() as interpret:
        written = jax.block_until_ready(call(device_kind="TPU v5", interpret=interpret))
    np.testing.assert_equal([np.asarray(x) for x in written], expected)


@pytest.mark.parametrize(
    ("num_tokens", "page_slots", "message"),
    [
        (1, 96, "needs pages whose slots are a multiple of 128, not 96"),
        (100, 128, "takes up to 16 tokens or a multiple of 128, not 100"),
    ],
)
def test_what_append_cannot_write_is_refused(num_tokens, page_slots, message):
    cache, new = jnp.zeros((1, 2, page_slots, 1, 8)), jnp.zeros((2, num_tokens, 1, 8))
    zeros = jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(ValueError, match=message):
        append.append(
            (cache,),
            (new,),
            group=0,
            table_Bm=zeros,
            slot_B=zeros[:, 0],
            device_kind="TPU v5",
            implementation="pallas_tpu",
        )


@pytest.mark.parametrize(
    ("chip", "num_tokens"),
    [
        ("v6e", 1),
        *(pytest.param(chip, 1, marks=pytest.mark.slow) for chip in ("v5e", "v5p", "tpu7x")),
        *(pytest.param("v6e", num_tokens, marks=pytest.mark.slow) for num_tokens in (16, 256)),
    ],
)
def test_append_compiles_for_a_tpu_and_writes_in_place(chip, num_tokens):
    pytest.importorskip("libtpu")
    tpu_compiler.prepare()
    case = cases.BENCH["T=1 int8 pages"]
    cache, _, _, slot_B, scale, _, _, table_Bm = case.shapes()[1:]
    new = [
        jax.ShapeDtypeStruct((case.B, num_tokens, *x.shape[3:]), x.dtype) for x in (cache, scale)
    ]

    def write(cache, scale, new, new_scale, table_Bm, slot_B):
        def one_group(caches, group):
            return append.append(
                caches,
                (new, new_scale),
                group=group,
                table_Bm=table_Bm,
                slot_B=slot_B,
                device_kind=_KINDS[chip],
            ), None

        return jax.lax.scan(one_group, (cache, scale), jnp.arange(case.P))[0]

    compiled = tpu_compiler.compile_for(chip, write, cache, scale, *new, table_Bm, slot_B)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * case.cache_bytes()
