"""The engine with a cache spread over the chips of a row: the answers of one device."""

import functools

import jax
import numpy as np
import pytest

from hunyuan_jax import Sampling
from hunyuan_jax.config import MoeConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.infer.request import Limits, Request
from support.folders import random_params, small
from support.models import mesh_of


@functools.cache
def model(max_position, **axes):
    moe = MoeConfig(num_experts=4, top_k=2)
    config = small(num_layers=2, moe=moe, max_position=max_position, eos_token_ids=())
    return Pretrained(config, random_params(config), mesh=mesh_of(**axes))


def prompt(num_tokens, seed=0):
    return np.random.default_rng(seed).integers(3, 40, num_tokens).tolist()


def answers(engine, prompts, num_new, prompt_logprobs=None):
    """(new tokens, log-probabilities of the prompt's tokens, then of the new ones) of each."""
    sampling = Sampling(
        temperature=0,
        max_new_tokens=num_new,
        stop_ids=(),
        logprobs=0,
        prompt_logprobs=prompt_logprobs,
    )
    found = [([], [], []) for _ in prompts]
    requests = [Request("", tuple(tokens), sampling.resolved({})) for tokens in prompts]
    for output in engine.run(requests):
        tokens, of_prompt, of_answer = found[int(output.id)]
        tokens += output.tokens
        of_prompt += [x.logprob for x in (output.prompt_logprobs or ())[1:]]
        of_answer += [x.logprob for x in output.logprobs]
    return [(tokens, first + then) for tokens, first, then in found]


def assert_are_of_whole_forward(found, prompts, max_position):
    """Greedy tokens, and all log-probabilities, are those of one device without a cache."""
    wholes = [text + tokens for text, (tokens, _) in zip(prompts, found, strict=True)]
    ids = np.zeros((len(wholes), max_position), np.int32)
    for row, whole in enumerate(wholes):
        ids[row, : len(whole)] = whole
    logprobs_BTV = np.asarray(jax.nn.log_softmax(model(max_position).logits(ids)))
    for logprobs_TV, whole, (tokens, logprobs) in zip(logprobs_BTV, wholes, found, strict=True):
        of_new_TV = logprobs_TV[len(whole) - len(tokens) - 1 : len(whole) - 1]
        assert tokens == of_new_TV.argmax(-1).tolist()
        expected = logprobs_TV[np.arange(len(whole) - 1), whole[1:]][-len(logprobs) :]
        np.testing.assert_allclose(logprobs, expected, atol=2e-4)


@pytest.mark.parametrize(
    "axes",
    [
        {"context": 2},
        pytest.param({"context": 2, "tensor": 2, "expert": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.heavy
def test_rows_of_many_lengths_and_known_beginnings_are_those_of_one_device(axes):
    shared = prompt(200)
    # Lengths at and around the edges of chunks (8), of a chip's slots (16) and of pages (32).
    prompts = [shared[:n] for n in (1, 15, 16, 17, 32, 33, 200)] + [shared[:96] + prompt(20, 1)]
    engine = model(256, **axes).new_engine(Limits(max_rows=8, max_context=256, page_size=16))
    entries = engine.runner.lanes[0].state.entries
    assert {x.sharding.shard_shape(x.shape)[2] for x in jax.tree.leaves(entries)} == {16}
    found = answers(engine, prompts, 20, prompt_logprobs=0)
    assert_are_of_whole_forward(found, prompts, 256)
    assert_are_of_whole_forward(answers(engine, prompts[-2:], 4), prompts[-2:], 256)
    assert engine.stats().prefix_hits >= 96


def test_drafts_are_refused():
    with pytest.raises(ConfigError, match="config.mesh.context = 2 .* speculate"):
        model(256, context=2).new_engine(Limits(speculate="ngram"))


@pytest.mark.slow  # docs/results/long_context.md has the last run
@pytest.mark.parametrize("cache_dtype", [None, "int8", "fp8"])
def test_8192_tokens_over_eight_devices_are_those_of_one(cache_dtype):
    shared = prompt(8000)
    prompts = [shared + prompt(n, n) for n in (10, 100)] + [shared[:5000], prompt(130, 3)]
    limits = Limits(max_rows=4, max_context=8192, cache_dtype=cache_dtype)
    engine = model(8192, context=8).new_engine(limits)
    for asked in (prompts, prompts[:1]):  # the second time with a known beginning
        found = answers(engine, asked, 30)
        if cache_dtype is None:
            assert_are_of_whole_forward(found, asked, 8192)
        else:
            expected = answers(model(8192).new_engine(limits), asked, 30)
            assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert engine.stats().prefix_hits > 7000
