"""The loss over parts of the vocabulary: values and gradients are those of whole logits on every
mesh, and no whole logits exist.

Letters: B batch, T tokens, M = B * T, D model, V vocabulary.
"""

import functools
import math
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers import embedding, loss
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel import rules, xla_workarounds
from support.models import assert_close, cross_entropy, fast_jit, filled, mesh_of

BATCH, LENGTH, WIDTH = 8, 6, 16


def table_layout(mesh, vocab):
    return rules.first_that_divides(mesh, (vocab, WIDTH), embedding.TABLES, "the table of tokens")


def limit_for(num_chunks, mesh, vocab, num_tokens=BATCH * LENGTH):
    """The limit on a chunk's bytes with which a table is multiplied in `num_chunks` chunks."""
    name = table_layout(mesh, vocab)[0]
    shards = math.prod(mesh.shape[axis] for axis in rules.RULES[name].storage)
    rows = vocab // shards // mesh.shape["tensor"]
    tokens = num_tokens // math.prod(mesh.shape[axis] for axis in rules.RULES["batch"].compute)
    return tokens * shards * -(-rows // num_chunks) * 4


def losses(w_VD, hidden_BTD, targets_BT, mesh):
    table_VD = nnx.Param(w_VD, dims=table_layout(mesh, w_VD.shape[0]))
    return loss.token_losses(table_VD, hidden_BTD, targets_BT, mesh)


def random_case(vocab, scale=1.0):
    """(table, hidden, targets, weights), the targets with the first and the last token."""
    rng = np.random.default_rng(0)
    w_VD, hidden_BTD = (
        rng.normal(size=(vocab, WIDTH)),
        scale * rng.normal(size=(BATCH, LENGTH, WIDTH)),
    )
    targets_BT = rng.integers(0, vocab, (BATCH, LENGTH)).astype(np.int32)
    targets_BT[0, :2] = 0, vocab - 1
    return (
        w_VD.astype(np.float32),
        hidden_BTD.astype(np.float32),
        targets_BT,
        (rng.random((BATCH, LENGTH)) < 0.8).astype(np.float32),
    )


# (data, expert, tensor, replica), vocabulary, parts.  42 rows do not divide over 4 expert shards:
# only the tensor axis splits them.
CASES = [
    ((1, 1, 1), 48, 1),
    ((1, 1, 1), 48, 4),
    ((1, 1, 1), 48, 48),
    ((2, 4, 1), 48, 3),
    ((1, 2, 4), 48, 6),
    ((2, 1, 2, 2), 48, 4),
    ((2, 2, 2), 48, 1),
    ((2, 4, 1), 42, 7),
    ((1, 4, 2), 42, 3),
    # 47 and 23 are prime: the last part is filled up.
    ((1, 1, 1), 47, 5),
    ((1, 1, 2), 94, 4),
    ((2, 2, 2), 92, 4),
]


@pytest.mark.cases(5)
@pytest.mark.parametrize(("sizes", "vocab", "num_chunks"), CASES)
def test_losses_and_gradients_are_those_of_whole_logits(monkeypatch, sizes, vocab, num_chunks):
    mesh = mesh_of(*sizes)
    monkeypatch.setattr(xla_workarounds, "MAX_LOGITS_BYTES", limit_for(num_chunks, mesh, vocab))
    used, original = [], loss.num_chunks
    monkeypatch.setattr(loss, "num_chunks", lambda *args: used.append(original(*args)) or used[-1])
    w_VD, hidden_BTD, targets_BT, weights_BT = random_case(vocab)
    layout = table_layout(mesh, vocab)
    assert layout == embedding.TABLES[vocab == 42 or (vocab == 94 and sizes[1] > 1)]

    def ours(w_VD, hidden_BTD):
        loss_BT = losses(w_VD, hidden_BTD, targets_BT, mesh)
        return loss.mean_loss(loss_BT, jnp.asarray(weights_BT)), loss_BT

    def whole(w_VD, hidden_BTD):
        logits_BTV = hidden_BTD @ w_VD.T
        nll_BT = -jnp.take_along_axis(
            jax.nn.log_softmax(logits_BTV), targets_BT[..., None], axis=-1
        )[..., 0]
        return cross_entropy(logits_BTV, targets_BT, jnp.asarray(weights_BT)), nll_BT

    placed = (
        jax.device_put(w_VD, rules.stored_sharding(mesh, layout, w_VD.shape)),
        jax.device_put(hidden_BTD, rules.sharding(mesh, ("batch", "seq", "embed"))),
    )
    (mean, loss_BT), grads = fast_jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(
        *placed
    )
    assert set(used) == {num_chunks}
    (expected_mean, expected_BT), expected = jax.value_and_grad(
        whole, argnums=(0, 1), has_aux=True
    )(w_VD, hidden_BTD)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5)
    np.testing.assert_allclose(loss_BT, expected_BT, rtol=1e-4, atol=1e-5)
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert_close(grad, expected_grad, 1e-5)


@pytest.mark.parametrize(
    ("sizes", "vocab", "num_chunks"), [CASES[1], CASES[6], CASES[9], CASES[10]]
)
def test_figures_are_those_of_whole_logits(monkeypatch, sizes, vocab, num_chunks):
    mesh = mesh_of(*sizes)
    monkeypatch.setattr(xla_workarounds, "MAX_LOGITS_BYTES", limit_for(num_chunks, mesh, vocab))
    w_VD, hidden_BTD, targets_BT, weights_BT = random_case(vocab)
    layout = table_layout(mesh, vocab)
    logits_BTV = hidden_BTD @ w_VD.T
    targets_BT[:4] = logits_BTV[:4].argmax(-1)

    def ours(w_VD, hidden_BTD):
        figures = loss.token_figures(nnx.Param(w_VD, dims=layout), hidden_BTD, targets_BT, mesh)
        # Only the loss has a gradient.
        return loss.mean_loss(sum(figures), jnp.asarray(weights_BT)), figures

    def plain(w_VD, hidden_BTD):
        loss_BT = losses(w_VD, hidden_BTD, targets_BT, mesh)
        return loss.mean_loss(loss_BT, jnp.asarray(weights_BT)), loss_BT

    placed = (
        jax.device_put(w_VD, rules.stored_sharding(mesh, layout, w_VD.shape)),
        jax.device_put(hidden_BTD, rules.sharding(mesh, ("batch", "seq", "embed"))),
    )
    (_, figures), grads = fast_jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(*placed)
    (_, loss_BT), plain_grads = fast_jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(*placed)
    np.testing.assert_array_equal(figures.loss, loss_BT)
    for grad, plain_grad in zip(grads, plain_grads, strict=True):
        np.testing.assert_array_equal(grad, plain_grad)
    log_p_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    np.testing.assert_array_equal(figures.is_top, logits_BTV.argmax(-1) == targets_BT)
    entropy_BT = -(np.exp(log_p_BTV) * log_p_BTV).sum(-1)
    np.testing.assert_allclose(figures.entropy, entropy_BT, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(figures.mean_logit, logits_BTV.mean(-1), rtol=1e-4, atol=1e-5)


def test_huge_logits_and_bfloat16_activations_stay_finite_and_near(monkeypatch):
    mesh = mesh_of(1, 2, 1)
    monkeypatch.setattr(xla_workarounds, "MAX_LOGITS_BYTES", limit_for(4, mesh, 48))
    w_VD, hidden_BTD, targets_BT, _ = random_case(
        48, scale=100.0
    )  # logits of a few thousand: exp overflows without the maximum
    hidden_BTD = jnp.asarray(hidden_BTD, jnp.bfloat16)
    total = lambda w_VD, hidden_BTD: losses(w_VD, hidden_BTD, targets_BT, mesh).sum()  # noqa: E731
    value, (dw_VD, dhidden_BTD) = fast_jit(jax.value_and_grad(total, argnums=(0, 1)))(
        w_VD, hidden_BTD
    )
    assert (dw_VD.dtype, dhidden_BTD.dtype, value.dtype) == (
        jnp.float32,
        jnp.bfloat16,
        jnp.float32,
    )

    def whole(w_VD, hidden_BTD):
        logits_BTV = hidden_BTD @ w_VD.astype(jnp.bfloat16).astype(jnp.float32).T
        return -jnp.take_along_axis(
            jax.nn.log_softmax(logits_BTV), targets_BT[..., None], axis=-1
        ).sum()

    expected, gradients = jax.value_and_grad(whole, argnums=(0, 1))(
        jnp.asarray(w_VD), hidden_BTD.astype(jnp.float32)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad, expected_grad in zip(
        (dw_VD, dhidden_BTD.astype(jnp.float32)), gradients, strict=True
    ):
        assert_close(grad, expected_grad, 1e-2)


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("tie", "vocab", "sizes"), [(True, 48, (2, 2, 2)), (False, 42, (1, 4, 2))]
)
def test_tied_and_untied_models_learn_through_the_right_table(monkeypatch, tie, vocab, sizes):
    mesh = mesh_of(*sizes)
    monkeypatch.setattr(xla_workarounds, "MAX_LOGITS_BYTES", limit_for(3, mesh, vocab))
    cfg = ModelConfig(
        vocab,
        WIDTH,
        24,
        1,
        num_heads=4,
        num_kv_heads=4,
        head_dim=4,
        max_position=LENGTH,
        tie_embeddings=tie,
    )
    graph_def, state = nnx.split(
        filled(functools.partial(Transformer, cfg, mesh, jax.random.key(0)))
    )
    _, _, targets_BT, weights_BT = random_case(vocab)
    positions_BT = jnp.broadcast_to(jnp.arange(LENGTH), targets_BT.shape)

    def loss_of(params, in_parts):
        model = nnx.merge(graph_def, params)
        hidden_BTD = model(
            jnp.asarray(targets_BT), positions_BT, jnp.ones_like(positions_BT)
        ).hidden_BTD
        if in_parts:
            return loss.mean_loss(model.token_losses(hidden_BTD, targets_BT), weights_BT)
        return cross_entropy(model.logits(hidden_BTD), targets_BT, weights_BT)

    @fast_jit
    def both(params):
        return [jax.value_and_grad(loss_of)(params, in_parts) for in_parts in (True, False)]

    (value, grads), (expected, expected_grads) = both(nnx.to_pure_dict(state))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert ("lm_head" in grads) == (not tie)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), grads, expected_grads)


# How many parts


@settings(derandomize=True)
@given(
    num_tokens=st.integers(1, 10**6),
    num_rows=st.integers(1, 3000),
    num_shards=st.sampled_from([1, 2, 16]),
)
def test_parts_keep_the_limit_and_are_divisors_unless_those_are_many(
    num_tokens, num_rows, num_shards
):
    def fits(rows):
        return 4 * num_tokens * num_shards * rows <= xla_workarounds.MAX_LOGITS_BYTES

    n = loss.num_chunks(num_tokens, num_rows, num_shards)
    rows = loss.rows_of_chunk(num_rows, n)
    assert 1 <= n <= num_rows <= n * rows and (fits(rows) or rows == 1)
    needed = next((n for n in range(1, num_rows) if fits(-(-num_rows // n))), num_rows)
    divisor = next(n for n in range(needed, num_rows + 1) if num_rows % n == 0)
    assert n == divisor if divisor <= 2 * needed else n <= 2 * needed


def test_the_vocabularies_of_the_family_are_taken_in_few_parts():
    # 8192 tokens on a chip: 128167 rows were 9859 parts of 13, 120818 were 193 of 626.
    for vocab, most in ((128_512, 18), (129_024, 18), (128_167, 17), (120_818, 16)):
        n = loss.num_chunks(8192, vocab, 1)
        assert n <= most and loss.rows_of_chunk(vocab, n) * n < 1.05 * vocab


# Memory


def largest_array(jaxpr):
    """Elements of the largest array that any operation in a jaxpr makes, inner ones included."""
    largest = 0
    for eqn in jaxpr.eqns:
        largest = max([largest, *(math.prod(var.aval.shape) for var in eqn.outvars)])
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            largest = max(largest, largest_array(inner))
    return largest


def test_no_array_of_all_tokens_and_the_whole_vocabulary_exists(monkeypatch):
    mesh, vocab, length = mesh_of(), 512, 64
    num_tokens = BATCH * length
    targets_BT = np.zeros((BATCH, length), np.int32)
    arguments = (jnp.zeros((vocab, WIDTH)), jnp.zeros((BATCH, length, WIDTH)))

    def largest(num_chunks):
        """(in the traced program, in the compiled one)"""
        monkeypatch.setattr(
            xla_workarounds, "MAX_LOGITS_BYTES", limit_for(num_chunks, mesh, vocab, num_tokens)
        )
        step = jax.value_and_grad(
            lambda w_VD, hidden_BTD: losses(w_VD, hidden_BTD, targets_BT, mesh).sum(),
            argnums=(0, 1),
        )
        text = fast_jit(step).lower(*arguments).compile().as_text()
        shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text)
        return largest_array(jax.make_jaxpr(step)(*arguments).jaxpr), max(
            math.prod(map(int, shape.split(","))) for shape in shapes
        )

    assert (
        min(largest(1)) >= num_tokens * vocab
    )  # what the test looks for is there when the vocabulary is one part
    assert max(largest(8)) == num_tokens * vocab // 8
