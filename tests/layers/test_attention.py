"""Attention, rotary embedding, norms, masks, cache and dropout.

Letters: B batch, T queries, S keys, D model, N query heads, K kv heads, H head dim, V vocabulary.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from hunyuan_jax import presets
from hunyuan_jax.config import ModelConfig, MoeConfig
from hunyuan_jax.layers import rope
from hunyuan_jax.layers.embedding import Embedding
from hunyuan_jax.layers.mixer import attention, kv_cache, paged
from hunyuan_jax.layers.mixer.attention import Attention, attend
from hunyuan_jax.layers.norm import RmsNorm, rms_normalize
from hunyuan_jax.layers.protocols import LayerCache, Sequence
from hunyuan_jax.model import stack
from hunyuan_jax.model.cache import empty_cache
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel import island
from hunyuan_jax.parallel.mesh import single_device_mesh
from pallas_kernels.flash_attention import head_seeds
from support.models import fast_jit, filled, mesh_of

# Dense and small, with two CLA groups of two layers; nothing here depends on the experts.
SMALL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=32,
    cla_share_factor=2,
    pad_token_id=3,
)
BATCH, LENGTH = 2, 12


def changed(**changes):
    return dataclasses.replace(SMALL, **changes)


@functools.cache
def model_of(cfg):
    return filled(functools.partial(Transformer, cfg, single_device_mesh(), jax.random.key(0)))


@functools.cache
def compiled_logits(cfg):
    model = model_of(cfg)
    return fast_jit(
        lambda tokens, positions, segments: model.logits(
            model(tokens, positions, segments).hidden_BTD
        )
    )


def logits(tokens_BT, positions_BT, segments_BT, cfg=SMALL):
    return np.asarray(
        compiled_logits(cfg)(
            *(np.asarray(a, np.int32) for a in (tokens_BT, positions_BT, segments_BT))
        )
    )


def random_tokens(seed=0, shape=(BATCH, LENGTH)):
    return np.random.default_rng(seed).integers(4, SMALL.vocab_size, shape).astype(np.int32)


ARANGE_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH))
ONES_BT = np.ones((BATCH, LENGTH), np.int32)


# One attention


def numpy_attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    """Query head n looks at kv head n // (N / K), one query at a time."""
    B, T, N, H = q_BTNH.shape
    heads_per_kv = N // k_BSKH.shape[2]
    out_BTNH = np.zeros(q_BTNH.shape)
    for b, t, n in np.ndindex(B, T, N):
        seen = np.flatnonzero(mask_BTS[b, t])
        if not len(seen):
            continue  # zeros
        k_SH, v_SH = k_BSKH[b, seen, n // heads_per_kv], v_BSKH[b, seen, n // heads_per_kv]
        scores_S = k_SH @ q_BTNH[b, t, n] / math.sqrt(H)
        weights_S = np.exp(scores_S - scores_S.max())
        out_BTNH[b, t, n] = weights_S @ v_SH / weights_S.sum()
    return out_BTNH


def numpy_mask(segments_BS):
    """bool [B, S, S]: who sees whom in whole sequences."""
    is_same_BTS = segments_BS[:, :, None] == segments_BS[:, None]
    is_past_TS = np.tri(segments_BS.shape[1], dtype=bool)
    return is_same_BTS & is_past_TS & (segments_BS[:, None] > 0)


attend_jit = fast_jit(functools.partial(attend, device_kind="cpu", implementation=None))


def attention_case(num_queries, num_keys, num_heads=6, num_kv_heads=2, batch=3):
    rng = np.random.default_rng(0)
    q_BTNH = rng.normal(size=(batch, num_queries, num_heads, 8)).astype(np.float32)
    k_BSKH, v_BSKH = rng.normal(size=(2, batch, num_keys, num_kv_heads, 8)).astype(np.float32)
    return q_BTNH, k_BSKH, v_BSKH


@pytest.mark.parametrize(
    "sizes",
    [{}, {"num_heads": 2}, {"num_kv_heads": 1}, {"num_kv_heads": 6}],
    ids=["gqa", "mha", "mqa", "mha6"],
)
def test_attend_is_grouped_query_attention(sizes):
    case = attention_case(7, 7, **sizes)
    # Two documents, then padding.
    segments_BS = np.sort(np.random.default_rng(1).integers(0, 3, (3, 7)))[:, ::-1].astype(
        np.int32
    )
    np.testing.assert_allclose(
        attend_jit(*case, Sequence((), segments_BS)),
        numpy_attend(*case, numpy_mask(segments_BS)),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("num_queries", [1, 3, 16, 17, 20])
def test_new_tokens_of_rows_of_different_lengths_attend_to_their_own_slots(num_queries):
    """By the decode kernel up to 16 tokens, by flash attention above; other slots hold NaN."""
    q_BTNH, k_BSKH, v_BSKH = attention_case(num_queries, 30)
    start_B, length_B = np.array([0, 3, 2], np.int32), np.array([4, 10, 2], np.int32)
    slot_S, end_B = np.arange(30), length_B + num_queries
    slot_BT = length_B[:, None] + np.arange(num_queries)
    mask_BTS = (slot_S <= slot_BT[..., None]) & (slot_S >= start_B[:, None, None])
    expected_BTNH = numpy_attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
    is_dead_BS = (slot_S < start_B[:, None]) | (slot_S >= end_B[:, None])
    k_BSKH, v_BSKH = (np.where(is_dead_BS[..., None, None], np.nan, x) for x in (k_BSKH, v_BSKH))
    sequence = Sequence((), np.ones(q_BTNH.shape[:2], np.int32), start_B, length_B)
    np.testing.assert_allclose(
        attend_jit(q_BTNH, k_BSKH, v_BSKH, sequence), expected_BTNH, rtol=1e-5, atol=1e-5
    )


# A layer as docs/model.md writes it


def numpy_rotate(x_BTNH, positions_BT, cfg):
    base = cfg.rope_theta * cfg.rope_alpha ** (cfg.head_dim / (cfg.head_dim - 2))
    angles_BTh = positions_BT[..., None] / base ** (np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
    turn = np.exp(1j * angles_BTh)[:, :, None]
    half = cfg.head_dim // 2
    turned = (x_BTNH[..., :half] + 1j * x_BTNH[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def numpy_rms(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def numpy_layer(weights, producer, y_BTD, kv_source_BTD, positions_BT, mask_BTS, cfg):
    """Specification section 3, steps 1 to 8, with this layer's own key norm on the group's raw
    keys.
    """

    def project(x_BTD, owner, name):
        bias = owner[f"b{name}_{'NH' if name == 'q' else 'KH'}"] if cfg.attention_bias else 0
        return (
            np.einsum("BTD,DNH->BTNH", x_BTD, owner[f"w{name}_{'DNH' if name == 'q' else 'DKH'}"])
            + bias
        )

    q_BTNH = numpy_rotate(project(y_BTD, weights, "q"), positions_BT, cfg)
    k_BTKH = numpy_rotate(project(kv_source_BTD, producer, "k"), positions_BT, cfg)
    if cfg.use_qk_norm:
        q_BTNH = numpy_rms(q_BTNH, weights["q_norm_H"], cfg.rms_norm_eps)
        k_BTKH = numpy_rms(k_BTKH, weights["k_norm_H"], cfg.rms_norm_eps)
    out_BTNH = numpy_attend(q_BTNH, k_BTKH, project(kv_source_BTD, producer, "v"), mask_BTS)
    return np.einsum("BTNH,NHD->BTD", out_BTNH, weights["wo_NHD"]) + (
        weights["bo_D"] if cfg.attention_bias else 0
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_bias": True}, {"use_qk_norm": False, "rope_alpha": 1000.0}],
    ids=str,
)
def test_producer_and_consumer_attend_as_specified(changes):
    # The consumer has other scales than the producer: both orders of norm and sharing, and the
    # folded key scale, must agree.
    cfg = changed(rope_alpha=3.0, num_kv_heads=2) if not changes else changed(**changes)
    mesh = single_device_mesh()
    producer = filled(
        functools.partial(Attention, cfg, mesh, jax.random.key(0), shares=False), seed=1
    )
    consumer = filled(
        functools.partial(Attention, cfg, mesh, jax.random.key(0), shares=True), seed=2
    )
    rng = np.random.default_rng(3)
    y_BTD, z_BTD = rng.normal(size=(2, BATCH, LENGTH, cfg.hidden_size)).astype(np.float32)
    positions_BT = np.asarray([np.arange(LENGTH), np.arange(LENGTH) % 7], np.int32)
    segments_BT = 1 + (np.arange(LENGTH)[None] >= np.asarray([[LENGTH], [7]])).astype(np.int32)

    @fast_jit
    def attend_both(y_BTD, z_BTD):
        sequence = Sequence(rope.cos_sin(positions_BT, cfg), segments_BT)
        produced_BTD, cache = producer(y_BTD, sequence, LayerCache(None, 0), None)
        return produced_BTD, consumer(z_BTD, sequence, cache, None)[0]

    weights = [
        jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(m)))
        for m in (producer, consumer)
    ]
    mask_BTS = numpy_mask(segments_BT)
    for out_BTD, own, x_BTD in zip(
        attend_both(y_BTD, z_BTD), weights, (y_BTD, z_BTD), strict=True
    ):
        expected_BTD = numpy_layer(own, weights[0], x_BTD, y_BTD, positions_BT, mask_BTS, cfg)
        np.testing.assert_allclose(out_BTD, expected_BTD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [1, 2, 4])
def test_only_the_producer_has_key_and_value_projections(share):
    cfg = changed(cla_share_factor=share, attention_bias=True)
    layers = nnx.eval_shape(
        lambda: stack.Stack(cfg, single_device_mesh(), jax.random.key(0))
    ).layers()
    for i, layer in enumerate(layers):
        names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(layer.attn))}
        assert {
            "wq_DNH",
            "wo_NHD",
            "bq_NH",
            "bo_D",
            "q_norm_H",
            "k_norm_H",
        } <= names  # also a consumer has its own key norm
        assert {"wk_DKH", "wv_DKH", "bk_KH", "bv_KH"} & names == (
            {"wk_DKH", "wv_DKH", "bk_KH", "bv_KH"} if i == 0 else set()
        )
    assert len(layers) == share


# Who sees whom, through the whole model


@pytest.mark.parametrize("position", [0, 5, LENGTH - 1])
def test_the_future_does_not_change_the_past(position):
    tokens_BT = random_tokens()
    changed_BT = tokens_BT.copy()
    changed_BT[:, position] = (changed_BT[:, position] + 1) % SMALL.vocab_size
    before, after = (logits(tokens, ARANGE_BT, ONES_BT) for tokens in (tokens_BT, changed_BT))
    np.testing.assert_array_equal(before[:, :position], after[:, :position])
    assert (np.abs(before[:, position:] - after[:, position:]).max(-1) > 1e-4).all()


def test_documents_of_a_packed_row_do_not_see_each_other():
    first, second = random_tokens(0), random_tokens(1)
    lengths = (7, 5)
    segments_BT = np.broadcast_to(np.repeat([1, 2], lengths), (BATCH, LENGTH))
    positions_BT = np.broadcast_to(
        np.concatenate([np.arange(n) for n in lengths]), (BATCH, LENGTH)
    )
    packed = logits(
        np.concatenate([first[:, :7], second[:, :5]], axis=1), positions_BT, segments_BT
    )
    other = logits(
        np.concatenate([second[:, 5:], second[:, :5]], axis=1), positions_BT, segments_BT
    )
    np.testing.assert_array_equal(packed[:, 7:], other[:, 7:])
    assert np.abs(packed[:, :7] - other[:, :7]).max() > 0.1
    # And each is what it is alone in a row.
    np.testing.assert_allclose(
        packed[:, :7], logits(first, ARANGE_BT, ONES_BT)[:, :7], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        packed[:, 7:], logits(second, ARANGE_BT, ONES_BT)[:, :5], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(side):
    tokens_BT = random_tokens()
    is_pad_T = np.arange(LENGTH) < 4 if side == "left" else np.arange(LENGTH) >= LENGTH - 4
    segments_BT = np.broadcast_to(~is_pad_T, tokens_BT.shape).astype(np.int32)
    other_BT = np.where(is_pad_T, random_tokens(1), tokens_BT)
    before, after = (
        logits(tokens, ARANGE_BT, segments_BT)[:, ~is_pad_T] for tokens in (tokens_BT, other_BT)
    )
    np.testing.assert_array_equal(before, after)
    assert np.isfinite(before).all()


# The cache


@functools.cache
def compiled(method, cfg=SMALL):
    """`prefill` (with positions from the mask), `extend` or `decode` -> (logits, cache)."""
    model = model_of(cfg)

    def run(cache, tokens, *mask_BT):
        if mask_BT:
            positions_BT = jnp.maximum(jnp.cumsum(mask_BT[0], axis=1) - 1, 0)
            mask_BT = (positions_BT, *mask_BT)
        output = getattr(model, method)(tokens, *mask_BT, cache)
        return model.logits(output.hidden_BTD), output.cache

    return fast_jit(run)


def continued(cache, tokens_BT, chunks):
    """(logits of the tokens, cache) after appending them in chunks; chunks of one are decoded."""
    parts, start = [], 0
    for length in chunks:
        chunk_BT = tokens_BT[:, start : start + length]
        part, cache = (
            compiled("decode")(cache, chunk_BT[:, 0])
            if length == 1
            else compiled("extend")(cache, chunk_BT)
        )
        parts.append(np.asarray(part))
        start += length
    return np.concatenate(parts, axis=1), cache


CHUNKS = pytest.mark.parametrize(
    "chunks",
    [(1,) * 20, (4, 1, 15), (17, 3), (20,)],
    ids=lambda chunks: "-".join(map(str, chunks)),
)


@pytest.mark.cases(2)
@CHUNKS
def test_an_empty_cache_extended_by_chunks_equals_the_whole(chunks):
    tokens_BT = random_tokens(shape=(BATCH, 20))
    arange_BT = np.broadcast_to(np.arange(20), tokens_BT.shape)
    out_BTV, cache = continued(empty_cache(SMALL, BATCH, 23), tokens_BT, chunks)
    expected_BTV = logits(tokens_BT, arange_BT, np.ones_like(tokens_BT))
    np.testing.assert_allclose(out_BTV, expected_BTV, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache.length_B, [20] * BATCH)
    assert not any(np.asarray(x)[:, :, 20:].any() for x in cache.entries["layer_0"][:2])


def lengths_case():
    """(cache of prompts of 3, 12 and 7 tokens: two padded on the right, one on the left; the
    prompts; tokens that follow; the prompts' logits).
    """
    prompts = [random_tokens(row, (length,)) for row, length in enumerate((3, 12, 7))]
    tokens_BT, mask_BT = np.full((3, LENGTH), 9, np.int32), np.zeros((3, LENGTH), np.int32)
    for row, first in enumerate((0, 0, 5)):
        used = slice(first, first + len(prompts[row]))
        tokens_BT[row, used], mask_BT[row, used] = prompts[row], 1
    out_BTV, cache = compiled("prefill")(empty_cache(SMALL, 3, 40), tokens_BT, mask_BT)
    return cache, prompts, random_tokens(7, (3, 20)), np.asarray(out_BTV), mask_BT


def alone(prompt, new_T):
    """Logits of a row's tokens in a batch of its own, without a cache or padding."""
    row_BT = np.concatenate([prompt, new_T])[None]
    arange_BT = np.arange(row_BT.shape[1])[None]
    return logits(row_BT, arange_BT, np.ones_like(row_BT))[0]


@pytest.mark.cases(2)
@CHUNKS
def test_rows_of_different_lengths_continue_as_each_alone(chunks):
    cache, prompts, new_BT, prompt_BTV, mask_BT = lengths_case()
    np.testing.assert_array_equal(cache.start_B, [0, 0, 5])
    np.testing.assert_array_equal(cache.length_B, [3, 12, 12])
    out_BTV, cache = continued(cache, new_BT, chunks)
    np.testing.assert_array_equal(cache.length_B, [23, 32, 32])
    for row, prompt in enumerate(prompts):
        expected_TV = alone(prompt, new_BT[row])
        actual_TV = np.concatenate([prompt_BTV[row][mask_BT[row] > 0], out_BTV[row]])
        np.testing.assert_allclose(actual_TV, expected_TV, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(actual_TV.argmax(-1), expected_TV.argmax(-1))


@pytest.mark.parametrize("poison", [np.nan, 1e30])
@CHUNKS
def test_what_was_rolled_back_was_never_there(chunks, poison):
    cache, _, new_BT, _, _ = lengths_case()
    expected_BTV, _ = continued(cache, new_BT, chunks)
    _, longer = continued(cache, random_tokens(8, (3, 5)), (5,))
    kept_B = cache.length_B + np.array([0, 0, 2])  # the last row keeps two of the five
    rolled = longer.rollback(kept_B)
    np.testing.assert_array_equal(rolled.length_B, [3, 12, 14])
    is_free_BS = np.arange(40) >= np.asarray(rolled.length_B)[:, None]
    poisoned = jax.tree.map(
        lambda x: jnp.where(is_free_BS[..., None, None], poison, x), rolled.entries
    )
    out_BTV, _ = continued(rolled._replace(entries=poisoned), new_BT, chunks)
    np.testing.assert_allclose(out_BTV[:2], expected_BTV[:2], rtol=1e-6, atol=1e-6)
    assert np.isfinite(out_BTV).all() and np.abs(out_BTV[2] - expected_BTV[2]).max() > 1e-3


def test_rows_with_lengths_are_the_same_on_a_mesh():
    """Rows on four batch shards, kv heads on two; each shard writes its part of the cache."""
    mesh = mesh_of(data=2, expert=2, tensor=2)
    graph_def, state = nnx.split(model_of(SMALL))
    spread_def = nnx.split(nnx.eval_shape(lambda: Transformer(SMALL, mesh, jax.random.key(0))))[0]
    tokens_BT = random_tokens(shape=(4, 6))
    mask_BT = (np.arange(6) < np.array([2, 6, 3, 5])[:, None]).astype(np.int32)

    def run(definition, state):
        model = nnx.merge(definition, state)
        positions_BT = jnp.broadcast_to(jnp.arange(6), (4, 6))
        cache = model.prefill(tokens_BT, positions_BT, mask_BT, empty_cache(SMALL, 4, 12)).cache
        output = model.extend(tokens_BT[:, :3], cache)
        output = model.decode(tokens_BT[:, 3], output.cache)
        return output.hidden_BTD, output.cache

    expected, actual = (
        jax.tree.map(np.asarray, fast_jit(functools.partial(run, definition))(state))
        for definition in (graph_def, spread_def)
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), actual, expected
    )


@pytest.mark.cases(2)
@pytest.mark.parametrize("share", [1, 2, 4])
def test_the_cache_has_one_entry_per_group_and_decodes_the_same(share):
    cfg = changed(cla_share_factor=share)
    cache = empty_cache(cfg, BATCH, LENGTH)
    assert {name: entry.k_PBSKH.shape for name, entry in cache.entries.items()} == {
        "layer_0": (4 // share, BATCH, LENGTH, 2, 8)
    }
    tokens_BT = random_tokens()
    first, cache = compiled("prefill", cfg)(cache, tokens_BT[:, :8], ONES_BT[:, :8])
    second, _ = compiled("extend", cfg)(cache, tokens_BT[:, 8:])
    expected = logits(tokens_BT, ARANGE_BT, ONES_BT, cfg)
    np.testing.assert_allclose(
        np.concatenate([first, second], axis=1), expected, rtol=1e-5, atol=1e-5
    )


def test_the_cache_of_a52b_is_80_kib_a_token():
    cache = jax.eval_shape(lambda: empty_cache(presets.a52b(), 3, 1000))
    arrays = jax.tree.leaves(cache.entries)
    assert {a.dtype for a in arrays} == {jnp.dtype("bfloat16")}
    assert sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays) == 80 * 1024 * 3 * 1000
    assert cache.start_B.shape == cache.length_B.shape == (3,)


# Dropout


def attend_with_dropout(mesh, key, rate, num_heads=4, num_kv_heads=4, batch=8, length=32):
    """Queries of zero see all keys alike, and values are one: each output is the mean of the kept
    and scaled weights.
    """
    q_BTNH = np.zeros((batch, length, num_heads, 8), np.float32)
    ones_BSKH = np.ones((batch, length, num_kv_heads, 8), np.float32)
    segments_BS = np.ones((batch, length), np.int32)
    heads, kv_heads = (
        ("batch", "seq", "heads", "head_dim"),
        ("batch", "seq", "kv_heads", "head_dim"),
    )
    in_logical = (
        heads,
        kv_heads,
        kv_heads,
        Sequence((), ("batch", "seq"), None, None),
        ("batch", "heads"),
    )

    def fn(_, *args):
        return attend(*args, dropout_rate=rate, device_kind="cpu")

    fn = functools.partial(island.island(fn, mesh, {}, in_logical, heads), {})
    seed_BN = head_seeds(jax.random.key_data(key), batch, num_heads)
    return np.asarray(
        fast_jit(fn)(q_BTNH, ones_BSKH, ones_BSKH, Sequence((), segments_BS), seed_BN)
    )[..., 0]


def test_attention_dropout_drops_weights_and_scales_the_rest():
    out_BTN = attend_with_dropout(single_device_mesh(), jax.random.key(0), 0.25)
    num_keys_T1 = np.arange(1, 33)[:, None]
    kept_BTN = out_BTN * num_keys_T1 * 0.75  # a whole number of keys
    np.testing.assert_allclose(kept_BTN, np.round(kept_BTN), atol=1e-4)
    kept, seen = kept_BTN.sum(), num_keys_T1.sum() * out_BTN.size / 32
    assert kept / seen == pytest.approx(0.75, abs=4 * math.sqrt(0.25 * 0.75 / seen))
    # Sequences, queries and heads draw on their own.
    flat = np.round(kept_BTN).astype(int)
    assert (
        (flat[0] != flat[1]).any()
        and (flat[:, 0] != flat[:, 1]).any()
        and (flat[..., 0] != flat[..., 1]).any()
    )


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 1, 4), (2, 2, 2)])
def test_attention_dropout_is_the_same_on_every_mesh(sizes):
    alone = attend_with_dropout(single_device_mesh(), jax.random.key(1), 0.25)
    np.testing.assert_array_equal(
        attend_with_dropout(mesh_of(*sizes), jax.random.key(1), 0.25), alone
    )
    assert (alone != attend_with_dropout(single_device_mesh(), jax.random.key(2), 0.25)).any()


def test_drop_zeroes_a_share_and_keeps_the_mean():
    x = jnp.full((100, 100), 3.0)
    for dtype in (jnp.float32, jnp.bfloat16):
        dropped = np.asarray(stack.drop(x.astype(dtype), 0.2, jax.random.key(0)), np.float64)
        assert set(np.unique(dropped)) == {0.0, 3.75}
        assert (dropped == 0).mean() == pytest.approx(0.2, abs=0.016)  # four standard deviations


@functools.cache
def compiled_training(cfg):
    model = model_of(cfg)
    positions_BT, segments_BT = jnp.asarray(ARANGE_BT), jnp.asarray(ONES_BT)

    def hidden(tokens_BT, key, is_training):
        return model(
            tokens_BT, positions_BT, segments_BT, key=key, is_training=is_training
        ).hidden_BTD

    return fast_jit(hidden, static_argnums=2)


@pytest.mark.parametrize("kind", ["attention_dropout", "hidden_dropout"])
def test_dropout_acts_in_training_only_and_by_its_key(kind):
    tokens_BT = random_tokens()
    hidden = compiled_training(changed(**{kind: 0.3}))
    off = compiled_training(SMALL)(tokens_BT, jax.random.key(0), True)
    np.testing.assert_array_equal(hidden(tokens_BT, jax.random.key(0), False), off)
    first, again, other = (hidden(tokens_BT, jax.random.key(seed), True) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (
        np.abs(np.asarray(first) - off).max() > 0.01
        and np.abs(np.asarray(first) - other).max() > 0.01
    )


def test_every_layer_draws_its_own_dropout(monkeypatch):
    seen = []
    original = stack.drop

    def spy(x, rate, key):
        jax.debug.callback(
            lambda data: seen.append(tuple(np.asarray(data).ravel().tolist())),
            jax.random.key_data(key),
        )
        return original(x, rate, key)

    def spy_on_seeds(data, *sizes):
        jax.debug.callback(
            lambda data: seen.append(tuple(np.asarray(data).ravel().tolist())), data
        )
        return head_seeds(data, *sizes)

    monkeypatch.setattr(stack, "drop", spy)
    monkeypatch.setattr(attention, "head_seeds", spy_on_seeds)
    cfg = changed(attention_dropout=0.1, hidden_dropout=0.1)
    hidden = compiled_training.__wrapped__(cfg)
    jax.block_until_ready(hidden(random_tokens(), jax.random.key(0), True))
    jax.effects_barrier()
    # Per layer: the two residual branches, and the seed of attention.
    assert len(seen) == len(set(seen)) == 4 * 3


@pytest.mark.parametrize("kind", ["attention_dropout", "hidden_dropout"])
def test_dropout_without_a_key_is_refused(kind):
    model = model_of(changed(**{kind: 0.3}))
    with pytest.raises(ValueError, match=r"dropout needs a key; pass key=, or is_training=False"):
        model(random_tokens(), ARANGE_BT, ONES_BT, is_training=True)
    jax.eval_shape(
        lambda: model(random_tokens(), jnp.asarray(ARANGE_BT), jnp.asarray(ONES_BT)).hidden_BTD
    )


def test_hidden_dropout_zero_and_scale_reach_the_residual():
    # With a rate so high that nearly all is dropped, what is left is the embedding.
    cfg = changed(hidden_dropout=0.9999)
    tokens_BT = random_tokens()
    out_BTD = compiled_training(cfg)(tokens_BT, jax.random.key(0), True)
    model = model_of(cfg)
    embedded_BTD = np.asarray(model.embed.embedding_VD[...])[tokens_BT]
    expected_BTD = numpy_rms(
        embedded_BTD, np.asarray(model.final_norm.scale_D[...]), cfg.rms_norm_eps
    )
    assert (np.abs(np.asarray(out_BTD) - expected_BTD).max(-1) < 1e-4).mean() > 0.9


# Rotary embedding


def test_alpha_bases_of_the_released_models():
    # docs/model.md, RoPE; the last frequency is base^-(78 / 80).
    for cfg, base in ((presets.a52b_instruct(), 11_937_766.4), (presets.a52b(), 1.3434e9)):
        inverse = np.asarray(rope.inverse_frequencies(cfg), np.float64)
        assert inverse[0] == 1.0 and inverse.shape == (40,)
        assert inverse[-1] ** (-80 / 78) == pytest.approx(base, rel=1e-4)
        np.testing.assert_allclose(
            np.log(inverse), -np.arange(40) / 40 * math.log(base), rtol=1e-4, atol=1e-6
        )


def test_plain_and_linear_round_as_the_official_code_does():
    plain, linear = (
        changed(rope_type=kind, rope_factor=4.0, head_dim=16) for kind in ("plain", "linear")
    )
    exact = 10_000.0 ** (-np.arange(0, 16, 2) / 16)
    rounded = exact.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    for cfg in (plain, linear):
        np.testing.assert_array_equal(rope.inverse_frequencies(cfg), rounded)
    positions_BT = np.arange(512, dtype=np.int32)[None]
    cos_BTh, sin_BTh = (np.asarray(a) for a in rope.cos_sin(positions_BT, plain))
    assert len(np.unique(cos_BTh[0, :, 3])) == 512
    np.testing.assert_allclose(
        cos_BTh[0], np.cos(np.arange(512)[:, None] * rounded.astype(np.float64)), atol=5e-5
    )
    cos_BTh, sin_BTh = (np.asarray(a) for a in rope.cos_sin(positions_BT, linear))
    # Positions above 256 are no longer exact in bfloat16: 512 of them have 385 values (those to
    # 256, then every second one).
    assert len(np.unique(np.concatenate([cos_BTh, sin_BTh], axis=-1)[0], axis=0)) == 385
    np.testing.assert_array_equal(cos_BTh, cos_BTh.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert np.abs(cos_BTh[0, :, 3] - np.cos(np.arange(512) / 4 * exact[3])).max() < 0.5


@pytest.mark.parametrize("kind", ["alpha", "plain"])
def test_rotation_keeps_norms_and_depends_on_distance_only(kind):
    cfg = changed(rope_type=kind, rope_alpha=50.0)
    x_TH, y_TH = np.random.default_rng(0).normal(size=(2, 20, 8)).astype(np.float32)

    def rotated(x_TH, shift):
        tables = rope.cos_sin(jnp.arange(20, dtype=jnp.int32)[None] + shift, cfg)
        return np.asarray(rope.rotate(jnp.asarray(x_TH)[None, :, None], tables), np.float64)[
            0, :, 0
        ]

    np.testing.assert_allclose(
        np.linalg.norm(rotated(x_TH, 0), axis=-1), np.linalg.norm(x_TH, axis=-1), rtol=1e-6
    )
    products = rotated(x_TH, 0) @ rotated(y_TH, 0).T
    np.testing.assert_allclose(rotated(x_TH, 1000) @ rotated(y_TH, 1000).T, products, atol=2e-3)
    assert np.abs(rotated(x_TH, 3) @ rotated(y_TH, 0).T - products).max() > 0.5


def test_rotation_turns_halves_and_not_neighbours():
    x_BTNH = jnp.asarray([1.0, 0, 0, 0, 0, 0, 0, 0])[None, None, None]
    tables = rope.cos_sin(jnp.asarray([[1]]), SMALL)
    np.testing.assert_allclose(
        rope.rotate(x_BTNH, tables)[0, 0, 0],
        [math.cos(1), 0, 0, 0, math.sin(1), 0, 0, 0],
        atol=1e-6,
    )


def test_rotation_is_computed_in_float32_and_returned_in_the_input_dtype():
    x_BTNH = jax.random.normal(jax.random.key(0), (1, 4, 2, 8), jnp.bfloat16)
    tables = rope.cos_sin(jnp.arange(4)[None], SMALL)
    assert {a.dtype for a in tables} == {jnp.dtype("float32")}
    rotated = rope.rotate(x_BTNH, tables)
    assert rotated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        rotated, rope.rotate(x_BTNH.astype(jnp.float32), tables).astype(jnp.bfloat16)
    )


# Norms


def test_rms_norm_casts_before_it_scales():
    rng = np.random.default_rng(0)
    norm = RmsNorm(64, 1e-5)
    norm.scale_D[...] = jnp.asarray(1 + 0.3 * rng.normal(size=64), jnp.float32)
    for dtype in (jnp.float32, ml_dtypes.bfloat16):
        x_BTD = (3 * rng.normal(size=(2, 5, 64))).astype(dtype)
        x64 = x_BTD.astype(np.float64)
        normal = (x64 / np.sqrt((x64 * x64).mean(-1, keepdims=True) + 1e-5)).astype(dtype)
        expected = (normal * np.asarray(norm.scale_D[...]).astype(dtype)).astype(dtype)
        out = norm(jnp.asarray(x_BTD))
        assert out.dtype == dtype
        if dtype is jnp.float32:
            np.testing.assert_allclose(out, expected, rtol=1e-6)
        else:  # the same rounding but where float32 statistics fall on the other side of a tie
            assert (np.asarray(out) == expected).mean() > 0.99


def test_norm_statistics_are_float32_and_eps_guards_zero():
    x = jnp.full((1, 4096), 1e-2, jnp.bfloat16)
    np.testing.assert_array_equal(rms_normalize(x * 0, 1e-5), np.zeros((1, 4096)))
    assert (
        np.abs(np.asarray(rms_normalize(x, 1e-12), np.float32) - 1).max() < 0.01
    )  # summed in bfloat16 it would be 4 times off
    np.testing.assert_allclose(
        rms_normalize(jnp.asarray([[3e-3, 4e-3]]), 1e-5),
        np.asarray([[3e-3, 4e-3]]) / math.sqrt(2.25e-5),
        rtol=1e-5,
    )


# Embedding, head and dtypes


def test_the_padding_row_is_zero_at_first_and_gets_no_gradient_from_the_lookup():
    embed = Embedding(SMALL, single_device_mesh(), jax.random.key(0))
    table_VD = np.asarray(embed.embedding_VD[...])
    assert (
        not table_VD[SMALL.pad_token_id].any()
        and np.abs(table_VD).sum(-1).astype(bool).sum() == SMALL.vocab_size - 1
    )
    assert table_VD.std() == pytest.approx(SMALL.init_std, rel=0.1)
    without_pad = Embedding(changed(pad_token_id=-1), single_device_mesh(), jax.random.key(0))
    assert np.asarray(without_pad.embedding_VD[...])[SMALL.pad_token_id].any()


@pytest.mark.cases(1)
@pytest.mark.parametrize("tie", [True, False])
def test_the_padding_row_learns_through_a_tied_head_only(tie):
    cfg = changed(tie_embeddings=tie)
    model = model_of(cfg)
    graph_def, state = nnx.split(model)
    tokens_BT = random_tokens()
    tokens_BT[:, 2:5] = cfg.pad_token_id

    @fast_jit
    @jax.grad
    def gradient(state):
        model = nnx.merge(graph_def, state)
        return jnp.sum(
            jnp.sin(
                model.logits(
                    model(tokens_BT, jnp.asarray(ARANGE_BT), jnp.asarray(ONES_BT)).hidden_BTD
                )
            )
        )

    grads = nnx.to_pure_dict(gradient(state))
    row_D = np.asarray(grads["embed"]["embedding_VD"])[cfg.pad_token_id]
    assert row_D.any() == tie
    assert np.asarray(grads["embed"]["embedding_VD"])[tokens_BT[0, 0]].any()
    if tie:  # exactly the head's part: sum over tokens of cos(logit) * hidden
        hidden_BTD = np.asarray(model(tokens_BT, ARANGE_BT, ONES_BT).hidden_BTD, np.float64)
        logit_BT = np.asarray(logits(tokens_BT, ARANGE_BT, ONES_BT), np.float64)[
            ..., cfg.pad_token_id
        ]
        np.testing.assert_allclose(
            row_D, np.einsum("BT,BTD->D", np.cos(logit_BT), hidden_BTD), rtol=1e-3, atol=1e-3
        )


def test_an_untied_head_is_its_own_matrix():
    cfg = changed(tie_embeddings=False)
    model = model_of(cfg)
    hidden_BTD = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    np.testing.assert_allclose(
        model.logits(jnp.asarray(hidden_BTD)),
        hidden_BTD @ np.asarray(model.lm_head.w_VD[...]).T,
        rtol=1e-4,
        atol=1e-4,
    )
    tied = model_of(SMALL)
    np.testing.assert_allclose(
        tied.logits(jnp.asarray(hidden_BTD)),
        hidden_BTD @ np.asarray(tied.embed.embedding_VD[...]).T,
        rtol=1e-4,
        atol=1e-4,
    )


def test_bfloat16_runs_close_to_float32_and_keeps_float32_where_it_must():
    moe = MoeConfig(num_experts=4, num_shared_experts=1, dispatch="dropless")
    cfg = changed(num_layers=2, moe=moe)
    low = dataclasses.replace(cfg, dtype="bfloat16")
    tokens_BT = random_tokens()
    run = {}
    for name, one in (("float32", cfg), ("bfloat16", low)):
        model = model_of(one)
        forward = fast_jit(
            lambda tokens, model=model: model(tokens, jnp.asarray(ARANGE_BT), jnp.asarray(ONES_BT))
        )
        run[name] = output = forward(tokens_BT)
        assert output.hidden_BTD.dtype == name
        assert model.logits(output.hidden_BTD).dtype == jnp.float32
        assert {figure.dtype for figure in output.stats.values()} == {jnp.dtype("float32")}
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    low_BTD, high_BTD = (
        np.asarray(run[name].hidden_BTD, np.float64) for name in ("bfloat16", "float32")
    )
    difference_BT = np.linalg.norm(low_BTD - high_BTD, axis=-1) / np.linalg.norm(high_BTD, axis=-1)
    assert (
        1e-3 < np.median(difference_BT) < 0.03
    )  # a token near a tie may go to another expert; most must not


@pytest.mark.parametrize("few_bits", [None, "int8"])
def test_pages_are_read_alike_on_all_devices(few_bits):
    """A TPU takes slices in the place of gathers."""
    rng = np.random.default_rng(0)
    pages = kv_cache.empty((2, 6, 4, 2, 8), jnp.float32, few_bits)
    pages = jax.tree.map(
        lambda x: (rng.normal(size=x.shape) * (30 if x.dtype == jnp.int8 else 0.1)).astype(
            x.dtype
        ),
        pages,
    )
    pages = jax.tree.map(jnp.asarray, pages)
    q_BTNH = jnp.asarray(rng.normal(size=(2, 17, 4, 8)), jnp.float32)
    table_BN = jnp.asarray(rng.integers(1, 6, (2, 5)))
    end_BT = jnp.asarray(rng.integers(1, 20, (2, 17)))
    found = [
        paged.paged_attention(q_BTNH, pages, table_BN, jnp.int32(1), end_BT, device_kind=kind)
        for kind in ("cpu", "TPU v5")
    ]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
