"""flash_attention: every implementation against the float32 reference; dropout, skipping, races,
compilation for absent chips.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chips, testing, tpu_compiler
from pallas_kernels.flash_attention import cases, dropout, tpu, xla
from pallas_kernels.flash_attention.api import attention_gradients, flash_attention
from pallas_kernels.flash_attention.reference import Settings

V5P = "TPU v5"
BY_NAME = {case.name: case for case in (*cases.TESTED, *cases.TIMED, cases.LONG)}


def with_gradients(case, arrays, dtype=None, **kwargs):
    """out, log-sum-exp with -9 for -inf, and the gradients of both for cotangents that depend on
    their place.
    """

    @jax.jit
    def run(q_k_v, segments):
        def loss(*q_k_v):
            out, lse = flash_attention(*q_k_v, *segments, with_lse=True, **case.settings, **kwargs)
            lse = jnp.where(jnp.isneginf(lse), -9.0, lse)
            dout, dlse = (
                jnp.cos(jnp.arange(x.size, dtype=jnp.float32) * 0.7).reshape(x.shape)
                for x in (out, lse)
            )
            return (out.astype(jnp.float32) * dout).sum() + (lse * dlse).sum(), (out, lse)

        gradients, out_lse = jax.grad(loss, (0, 1, 2), has_aux=True)(*q_k_v)
        return *out_lse, *gradients

    return jax.block_until_ready(
        run(tuple(x.astype(dtype or x.dtype) for x in arrays[:3]), arrays[3:])
    )


# "everything float32" has all that these have.
_SLOW = ("causal float32", "packed", "padded", "dropout", "everything bfloat16")
_CASES = [
    pytest.param(case, marks=pytest.mark.slow) if case.name in _SLOW else case
    for case in cases.TESTED
]


@pytest.mark.cases(3)
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_xla(case):
    arrays = case.arrays(np.random.default_rng())
    expected = with_gradients(
        case, arrays, jnp.float32, implementation="reference", device_kind="cpu"
    )
    actual = with_gradients(case, arrays, device_kind="cpu")
    testing.assert_close(actual, expected, case.dtype)


def test_xla_cuts_long_sequences(monkeypatch):
    monkeypatch.setattr(xla, "_SCORES_AT_A_TIME", 2**17)  # one sequence at a time
    case = cases.Case("long", 2, 600, 700, 4, 2, 16, "float32", documents=3, padding=90)
    arrays = case.arrays(np.random.default_rng())
    expected = with_gradients(case, arrays, implementation="reference", device_kind="cpu")
    testing.assert_close(
        with_gradients(case, arrays, implementation="xla", device_kind="cpu"), expected, "float32"
    )


# Small blocks, so that little shapes have many; slices smaller than blocks.
SMALL = tpu.Config(128, 256, 256, 128, 128, 128, heads=2)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "CONFIGS", dict.fromkeys(tpu.CONFIGS, SMALL))


@pytest.mark.cases(2)
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
@pytest.mark.heavy
def test_tpu(case, small_blocks):
    arrays = case.arrays(np.random.default_rng())
    expected = with_gradients(
        case, arrays, jnp.float32, implementation="reference", device_kind=V5P
    )
    with testing.interpreted_tpu() as interpret:
        actual = with_gradients(
            case, arrays, implementation="pallas_tpu", device_kind=V5P, interpret=interpret
        )
    testing.assert_close(actual, expected, case.dtype)


@pytest.mark.heavy
def test_hidden_blocks_are_not_computed(small_blocks):
    # NaN in blocks of keys that are too late for every query of a block, or of another document.
    case = cases.Case("blocks", 1, 512, 512, 2, 1, 16, "float32")
    q, k, v, one_document, _ = case.arrays(np.random.default_rng())
    two_documents = jnp.repeat(jnp.array([[1, 2]], jnp.int32), 256, axis=1)
    first, second = slice(0, 256), slice(256, 512)
    run = jax.jit(
        functools.partial(flash_attention, device_kind=V5P, implementation="pallas_tpu"),
        static_argnames=("causal", "interpret"),
    )
    for ids, causal, keys, queries in (
        (one_document, True, second, first),
        (two_documents, False, second, first),
        (two_documents, False, first, second),
    ):
        bad_k, bad_v = k.at[:, keys].set(jnp.nan), v.at[:, keys].set(jnp.nan)
        with testing.interpreted_tpu() as interpret:
            out = run(q, bad_k, bad_v, ids, ids, causal=causal, interpret=interpret)
        assert bool(jnp.isfinite(out[:, queries]).all()), (causal, keys)


def visits_of(settings, query_segment, key_segment, block_q=128, block_k=128, offset=None):
    problem = tpu.Problem(settings, SMALL, 0, query_segment.shape[1], key_segment.shape[1], False)
    return tpu.visits(problem, query_segment, key_segment, offset, block_q, block_k)


def test_visits_of_causal_attention():
    ones = jnp.ones((1, 1024), jnp.int32)
    by_query, by_key, num_key_steps, num_query_steps = visits_of(
        Settings(True, 1.0, 0.0), ones, ones
    )
    assert by_query.last.tolist() == list(range(8)) and by_query.first.tolist() == [0] * 8
    # Only the diagonal is masked.
    assert (by_query.full_last - by_query.full_first + 1).tolist() == list(range(8))
    assert by_key.first.tolist() == list(range(8)) and by_key.last.tolist() == [7] * 8
    assert (num_key_steps, num_query_steps) == (8, 8)


def test_visits_of_packed_documents_and_padding():
    segment = jnp.repeat(jnp.array([[1, 1, 2, 2, 2, 3, 0, 0]], jnp.int32), 128, axis=1)
    by_query, _, _, _ = visits_of(Settings(False, 1.0, 0.0), segment, segment)
    assert by_query.first.tolist() == [0, 0, 2, 2, 2, 5, 0, 0]
    assert by_query.last.tolist() == [1, 1, 4, 4, 4, 5, -1, -1]
    assert (
        by_query.full_first.tolist()[:6] == by_query.first.tolist()[:6]
        and by_query.full_last.tolist()[:6] == by_query.last.tolist()[:6]
    )


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_queries_without_keys(implementation):
    # The query 0 is padding, the queries 1-3 come before the first key.
    case = cases.Case("", 1, 8, 4, 1, 1, 8, "float32")
    q, k, v, _, _ = case.arrays(np.random.default_rng())
    arrays = (
        jnp.nan_to_num(q),
        k,
        v,
        jnp.array([[0, 1, 1, 1, 1, 1, 1, 1]], jnp.int32),
        jnp.ones((1, 4), jnp.int32),
    )
    with testing.interpreted_tpu() as interpret:
        out, lse, dq, dk, dv = with_gradients(
            case, arrays, implementation=implementation, device_kind=V5P, interpret=interpret
        )
    assert (out[0, :4] == 0).all() and (lse[0, 0, :4] == -9).all() and (dq[0, :4] == 0).all()
    assert all(
        bool(jnp.isfinite(x).all()) and bool((x[0, -4:] != 0).any()) for x in (out, dk, dv, lse)
    )


@pytest.mark.slow  # 20 s
def test_gradient_of_the_merge_of_two_halves():
    # What ring attention does: two sets of keys, merged by their log-sum-exps.
    case = cases.Case("", 1, 64, 128, 2, 1, 16, "float32", causal=False)
    q, k, v, query_segment, key_segment = case.arrays(np.random.default_rng())

    def whole(q, k, v):
        return flash_attention(
            q,
            k,
            v,
            query_segment,
            key_segment,
            device_kind="cpu",
            causal=False,
            implementation="reference",
        )

    def merged(q, k, v, interpret):
        run = functools.partial(
            flash_attention,
            device_kind=V5P,
            causal=False,
            with_lse=True,
            implementation="pallas_tpu",
            interpret=interpret,
        )
        parts = [
            run(q, k[:, keys], v[:, keys], query_segment, key_segment[:, keys])
            for keys in (slice(0, 40), slice(40, 128))
        ]
        share = jax.nn.softmax(jnp.stack([lse for _, lse in parts]), axis=0)
        return sum(out * share[i].swapaxes(1, 2)[..., None] for i, (out, _) in enumerate(parts))

    expected, pull = jax.vjp(whole, q, k, v)
    with testing.interpreted_tpu() as interpret:
        actual, pull_merged = jax.vjp(functools.partial(merged, interpret=interpret), q, k, v)
        gradients = pull_merged(jnp.cos(expected))
    testing.assert_close((actual, gradients), (expected, pull(jnp.cos(expected))), "float32")


OFFSET = cases.Case("", 2, 256, 512, 4, 2, 16, "float32", documents=3, padding=30)


@pytest.mark.cases(2)
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
@pytest.mark.parametrize("dropout_rate", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
def test_some_queries_of_a_sequence(implementation, dropout_rate, small_blocks):
    # Queries 128 to 383 of 512, with the dropout that all 512 queries have.
    case = dataclasses.replace(OFFSET, T=512, dropout_rate=dropout_rate)
    q, k, v, segment, _ = case.arrays(np.random.default_rng())
    some = slice(128, 384)

    def results(interpret=False, **options):
        def run(q, k, v):
            run_all = functools.partial(flash_attention, device_kind=V5P, with_lse=True)
            if "query_offset" in options:
                q, segments = q[:, some], (segment[:, some], segment)
            else:
                segments = (segment, segment)
            out, lse = run_all(q, k, v, *segments, interpret=interpret, **case.settings, **options)
            if "query_offset" not in options:
                out, lse = out[:, some], lse[:, :, some]
            lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
            return jnp.cos(out).sum() + jnp.sin(lse).sum(), (out, lse)

        return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(q, k, v)

    expected = results(implementation="reference")
    with testing.interpreted_tpu() as interpret:
        actual = results(
            interpret, implementation=implementation, query_offset=jnp.int32(some.start)
        )
    testing.assert_close(actual, expected, "float32")


@pytest.mark.cases(2)
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_gradients_of_some_keys(implementation, small_blocks):
    # What ring attention does: the gradients of each part of the keys add up to the whole.
    case = dataclasses.replace(OFFSET, causal=False)
    q, k, v, *segments = case.arrays(np.random.default_rng())
    dout = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    @jax.jit
    def whole(q, k, v):
        def attend(q, k, v):
            options = {"device_kind": "cpu", "causal": False, "implementation": "reference"}
            return flash_attention(q, k, v, *segments, with_lse=True, **options)

        (out, lse), pullback = jax.vjp(attend, q, k, v)
        return out, lse, pullback((dout, jnp.zeros_like(lse)))

    out, lse, expected = whole(q, k, v)

    @functools.partial(jax.jit, static_argnames="interpret")
    def of_keys(k, v, segment, interpret):
        return attention_gradients(
            *(q, k, v, segments[0], segment, out, lse, dout),
            device_kind=V5P,
            causal=False,
            implementation=implementation,
            interpret=interpret,
        )

    with testing.interpreted_tpu() as interpret:
        parts = [
            of_keys(k[:, keys], v[:, keys], segments[1][:, keys], interpret)
            for keys in (slice(0, 256), slice(256, 512))
        ]
    (dq_0, *dkv_0), (dq_1, *dkv_1) = parts
    actual = dq_0 + dq_1, *(jnp.concatenate(x, 1) for x in zip(dkv_0, dkv_1, strict=True))
    testing.assert_close(actual, expected, "float32")


def test_visits_of_some_queries():
    segments = jnp.ones((1, 256), jnp.int32), jnp.ones((1, 1024), jnp.int32)
    by_query, by_key, *num_steps = visits_of(
        Settings(True, 1.0, 0.0), *segments, offset=jnp.int32(384)
    )
    assert by_query.last.tolist() == [3, 4] and by_query.full_last.tolist() == [2, 3]
    assert by_key.last.tolist() == [1] * 5 + [-1] * 3
    assert num_steps == [8, 2]


def test_dropout_drops_its_share_anew_for_every_seed_head_and_sequence():
    kept = dropout.is_kept(
        dropout.head_seeds(jnp.array([1, 2], jnp.int32), 2, 3)[:, :, None, None],
        jnp.arange(256)[:, None],
        jnp.arange(256),
        0.3,
    )
    share = kept.mean((2, 3))
    assert np.allclose(share, 0.7, atol=6 * (0.21 / 2**16) ** 0.5)
    heads = np.array(kept.reshape(6, -1))
    agree = (heads[:, None] == heads[None]).mean(-1)[~np.eye(6, dtype=bool)]
    # Independent masks agree in 0.7^2 + 0.3^2 of the places.
    assert np.allclose(agree, 0.58, atol=0.012)
    for other in (
        jnp.array([1, 3], jnp.int32),
        jnp.array([2, 2], jnp.int32),
        jnp.array(7, jnp.int32),
    ):
        assert (
            dropout.head_seeds(other, 2, 3)
            != dropout.head_seeds(jnp.array([1, 2], jnp.int32), 2, 3)
        ).all()


def test_dropout_has_no_stripes():
    kept = (
        np.array(
            dropout.is_kept(jnp.uint32(9), jnp.arange(512)[:, None], jnp.arange(512), 0.5),
            np.float64,
        )
        - 0.5
    )
    # Shares of rows and columns, and of the agreement of neighbours in each direction, are those
    # of fair coins.
    for shift in ((0, 1), (1, 0), (1, 1), (0, 128), (64, 0)):
        correlation = 4 * (kept * np.roll(kept, shift, (0, 1))).mean()
        assert abs(correlation) < 6 / 512, shift
    for dim in (0, 1):
        assert np.abs(2 * kept.mean(dim)).max() < 5 / 512**0.5


def test_seeds_of_a_shard():
    # A caller that holds heads 2..3 passes their part of the global seeds, and drops what one
    # holding all heads drops.
    case = dataclasses.replace(BY_NAME["dropout"], dtype="float32")
    q, k, v, *segments = case.arrays(np.random.default_rng())

    @jax.jit
    def attention(seed, *arrays):
        settings = case.settings | {"dropout_seed": seed}
        return flash_attention(*arrays, device_kind="cpu", **settings)

    seed = case.settings["dropout_seed"]
    whole = attention(seed, q, k, v, *segments)
    part = attention(
        dropout.head_seeds(seed, case.B, case.N)[:, 2:],
        *(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], *segments),
    )
    testing.assert_close(part, whole[:, :, 2:], "float32")


BAD = {
    "multiple of the kv heads": lambda a: ((a[0][:, :, :3], *a[1:]), {}),
    "head dim that is a multiple of 8, not 12; pad": lambda a: (
        (*(x[..., :12] for x in a[:3]), *a[3:]),
        {"implementation": "pallas_tpu", "device_kind": "TPU v5"},
    ),
    "cast them": lambda a: ((a[0].astype(jnp.float32), *a[1:]), {}),
    "need int32": lambda a: ((*a[:3], a[3].astype(jnp.float32), a[4]), {}),
    "K, H. twice": lambda a: ((a[0], a[1], a[2][:, :-1], *a[3:]), {}),
    "scale = -1.0 must": lambda a: (a, {"scale": -1.0}),
    "dropout_rate = 1.0 must": lambda a: (a, {"dropout_rate": 1.0}),
    "needs a dropout_seed": lambda a: (a, {"dropout_rate": 0.1}),
    "of shape": lambda a: (a, {"dropout_rate": 0.1, "dropout_seed": jnp.zeros(3, jnp.int32)}),
    "needs a device of the family TPU": lambda a: (a, {"implementation": "pallas_tpu"}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    arrays, kwargs = BAD[message](BY_NAME["dropout"].arrays(np.random.default_rng()))
    with pytest.raises(ValueError, match=message):
        flash_attention(*arrays, **{"device_kind": "cpu"} | kwargs)


def test_scale_is_used():
    arrays = BY_NAME["causal float32"].arrays(np.random.default_rng())
    scaled = flash_attention(arrays[0] * 2, *arrays[1:], device_kind="cpu")
    testing.assert_close(
        flash_attention(*arrays, device_kind="cpu", scale=2 * 128**-0.5), scaled, "float32"
    )


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu")
    tpu_compiler.prepare()


def compiled(chip, case, *, backward, **kwargs):
    def attend(*arrays):
        kind = chips.CHIPS[chip].device_kinds[0]
        return flash_attention(
            *arrays, device_kind=kind, implementation="pallas_tpu", **case.settings, **kwargs
        )

    def gradients(dout_BTNH, *arrays):
        return jax.vjp(lambda *q_k_v: attend(*q_k_v, *arrays[3:]), *arrays[:3])[1](dout_BTNH)

    shapes = case.shapes()
    return (
        tpu_compiler.compile_for(chip, gradients, shapes[0], *shapes)
        if backward
        else tpu_compiler.compile_for(chip, attend, *shapes)
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "chip",
    [*(pytest.param(chip, marks=pytest.mark.slow) for chip in ("v5e", "v6e", "tpu7x")), "v5p"],
)
@pytest.mark.heavy
def test_compiles_at_full_size(chip, backward, libtpu):
    text = compiled(chip, BY_NAME["hunyuan 4k"], backward=backward).as_text()
    assert "flash_attention_forward" in text and ("flash_attention_backward" in text) == backward


@pytest.mark.parametrize(
    "chip",
    ["v5p", "v6e", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("v5e", "tpu7x"))],
)
def test_compiles_with_everything(chip, libtpu):
    compiled(chip, BY_NAME["everything bfloat16"], backward=True)


@pytest.mark.parametrize(
    "backward",
    [pytest.param(False, marks=pytest.mark.slow), True],  # a backward pass has a forward one
    ids=["forward", "backward"],
)
@pytest.mark.heavy
def test_memory_is_linear_in_length(backward, libtpu):
    memory = compiled("v5p", cases.LONG, backward=backward).memory_analysis()
    # A few copies of q in float32; the scores of one head alone would be 256 GiB.
    assert memory.temp_size_in_bytes < 5 * 4 * 2**18 * 10 * 80
