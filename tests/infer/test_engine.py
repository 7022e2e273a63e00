"""The engine on a small mixture: what a request gets, whatever runs beside it."""

import dataclasses
import functools
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax import Sampling, presets, startup
from hunyuan_jax.config import MoeConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer import cpu_layout, programs, score
from hunyuan_jax.infer.engine import CallLength, shapes_of
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.infer.request import ContextTooLong, Limits, QueueFull, Request
from hunyuan_jax.parallel.mesh import single_device_mesh
from support.folders import random_params, small

LIMITS = Limits(max_rows=4, max_context=64, page_size=8, num_pages=12, max_queue=16)
TEXT = [(7 * i + 3) % 40 for i in range(40)]


@pytest.fixture(scope="module")
def model():
    config = small(
        num_layers=2,
        cla_share_factor=2,
        moe=MoeConfig(num_experts=4, top_k=2),
        max_position=64,
        eos_token_ids=(),
    )
    return Pretrained(config, random_params(config))


@pytest.fixture(scope="module")
def engine(model):
    return model.new_engine(LIMITS)


@pytest.fixture(scope="module")
def invariant(model):
    """Two pools of three rows, and of pages for one context and a bit more."""
    limits = Limits(
        max_rows=6, max_context=50, page_size=8, chunk_size=8, num_pages=7, invariant=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 2)
        engine = model.new_engine(limits)
    engine.warm_up()
    return engine


def request(name, tokens, first_choice=0, n=1, **settings):
    sampling = Sampling(**{"temperature": 0, "max_new_tokens": 8, "stop_ids": ()} | settings)
    return Request(name, tuple(tokens), sampling.resolved({}), n, first_choice=first_choice)


def answers(engine, requests, arrivals=None):
    """(id, choice) -> (tokens, logprobs, reason); request i arrives at step arrivals[i]."""
    left, found, step = list(zip(arrivals or [0] * len(requests), requests, strict=True)), {}, 0
    while left or engine.has_work:
        for arrival, item in [pair for pair in left if pair[0] <= step]:
            engine.add(item)
            left.remove((arrival, item))
        for output in engine.step():
            tokens, logprobs, _ = found.get((output.id, output.choice), ([], [], None))
            found[output.id, output.choice] = (
                tokens + list(output.tokens),
                logprobs + list(output.logprobs or ()),
                output.finish_reason,
            )
        step += 1
    assert engine.stats().pages_used == 0
    return found


def greedy(model, tokens, num_new):
    """The oracle: argmax of logits without any cache."""
    tokens = list(tokens)
    for _ in range(num_new):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(model.logits(padded)[0, len(tokens) - 1])))
    return tokens[-num_new:]


@pytest.mark.heavy
def test_many_lengths_at_different_times_get_the_tokens_of_the_whole_forward(model, engine):
    requests = [request(str(i), TEXT[i : 4 * i + 2], max_new_tokens=12 - i) for i in range(9)]
    found = answers(engine, requests, [0, 0, 1, 1, 2, 5, 6, 7, 8])
    for i, item in enumerate(requests):
        expected = greedy(model, item.tokens, 12 - i)
        assert found[str(i), 0] == (expected, [], "length")


def test_a_known_beginning_is_not_computed_again(engine):
    before = engine.stats()
    first = answers(engine, [request("a", TEXT[:34])])
    again = answers(engine, [request("b", TEXT[:34])])
    assert again["b", 0] == first["a", 0]
    assert engine.stats().prefix_hits - before.prefix_hits >= 32
    assert engine.stats().pages_cached > 0


def test_logprobs_are_those_of_the_logits(model, engine):
    item = request("a", TEXT[:19], logprobs=3, prompt_logprobs=2, max_new_tokens=5)
    engine.add(item)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    tokens = [token for output in outputs for token in output.tokens]
    of_prompt = next(o.prompt_logprobs for o in outputs if o.prompt_logprobs)
    logprobs = [entry for output in outputs for entry in output.logprobs]
    whole = [*item.tokens, *tokens]
    expected_TV = np.asarray(jax.nn.log_softmax(model.logits([whole[:-1]])[0]))
    assert of_prompt[0] is None and len(of_prompt) == 19 and len(logprobs) == 5
    for place, entry in enumerate([*of_prompt[1:], *logprobs]):
        row_V = expected_TV[place]
        best = np.argsort(-row_V)[: len(entry.top)]
        assert entry.logprob == pytest.approx(row_V[whole[place + 1]], abs=1e-5)
        np.testing.assert_allclose([value for _, value in entry.top], row_V[best], atol=1e-5)
    assert [len(entry.top) for entry in (of_prompt[1], logprobs[0])] == [2, 3]
    # The chosen token of a greedy row is its best to the last bit.
    assert all(entry.logprob == entry.top[0][1] for entry in logprobs)


def test_a_prompt_that_is_only_scored_draws_nothing(engine):
    item = request("a", TEXT[:9], prompt_logprobs=0)
    engine.add(Request("a", item.tokens, item.sampling, only_score=True))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [(o.tokens, o.finish_reason) for o in outputs] == [((), "length")]
    assert len(outputs[0].prompt_logprobs) == 9
    assert all(entry.top == () for entry in outputs[0].prompt_logprobs[1:])


def test_the_last_token_that_is_only_scored_needs_no_position(model, engine):
    """As many tokens are read as fit, and the one behind them has its log-probability."""
    whole = [(5 * i + 2) % 40 for i in range(65)]
    (entries,) = score.of_ends(engine, [whole], [60])
    logits_SV = model.logits([whole[:64]])[0]
    expected_SV = np.asarray(jax.nn.log_softmax(logits_SV))
    expected = [expected_SV[place - 1, whole[place]] for place in range(60, 65)]
    np.testing.assert_allclose([entry.logprob for entry in entries], expected, atol=1e-5)
    assert engine.stats().pages_used == 0
    with pytest.raises(ContextTooLong, match="at most 65 fit"):
        score.of_ends(engine, [[*whole, 1]], [60])


@pytest.mark.heavy
def test_ends_of_rows_are_scored_and_shared_beginnings_computed_once(model, engine):
    beginning = TEXT[29::-1]  # of no other test
    rows = [[*beginning, i, i + 1, 5] for i in range(4)] + [TEXT[:2], TEXT[:3]]
    starts = [30, 31, 32, 30, 1, 3]
    before = engine.stats()
    found = score.of_ends(engine, rows, starts, num_top=1)
    # Three whole pages of eight tokens, which end before the 30th; a row of each pool computes
    # them.
    num_others = 4 - len(engine.scheduler.pools)
    assert engine.stats().prefix_hits - before.prefix_hits == num_others * 24
    for row, start, entries in zip(rows, starts, found, strict=True):
        expected_TV = np.asarray(jax.nn.log_softmax(model.logits([row])[0]))
        assert len(entries) == len(row) - start
        for place, entry in enumerate(entries, start):
            row_V = expected_TV[place - 1]
            assert entry.logprob == pytest.approx(row_V[row[place]], abs=1e-5)
            assert entry.top[0][0] == np.argmax(row_V)


def test_settings_of_one_row_act_on_it_alone(model, engine):
    plain = greedy(model, TEXT[:6], 8)
    other = next(token for token in range(40) if token not in plain)
    drawn = {"temperature": 1.0, "seed": 3}
    requests = [
        request("plain", TEXT[:6]),
        request("bias", TEXT[:6], logit_bias={other: 1e4}),
        request("presence", TEXT[:6], presence_penalty=1e4),
        request("frequency", TEXT[:6], frequency_penalty=1e4),
        request("repetition", TEXT[:6], repetition_penalty=1e6),
        request("stop", TEXT[:6], stop_ids=(plain[2],)),
        request("min", TEXT[:6], stop_ids=(plain[0],), min_new_tokens=4),
        request("drawn", TEXT[:6], **drawn),
        request("top_k", TEXT[:6], top_k=1, **drawn),
        request("top_p", TEXT[:6], top_p=1e-6, **drawn),
        request("min_p", TEXT[:6], min_p=1.0, **drawn),
        request("seed", TEXT[:6], temperature=1.0, seed=4),
    ]
    found = {name: tokens for (name, _), (tokens, *_) in answers(engine, requests).items()}
    for name in ("plain", "top_k", "top_p", "min_p"):
        assert found[name] == plain, name
    assert found["bias"] == [other] * 8
    assert found["stop"] == plain[: plain.index(plain[2]) + 1]
    for name in ("presence", "frequency"):
        assert len(set(found[name])) == 8, name
    assert not set(found["repetition"]) & set(TEXT[:6])
    assert plain[0] not in found["min"][:4]
    assert found["drawn"] != plain and found["drawn"] != found["seed"]


def test_samples_differ_and_each_is_that_of_its_number(engine):
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 5}
    together = answers(engine, [request("a", TEXT[:20], n=4, **how)])
    assert len({tuple(tokens) for tokens, *_ in together.values()}) == 4
    for number in range(4):
        alone = answers(engine, [request("b", TEXT[:20], first_choice=number, **how)])
        assert alone["b", number] == together["a", number]


def test_an_abort_ends_one_choice_or_all(engine):
    engine.add(request("a", TEXT[:20], n=2, max_new_tokens=40, temperature=1.0))
    engine.add(request("b", TEXT[:5], max_new_tokens=40))
    engine.step()
    engine.abort("a", 1)
    engine.abort("b")
    engine.abort("nobody")
    reasons = {}
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason:
                reasons[output.id, output.choice] = output.finish_reason
    assert reasons == {("a", 0): "length", ("a", 1): "abort", ("b", 0): "abort"}
    assert engine.stats().pages_used == 0


def test_what_cannot_be_served_is_refused(engine):
    for item, kind, message in (
        (request("a", [1] * 64), ContextTooLong, "64 tokens; at most 63 fit into the context"),
        (request("a", []), ConfigError, "the prompt is empty"),
        (request("a", [40]), ConfigError, "holds the id 40; ids are 0 to 39"),
        (request("a", [1], logit_bias={99: 1}), ConfigError, "holds the id 99"),
        (request("a", [1], n=0), ConfigError, "n = 0 must be at least 1"),
        (
            dataclasses.replace(request("a", [1, 2]), score_from=2),
            ConfigError,
            "score_from = 2 must be the place of a token of the prompt, 0 to 1",
        ),
        (request("a", [1], n=17), QueueFull, "max_queue = 16"),
        (
            request("a", [1], stop_ids=tuple(range(17)), min_new_tokens=1),
            ConfigError,
            "17 stop ids; use at most 16",
        ),
    ):
        with pytest.raises(kind, match=message):
            engine.add(item)
    assert not engine.has_work
    engine.add(request("a", [1]))
    with pytest.raises(ConfigError, match="id = 'a' is in use"):
        engine.add(request("a", [1]))
    engine.abort("a")
    assert engine.wait(0)
    answers(engine, [])
    assert not engine.wait(0)


@pytest.mark.parametrize(("cache_dtype", "most"), [("int8", 0.03), ("fp8", 0.06)])
@pytest.mark.heavy
def test_a_cache_in_eight_bits_takes_few_bytes_and_says_nearly_the_same(
    model, engine, cache_dtype, most
):
    """Keys and values of 8 numbers take 8 bytes and a scale of 4, where float32 takes 32."""
    small_engine = model.new_engine(dataclasses.replace(LIMITS, cache_dtype=cache_dtype))
    sizes = [
        sum(x.nbytes for x in jax.tree.leaves(e.runner.lanes[0].state.entries))
        for e in (engine, small_engine)
    ]
    H = model.config.head_dim
    assert sizes[1] * 4 * H == sizes[0] * (H + 4)
    # Greedy tokens of a random model would be ties; what it says of a text is not.
    asked = request("a", TEXT, max_new_tokens=1, prompt_logprobs=0)
    exact, near = (
        [entry.logprob for entry in next(iter(e.run([asked]))).prompt_logprobs[1:]]
        for e in (engine, small_engine)
    )
    error = np.abs(np.subtract(exact, near)).mean()
    assert 0 < error < most


def test_another_dtype_of_the_cache_is_refused(model):
    with pytest.raises(ConfigError, match="cache_dtype = 'int4'; use int8, fp8"):
        model.new_engine(Limits(cache_dtype="int4"))


def test_pages_too_few_for_one_context_are_refused(model):
    with pytest.raises(ConfigError, match="num_pages = 3 of 8 tokens do not hold max_context"):
        model.new_engine(Limits(max_rows=1, page_size=8, num_pages=3))


def poison(engine):
    """Fills the pages that nobody uses with NaN."""

    def fill(lane):
        pages = np.array(engine.scheduler.pools[lane.pools.start].unused)
        entries = jax.tree.map(lambda x: x.at[:, pages].set(jnp.nan), lane.state.entries)
        lane.state = lane.state._replace(entries=entries)

    for lane in engine.runner.lanes:
        lane.thread.submit(fill, lane).result()


@pytest.mark.parametrize("plans_ahead", [False, True])
def test_what_free_pages_hold_does_not_matter(model, engine, plans_ahead, monkeypatch):
    """NaN in every page that nobody uses, between all steps; salts, so that none is shared."""
    monkeypatch.setattr(engine, "plans_ahead", plans_ahead)
    expected = [greedy(model, TEXT[i : i + 9], 20) for i in range(6)]
    for i in range(6):
        item = request(str(i), TEXT[i : i + 9], max_new_tokens=20)
        engine.add(dataclasses.replace(item, cache_salt=f"poison {i} {plans_ahead}"))
    found = {str(i): [] for i in range(6)}
    while engine.has_work:
        poison(engine)
        for output in engine.step():
            found[output.id] += output.tokens
    assert [found[str(i)] for i in range(6)] == expected


def test_requests_may_be_added_from_other_threads(engine, model):
    def add(thread):
        for i in range(4):
            engine.add(request(f"{thread} {i}", TEXT[i : i + 3]))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    found = {}
    while any(thread.is_alive() for thread in threads) or engine.has_work:
        for output in engine.step():
            found.setdefault(output.id, []).extend(output.tokens)
    assert sorted(map(tuple, found.values())) == sorted(
        tuple(greedy(model, TEXT[i : i + 3], 8)) for _ in range(3) for i in range(4)
    )


# -----------------------------------------------------------------------------
# the same bits

CASES = [
    {"tokens": TEXT[:30]},
    {"tokens": TEXT[:17], "temperature": 1.0, "seed": 1},
    {"tokens": TEXT[:3], "temperature": 0.7, "top_k": 5, "top_p": 0.9},
    {"tokens": TEXT[8:20], "repetition_penalty": 1.3, "presence_penalty": 0.2},
    {"tokens": TEXT[:26], "temperature": 1.0, "top_k": 0, "top_p": 0.8, "min_p": 0.01},
    {"tokens": TEXT[:9], "min_new_tokens": 2, "stop_ids": (3, 4), "logit_bias": {5: 1.0}},
]


@pytest.fixture(scope="module")
def alone(invariant):
    return [
        answers(invariant, [request("0", max_new_tokens=20, logprobs=4, **case)])["0", 0]
        for case in CASES
    ]


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, len(CASES) - 1), st.integers(0, 12)), min_size=2, max_size=8
    ),
    st.booleans(),
)
@pytest.mark.heavy
def test_tokens_and_logprobs_have_the_same_bits_in_any_company(
    invariant, alone, trace, plans_ahead
):
    """Other neighbours and rows, another order of arrival, known beginnings, and starting over,
    for which pages are scarce; with steps planned ahead, as on other devices, too.
    """
    requests = [
        request(str(i), max_new_tokens=20, logprobs=4, **CASES[case])
        for i, (case, _) in enumerate(trace)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(invariant, "plans_ahead", plans_ahead)
        found = answers(invariant, requests, [arrival for _, arrival in trace])
    for i, (case, _) in enumerate(trace):
        assert found[str(i), 0] == alone[case]


@pytest.mark.heavy
def test_the_traces_start_over_and_find_beginnings_and_compile_nothing(
    invariant, alone, monkeypatch
):
    for case, num in ((2, 6), (0, 3)):
        requests = [
            request(str(i), max_new_tokens=20, logprobs=4, **CASES[case]) for i in range(num)
        ]
        for i, answer in enumerate(answers(invariant, requests).values()):
            assert answer == alone[case], i
    stats = invariant.stats()
    assert stats.preemptions > 0 and stats.prefix_hits > 0
    assert stats.compilations == 0
    assert stats.steps > 0 and stats.host_seconds > 0
    new = jax.jit(lambda x: x * 3.25)
    new(jnp.ones(7))
    assert invariant.stats().compilations == 0  # not the engine's
    monkeypatch.setattr(invariant.scheduler, "plan", lambda: print(new(jnp.ones(8))))
    invariant.step()
    assert invariant.stats().compilations > 0


@pytest.mark.parametrize("plans_ahead", [False, True])
def test_a_step_that_is_not_planned_ahead_brings_its_own_tokens(engine, plans_ahead, monkeypatch):
    assert not engine.plans_ahead  # on one CPU
    monkeypatch.setattr(engine, "plans_ahead", plans_ahead)
    engine.add(request(f"first {plans_ahead}", TEXT[:6], max_new_tokens=3))
    assert bool(engine.step()) == (not plans_ahead)
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize(
    ("limits", "piece"),
    [
        ({}, 32),
        ({"page_size": 64, "chunk_size": 16}, 16),
        ({"page_size": 8, "chunk_size": 20}, 24),
        ({"page_size": 64, "chunk_size": 48}, 64),
        ({"page_size": 64, "chunk_size": 16, "invariant": True}, 64),
    ],
)
def test_a_piece_is_whole_pages_or_a_part_of_one(model, limits, piece):
    found = shapes_of(model.config, model.mesh, Limits(max_context=64, **limits), 1)
    assert found.piece == piece


def test_prompts_are_read_in_parts_of_pages(model):
    """Two rows of other lengths, in pages of 16 and pieces of 4."""
    engine = model.new_engine(
        Limits(max_rows=2, max_context=64, page_size=16, chunk_size=4, num_pages=8)
    )
    requests = [request("a", TEXT[:30], logprobs=2), request("b", TEXT[3:10], logprobs=2)]
    found = answers(engine, requests)
    for item in requests:
        tokens, logprobs, _ = found[item.id, 0]
        assert tokens == greedy(model, item.tokens, 8)
        ids = [[*item.tokens, *tokens]]
        expected_TV = np.asarray(jax.nn.log_softmax(model.logits(ids)[0]))
        for place, (token, entry) in enumerate(zip(tokens, logprobs, strict=True)):
            row_V = expected_TV[len(item.tokens) + place - 1]
            assert entry.logprob == pytest.approx(row_V[token], abs=1e-5)


def test_more_rows_have_fewer_steps_in_a_call():
    """Steps of 2 ms a row: a call of 50 ms to 100 ms, for any number of rows."""
    length = CallLength()
    assert length.max_steps(1) == length.max_steps(30) == 1
    for num_rows in (1, 30, 1):
        for _ in range(8):
            num_steps = length.max_steps(num_rows)
            length.took(num_rows, num_steps, 2e-3 * num_rows * num_steps)
    assert length.max_steps(1) == 32 and length.max_steps(31) == 1
    assert length.max_steps(3) == 16 and length.max_steps(4) == 8  # as they were not timed
    length.took(1, 4, 1.0)  # cut short: says nothing
    assert length.max_steps(1) == 32


@pytest.mark.parametrize(
    ("flags", "num_slices", "is_changed"),
    [("avx2", 2, True), ("avx2", 1, False), ("avx2 avx512f", 2, False), ("asimd", 2, False)],
)
def test_rows_in_slices_are_compiled_for_one_core_without_avx512(
    flags, num_slices, is_changed, model, monkeypatch
):
    monkeypatch.setattr(startup, "cpu_flags", flags.split)
    monkeypatch.setattr("os.cpu_count", lambda: num_slices)
    seen = {}

    def compiled(self, compiler_options=None):
        seen[name] = compiler_options

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    runner = model.new_engine(LIMITS).runner
    for name in ("chunk", "decode"):
        runner.compile(name, 1)
    assert [bool(options) for options in seen.values()] == [is_changed] * 2


def test_prompts_go_through_experts_in_tiles(model, monkeypatch):
    """However few their tokens are: the other way takes half as long again to compile."""

    def used(*_):
        raise RuntimeError("one by one")

    monkeypatch.setattr(cpu_layout, "run_experts_one_by_one", used)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: None)
    runner = model.new_engine(LIMITS).runner
    runner.compile("chunk", 5)  # a number that no test has traced
    with pytest.raises(RuntimeError, match="one by one"):
        runner.compile("decode", 5)


@pytest.mark.parametrize(
    ("num_requests", "max_new", "programs"),
    [(1, 1, {("chunk", 1)}), (1, 2, {("chunk", 1), ("decode", 1)}), (2, 2, {("decode", 4)})],
)
def test_rows_to_be_drawn_are_compiled_beside_their_prompts(
    model, monkeypatch, num_requests, max_new, programs
):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    new = model.new_engine(LIMITS)
    asked = []

    def only_asked(*shape):
        asked.append(shape)
        raise InterruptedError

    monkeypatch.setattr(new.runner, "compile", only_asked)
    for i in range(num_requests):
        new.add(request(str(i), TEXT[:5], max_new_tokens=max_new))
    with pytest.raises(InterruptedError):
        new.step()
    assert programs <= set(asked)
    assert len(asked) == 1 + (max_new > 1)


@pytest.mark.slow
def test_a_request_is_served_while_programs_are_compiled_behind(model, engine, monkeypatch):
    """Pieces and rows beyond the sizes that are there, with the same tokens."""
    behind = model.new_engine(LIMITS)
    compile_, goes_on, calls = behind.runner.compile, threading.Event(), itertools.count()

    def late(*shape):
        if next(calls) >= 2:
            goes_on.wait(60)
        return compile_(*shape)

    monkeypatch.setattr(behind.runner, "compile", late)
    behind.warm_up(behind=True)
    assert not behind.is_warm
    requests = [request(str(i), TEXT[i:] + TEXT[:9]) for i in range(3)]
    assert answers(behind, requests) == answers(engine, requests)
    goes_on.set()
    behind.warm_up()
    assert behind.is_warm
    assert answers(behind, requests[:1]) == answers(engine, requests[:1])
    assert behind.stats().compilations == 0


@pytest.mark.parametrize(("cache_dtype", "num_kib"), [(None, 80), ("int8", 42), ("fp8", 42)])
def test_bytes_of_a_token_of_hunyuan_large(cache_dtype, num_kib):
    """One key and one value for two layers, times 8 heads and 32 groups: 80 entries of 2 bytes, or
    of 1 byte and a scale of 4.
    """
    mesh = single_device_mesh()
    new = functools.partial(programs.new_state, presets.a52b(), 1, 5, 128, cache_dtype, mesh)
    entries = jax.eval_shape(new).entries
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(entries))
    assert num_bytes / (5 * 128) == num_kib * 1024
