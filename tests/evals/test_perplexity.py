"""Whole texts: every token counts once, in windows as lm-eval has them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax.evals import perplexity
from hunyuan_jax.evals.answers import Failed

PREFIX = 1
ROWS = [[(7 * i + 5) % 300 + 10 for i in range(n)] for n in (0, 1, 40, 96, 97, 250)]


@settings(max_examples=100)
@given(num=st.integers(0, 60), size=st.integers(1, 12))
def test_windows_hold_every_token_once(num, size):
    ids = list(range(100, 100 + num))
    found = perplexity.windows(ids, PREFIX, size)
    assert [token for window in found for token in window.continuation] == ids
    for window in found:
        assert len(window.context) + len(window.continuation) - 1 <= size
        assert len(window.context) >= 1
        whole = [*window.context, *window.continuation]
        text = [PREFIX, *ids]
        start = text.index(whole[0])
        assert text[start : start + len(whole)] == whole
    if num > size:  # the last window reaches back
        assert len(found[-1].context) + len(found[-1].continuation) == size + 1


@settings(max_examples=50)
@given(num=st.integers(0, 60), size=st.integers(1, 12))
def test_windows_are_those_of_lm_eval(num, size):
    utils = pytest.importorskip("lm_eval.utils")
    ids = list(range(100, 100 + num))
    expected = map(
        utils.make_disjoint_window, utils.get_rolling_token_windows(ids, PREFIX, size, 1)
    )
    assert [tuple(window) for window in perplexity.windows(ids, PREFIX, size)] == list(expected)


def logprobs(lm, row):
    """Of each token of a row, by windows of 96 from single forwards."""
    parts = [np.zeros(0)]
    for context, continuation in perplexity.windows(row, lm.tokenizer.bos_id, 96):
        whole = [*context, *continuation]
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(whole) - 1] = whole[:-1]
        logits_V = np.asarray(lm.model.logits(padded)[0], np.float64)
        logits_V = logits_V[len(context) - 1 : len(whole) - 1]
        peak = logits_V.max(-1)
        total = peak + np.log(np.exp(logits_V - peak[:, None]).sum(-1))
        parts.append(logits_V[np.arange(len(continuation)), continuation] - total)
    return np.concatenate(parts)


def test_texts_longer_than_the_model_are_scored_whole(lm, answers):
    found = perplexity.score_rolling(answers, ROWS, lm.tokenizer.bos_id)
    for row, scored in zip(ROWS, found, strict=True):
        np.testing.assert_allclose(scored.logprobs, logprobs(lm, row), atol=1e-4)
        assert scored.is_greedy is None  # the most likely tokens are not computed


def test_figures_are_sums_over_all_texts(lm, answers):
    texts = ["The quick brown fox.", "Zwölf Boxkämpfer jagen Viktor. " * 6]
    rows = [lm.tokenizer.encode(text) for text in texts]
    expected = -np.concatenate([logprobs(lm, row) for row in rows])
    found = perplexity.measure(answers, texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert (found["texts"], found["bytes"], found["tokens"]) == (2, num_bytes, len(expected))
    assert found["nats_per_token"] == pytest.approx(expected.mean(), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected.mean()), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(
        expected.sum() / math.log(2) / num_bytes, rel=1e-5
    )


def test_loss_by_position_counts_the_tokens_before(lm, answers):
    texts = ["The quick brown fox jumps over the lazy dog. " * 6]
    (row,) = (lm.tokenizer.encode(text) for text in texts)
    assert len(row) > 96
    of_token = -logprobs(lm, row)
    before = [
        len(context) + i
        for context, continuation in perplexity.windows(row, lm.tokenizer.bos_id, 96)
        for i in range(len(continuation))
    ]
    found = perplexity.measure(answers, texts)["by_position"]
    assert [bucket[:2] for bucket in found][-2:] == [(32, 63), (64, 96)]
    assert sum(num for *_, num, _ in found) == len(row)
    for first, last, num, loss in found:
        inside = [x for x, place in zip(of_token, before, strict=True) if first <= place <= last]
        assert (num, loss) == (len(inside), pytest.approx(np.mean(inside), abs=1e-4))


def test_a_shorter_window_reads_less(lm, answers):
    text = "The quick brown fox jumps over the lazy dog."
    found = perplexity.measure(answers, [text], max_length=8)
    assert found["by_position"][-1][:2] == (8, 8)
    assert found["nats_per_token"] != perplexity.measure(answers, [text])["nats_per_token"]


def test_a_text_without_tokens_has_no_figures(answers):
    found = perplexity.measure(answers, [""])
    assert found == {"texts": 1, "tokens": 0, "bytes": 0, "failed": []}


def test_a_text_that_fails_leaves_the_others(answers):
    good, bad = perplexity.score_rolling(answers, [ROWS[1], [5000]], PREFIX)
    assert isinstance(bad, Failed) and len(good.logprobs) == 1
