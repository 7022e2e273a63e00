"""Log-probabilities and texts of many prompts, against the model's logits."""

import dataclasses

import jax
import numpy as np
import pytest

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.evals.answers import GREEDY, Failed, Prompt

CONTEXT = [(7 * i + 5) % 300 + 10 for i in range(40)]


def expected(lm, context, continuation, max_length=96):
    """(log-probabilities, whether greedy) from one forward over all tokens that count."""
    row = [*context, *continuation][-max_length - 1 :]
    padded = np.zeros((1, 96), np.int32)
    padded[0, : len(row) - 1] = row[:-1]
    logprobs_SV = np.asarray(jax.nn.log_softmax(lm.model.logits(padded)[0]))
    logprobs_TV = logprobs_SV[len(row) - 1 - len(continuation) : len(row) - 1]
    picked_T = logprobs_TV[np.arange(len(continuation)), continuation]
    return picked_T, bool((logprobs_TV.argmax(-1) == continuation).all())


def assert_scored(lm, answers, pairs):
    for (context, continuation), found in zip(pairs, answers.scores(pairs), strict=True):
        logprobs, is_greedy = expected(lm, context, continuation)
        np.testing.assert_allclose(found.logprobs, logprobs, atol=1e-4)
        assert found.logprob == pytest.approx(logprobs.sum(), abs=1e-4)
        assert found.is_greedy == is_greedy


def best(lm, context):
    padded = np.zeros((1, 96), np.int32)
    padded[0, : len(context)] = context
    return np.argsort(-np.asarray(lm.model.logits(padded)[0, len(context) - 1]))


@pytest.mark.heavy
def test_scores_come_in_the_order_of_the_pairs(lm, answers):
    likely = int(best(lm, CONTEXT)[0])
    pairs = [
        (CONTEXT[:3], [20]),
        (CONTEXT, [11, 12, 13]),
        (CONTEXT, [11, 12, 14]),
        (CONTEXT, [likely]),
        (CONTEXT[:1], [30, 31]),
        (CONTEXT, [11]),
        (CONTEXT[:30], [*CONTEXT[30:], 11, 12, 13]),
    ]
    assert_scored(lm, answers, pairs)
    assert answers.scores(pairs)[3].is_greedy


@pytest.mark.heavy
def test_continuations_of_one_token_are_computed_once(lm, answers):
    """Likely ones are told by one forward, others come out of the cache."""
    order = best(lm, CONTEXT)
    likely = [(CONTEXT, [int(token)]) for token in order[:10]]
    before = answers.stats()
    assert_scored(lm, answers, likely)
    after = answers.stats()
    assert after.prompt_tokens - before.prompt_tokens <= len(CONTEXT)
    unlikely = [(CONTEXT, [int(token)]) for token in order[[0, 50, 200]]]
    assert_scored(lm, answers, unlikely)
    assert answers.stats().prompt_tokens - after.prompt_tokens <= 3 * 8


def test_a_shared_context_is_computed_once(lm, answers):
    context = [(11 * i + 3) % 300 + 10 for i in range(48)]
    before = answers.stats()
    assert_scored(lm, answers, [(context, [i, i + 1, i + 2]) for i in range(10, 16)])
    # Five pages of eight tokens are shared; the token behind the sixth is scored.  On two cores a
    # small mixture has two lanes, each with pages of its own.
    assert answers.stats().prompt_tokens - before.prompt_tokens <= 2 * 40 + 6 * 10


def test_a_pair_that_is_too_long_keeps_its_end(lm, answers):
    long = [(13 * i + 1) % 300 + 10 for i in range(150)]
    assert_scored(lm, answers, [(long, [20, 21]), (long, [20, 22]), (long[:1], long[1:97])])


def test_a_pair_that_cannot_be_scored_fails_alone(lm, answers):
    good = (CONTEXT, [12, 13])
    found = answers.scores([([], [1]), (CONTEXT, []), ([1], CONTEXT * 3), good, ([1], [5000])])
    assert [isinstance(one, Failed) for one in found] == [True, True, True, False, True]
    assert "120 of continuation; there must be at least 1 and 1 to 96" in found[2].reason
    assert "id 5000" in found[4].reason
    np.testing.assert_allclose(found[3].logprobs, expected(lm, *good)[0], atol=1e-4)


def test_progress_is_told_of_every_pair(answers):
    done = []
    answers.scores([(CONTEXT, [i]) for i in range(10, 14)] + [([], [1])], done.append)
    assert sorted(done) == [0, 1, 2, 3, 4]


def limited(num, **changes):
    return dataclasses.replace(GREEDY, max_new_tokens=num, stop_ids=None, **changes)


def test_texts_are_greedy_and_in_the_order_of_the_prompts(lm, answers):
    prompts = [CONTEXT[:n] for n in (5, 30, 11)]
    found = answers.texts([Prompt(ids, limited(4)) for ids in prompts])
    for ids, text in zip(prompts, found, strict=True):
        row = list(ids)
        for _ in range(4):
            row.append(int(best(lm, row)[0]))
        assert not set(lm.stop_ids) & set(row[len(ids) :])
        assert text == lm.tokenizer.decode(row[len(ids) :], skip_special=True)


def test_a_stop_string_is_not_part_of_the_text(lm, answers):
    (whole,) = answers.texts([Prompt(CONTEXT, limited(12))])
    stop = whole[len(whole) // 2 :][:2]
    (cut,) = answers.texts([Prompt(CONTEXT, limited(12), stop=("\0never", stop))])
    assert cut == whole[: whole.index(stop)]


def test_the_name_of_a_special_token_stops(lm, answers):
    name = lm.tokenizer.special_names[-1]
    biased = limited(8, logit_bias=((lm.tokenizer.special_id(name), 1e4),))
    before = answers.stats().generated_tokens
    assert answers.texts([Prompt(CONTEXT, biased, stop=(name,))]) == [""]
    assert answers.stats().generated_tokens - before == 1


def test_writing_ends_when_the_rest_is_of_no_interest(lm, answers):
    (whole,) = answers.texts([Prompt(CONTEXT, limited(40))])
    start = whole[:2]
    before = answers.stats().generated_tokens
    (found,) = answers.texts(
        [Prompt(CONTEXT, limited(40), is_done=lambda text: text.startswith(start))]
    )
    assert whole.startswith(found) and found.startswith(start)
    assert answers.stats().generated_tokens - before < 40


def test_a_prompt_that_cannot_be_served_fails_alone(answers):
    found = answers.texts([Prompt([1] * 97, limited(2)), Prompt(CONTEXT, limited(2))])
    assert isinstance(found[0], Failed) and "97 tokens" in found[0].reason
    assert isinstance(found[1], str)


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="max_new_tokens"):
        limited(0)
