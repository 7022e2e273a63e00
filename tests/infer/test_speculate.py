"""Speculative decoding: every proposer gives the tokens of an engine without drafts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hunyuan_jax import Sampling
from hunyuan_jax.config import MoeConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.infer.request import Limits, Request
from hunyuan_jax.model.abstract import abstract_model
from support.folders import random_params, small
from support.models import fast_jit

# Pages so few that rows take them from each other, and that drafts reach beyond them.
LIMITS = Limits(max_rows=2, max_context=48, page_size=8, chunk_size=16, num_pages=8)
TEXT = [(7 * i + 3) % 40 for i in range(40)]


@pytest.fixture(scope="module")
def model():
    """Hy3 in small, computed in one slice."""
    moe = MoeConfig(num_experts=4, top_k=2, scoring="sigmoid", norm_topk_prob=True)
    config = small(
        num_layers=2,
        cla_share_factor=1,
        norm_before_rope=True,
        num_dense_layers=1,
        num_mtp_layers=1,
        tie_embeddings=False,
        moe=moe,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 1)
        yield Pretrained(config, random_params(config))


def request(i, **settings):
    settings = {"temperature": 0, "max_new_tokens": 22, "stop_ids": (), "seed": i} | settings
    return Request(str(i), tuple(TEXT[i : 3 * i + 14]), Sampling(**settings).resolved({}))


# Everything that a draft may disturb.
REQUESTS = [
    request(0),
    request(1, temperature=1, top_k=20, logprobs=2),
    request(2, temperature=0.7, repetition_penalty=1.3, frequency_penalty=0.5),
    request(3, presence_penalty=1.0, logit_bias=((5, 3.0), (7, -100.0))),
    request(4, temperature=1, top_p=0.9, min_new_tokens=9, stop_ids=tuple(range(0, 40, 3))),
    request(5, stop_ids=tuple(range(1, 40, 5))),
    request(6, max_new_tokens=1),
]


def answers(engine, requests=REQUESTS):
    found = {}
    for output in engine.run(requests):
        tokens, logprobs, _ = found.get(output.id, ([], [], None))
        logprobs += [entry.logprob for entry in output.logprobs or ()]
        found[output.id] = (tokens + list(output.tokens), logprobs, output.finish_reason)
    return found


@pytest.fixture(scope="module")
def expected(model):
    return answers(model.new_engine(LIMITS))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(("kind", "num"), [("ngram", 4), ("mtp", 2), ("folder", 3)])
def test_tokens_are_those_without_drafts(model, expected, folder, kind, num):
    kind = folder if kind == "folder" else kind
    limits = dataclasses.replace(LIMITS, speculate=kind, speculate_tokens=num)
    engine = model.new_engine(limits)
    engine.warm_up()
    found = answers(engine)
    for key, (tokens, logprobs, reason) in expected.items():
        assert (found[key][0], found[key][2]) == (tokens, reason), key
        np.testing.assert_allclose(found[key][1], logprobs, atol=1e-4)
    stats = engine.stats()
    assert stats.compilations == stats.pages_used == 0
    assert stats.preemptions > 0
    assert stats.draft_tokens == num * stats.drafts > 0
    print(stats)
    if kind == folder:
        # The draft is the model: what is greedy is accepted, up to the end of an answer.
        before = engine.stats()
        answers(engine, [dataclasses.replace(REQUESTS[0], cache_salt="again")])
        after = engine.stats()
        assert (after.drafts - before.drafts, after.accepted_tokens - before.accepted_tokens) == (
            6,
            15,
        )


def test_drafts_of_multi_token_prediction_are_those_of_a_whole_forward(model):
    limits = dataclasses.replace(LIMITS, max_rows=1, speculate="mtp", speculate_tokens=2)
    engine = model.new_engine(limits)
    tokens = answers(engine, [REQUESTS[0]])["0"][0]
    whole = [*REQUESTS[0].tokens, *tokens]
    net = nnx.merge(abstract_model(model.config, model.mesh)[0], model.params)
    ids_BT = jnp.asarray([whole[:-1]])
    positions_BT, ones_BT = jnp.arange(ids_BT.shape[1])[None], jnp.ones_like(ids_BT)

    def first():
        hidden_BTD = net(ids_BT, positions_BT, ones_BT).hidden_BTD
        next_BT = jnp.asarray([whole[1:]])
        hidden_BTD = net.predict_next(hidden_BTD, next_BT, positions_BT, ones_BT).hidden_BTD
        return net.logits(hidden_BTD)[0, -1].argmax()

    assert engine.runner.lanes[0].state.drafts_LK[0, 0] == fast_jit(first)()


def test_what_cannot_be_speculated_is_refused(model):
    dense = small(num_layers=2)
    plain = Pretrained(dense, random_params(dense))
    with pytest.raises(ConfigError, match="no layer of multi-token prediction; use ngram"):
        plain.new_engine(dataclasses.replace(LIMITS, speculate="mtp"))
    with pytest.raises(ConfigError, match="speculate_tokens = 6 must be at most page_size - 3"):
        plain.new_engine(dataclasses.replace(LIMITS, speculate="ngram", speculate_tokens=6))
    with pytest.raises(ConfigError, match="speculate_tokens = 9 must be 1 to 8"):
        Limits(speculate="ngram", speculate_tokens=9)
    with pytest.raises(ConfigError, match="speculate_tokens = 2 .* needs speculate"):
        Limits(speculate_tokens=2)
    with pytest.raises(ConfigError, match="with invariant"):
        Limits(speculate="ngram", invariant=True)
    with pytest.raises(ConfigError, match="nowhere"):
        model.new_engine(dataclasses.replace(LIMITS, speculate="nowhere"))
