"""Speculative decoding: every proposer gives the tokens of an engine without drafts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hunyuan_jax import Sampling, from_pretrained
from hunyuan_jax.config import MoeConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.infer.request import Limits, Request
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.quant.array import is_quantized
from support import goldens
from support.folders import random_params, small
from support.models import fast_jit

# Pages so few that rows take them from each other, and that drafts reach beyond them.
LIMITS = Limits(max_rows=2, max_context=48, page_size=8, chunk_size=32, num_pages=8)
TEXT = [(7 * i + 3) % 40 for i in range(40)]


@pytest.fixture(scope="module")
def model():
    """Hy3's attention and layer of multi-token prediction, without experts."""
    config = small(
        num_layers=1,
        cla_share_factor=1,
        norm_before_rope=True,
        num_mtp_layers=1,
        tie_embeddings=False,
        moe=MoeConfig(),
    )
    return Pretrained(config, random_params(config))


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


def engine_of(model, kind, num):
    return model.new_engine(dataclasses.replace(LIMITS, speculate=kind, speculate_tokens=num))


def check(engine, expected, num):
    found = answers(engine)
    for key, (tokens, logprobs, reason) in expected.items():
        assert (found[key][0], found[key][2]) == (tokens, reason), key
        np.testing.assert_allclose(found[key][1], logprobs, atol=1e-4)
    stats = engine.stats()
    assert stats.pages_used == 0 < stats.preemptions
    assert stats.draft_tokens == num * stats.drafts > 0


@pytest.mark.slow  # 7 CPU seconds; the next test shows the same of the engine
def test_ngrams_change_no_token_and_compile_nothing_later(model, expected):
    engine = engine_of(model, "ngram", 4)
    engine.warm_up()
    check(engine, expected, 4)
    assert engine.stats().compilations == 0
    assert engine.stats().accepted_tokens > 20


@pytest.mark.heavy
def test_multi_token_prediction_changes_no_token_and_drafts_as_the_whole_forward(model, expected):
    engine = engine_of(model, "mtp", 2)
    check(engine, expected, 2)
    item = REQUESTS[0]
    whole = [*item.tokens, *answers(engine, [item])["0"][0]]
    net = nnx.merge(abstract_model(model.config, model.mesh)[0], model.params)
    ids_BT, next_BT = jnp.asarray([whole[:-1]]), jnp.asarray([whole[1:]])
    sequence = jnp.arange(ids_BT.shape[1])[None], jnp.ones_like(ids_BT)

    def drafts():
        hidden_BTD = net(ids_BT, *sequence).hidden_BTD
        hidden_BTD = net.predict_next(hidden_BTD, next_BT, *sequence).hidden_BTD
        return net.logits(hidden_BTD).argmax(-1)

    expected = fast_jit(drafts)()[0, -1]
    assert expected in engine.runner.lanes[0].state.drafts_LK[:, 0]


@pytest.mark.slow  # 11 CPU seconds
def test_a_small_model_changes_no_token_and_a_perfect_one_is_always_right(
    model, expected, tmp_path
):
    model.save_pretrained(tmp_path)
    engine = engine_of(model, str(tmp_path), 3)
    check(engine, expected, 3)
    before = engine.stats()
    answers(engine, [REQUESTS[0]])
    after = engine.stats()
    # 22 tokens: one of the prompt, then four a step.
    assert after.drafts - before.drafts == 6
    assert after.accepted_tokens - before.accepted_tokens == 15


@pytest.mark.slow  # 30 CPU seconds: the experts' programs
@pytest.mark.parametrize(("kind", "num"), [("mtp", 2), ("ngram", 3)])
def test_greedy_tokens_of_hy3_are_the_recorded_ones(kind, num):
    golden = goldens.load("hy3_hub_bf16")
    limits = {"speculate": kind, "speculate_tokens": num}
    model = from_pretrained(golden.folder, dtype="float32", **limits)
    prompt = golden["gen_prompt"], golden["gen_mask"]
    tokens_BT = model.generate(*prompt, max_new_tokens=24, eos_token_id=())
    np.testing.assert_array_equal(tokens_BT, golden["gen_tokens"])
    assert model.engine.stats().drafts > 0


@pytest.mark.slow  # 20 CPU seconds: the experts' programs
def test_a_quantised_hy3_drafts_with_its_quantised_layer():
    folder, found = goldens.load("hy3_hub_bf16").folder, []
    for speculate in (None, "mtp"):
        model = from_pretrained(folder, "float32", quantize="int8", speculate=speculate)
        assert is_quantized(model.params["mtp"]["w_XD"])
        found.append(model.generate([list(range(3, 20))], max_new_tokens=16, eos_token_id=()))
    np.testing.assert_array_equal(*found)


def test_what_cannot_be_speculated_is_refused(model, tmp_path):
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
    no_model = "speculate = nowhere is neither mtp nor ngram, and no model: nowhere is"
    with pytest.raises(ConfigError, match=no_model):
        model.new_engine(dataclasses.replace(LIMITS, speculate="nowhere"))
    plain.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=no_model):
        from_pretrained(tmp_path, speculate="nowhere")
