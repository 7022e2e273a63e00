"""Generation as a user calls it: programs compiled, seeds, batches, meshes, the two layouts of the weights, the chat."""

import jax
import numpy as np
import pytest
from helpers import mesh_of
from test_convert import random_params, small

from hunyuan_jax.config import MoeConfig
from hunyuan_jax.infer import engine as engine_lib
from hunyuan_jax.infer.pretrained import Pretrained

IDS = np.array([[1, 2, 3, 4], [7, 8, 9, 10]])
DRAWN = {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": ()}


@pytest.fixture(scope="module")
def config():
    return small(num_layers=4, cla_share_factor=2, moe=MoeConfig(num_experts=4, top_k=2), max_position=512)


@pytest.fixture(scope="module")
def model(config):
    return Pretrained(config, random_params(config))


def test_greedy_tokens_are_those_of_the_whole_forward(model):
    """Chunks, buckets, cache and the matrices that lie apart, against logits of the whole text without any of them."""
    tokens_BT = model.generate(IDS, max_new_tokens=40, eos_token_id=())
    logits_BTV = np.asarray(model.logits(tokens_BT[:, :-1]))[:, IDS.shape[1] - 1 :]
    np.testing.assert_array_equal(tokens_BT[:, IDS.shape[1] :], logits_BTV.argmax(-1))


def test_the_same_tokens_on_a_mesh(config, model):
    """Two rows over four batch shards: two idle rows, experts and heads split."""
    mesh = mesh_of(data=2, expert=2, tensor=2)
    spread = Pretrained(config, random_params(config), mesh=mesh)
    w_gate = spread.params["groups"]["layer_0"]["moe"]["experts"]["w_gate_EDF"]
    assert w_gate.addressable_shards[0].data.size == w_gate.size // 8
    for options in ({"eos_token_id": ()}, DRAWN):
        np.testing.assert_array_equal(spread.generate(IDS, max_new_tokens=9, **options), model.generate(IDS, max_new_tokens=9, **options))
    np.testing.assert_allclose(spread.logits(IDS[:1]), model.logits(IDS[:1]), atol=1e-4)
    assert spread.loss(IDS[:1], IDS[:1]) == pytest.approx(model.loss(IDS[:1], IDS[:1]), rel=1e-5)


def test_one_compilation_for_many_lengths_and_settings(config):
    model = Pretrained(config, random_params(config))
    engine = model._engine
    model.generate(IDS, max_new_tokens=20, **DRAWN)
    assert (engine.prefill._cache_size(), engine.decode._cache_size()) == (1, 1)
    for length, new, temperature, top_p, seed, stop in ((1, 3, 0.5, 0.5, 1, ()), (31, 64, 1.5, 0.99, 2, ()), (17, 1, 0.1, 0.2, 3, ())):
        ids = np.ones((2, length), np.int32)
        model.generate(ids, None, new, temperature, top_k=12, top_p=top_p, repetition_penalty=1.3, seed=seed, eos_token_id=stop)
    assert (engine.prefill._cache_size(), engine.decode._cache_size()) == (1, 1)


def test_buckets_are_few_and_waste_little():
    lengths = range(1, 5000)
    sizes = [engine_lib.bucket(length, 32) for length in lengths]
    assert all(length <= size <= max(32, 1.25 * length + 31) for length, size in zip(lengths, sizes, strict=True))
    assert all(size <= 1.25 * length for length, size in zip(lengths, sizes, strict=True) if length > 128)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 32


def test_draws_depend_on_seed_row_and_step_alone(model):
    drawn_BT = model.generate(IDS, max_new_tokens=40, seed=5, **DRAWN)
    np.testing.assert_array_equal(drawn_BT, model.generate(IDS, max_new_tokens=40, seed=5, **DRAWN))
    assert (drawn_BT != model.generate(IDS, max_new_tokens=40, seed=6, **DRAWN)).any()
    # Another neighbour, other padding and another length: the first row stays.
    other = np.array([[0, 0, *IDS[0]], [5, 5, 5, 5, 5, 5]])
    mask = np.array([[0, 0, 1, 1, 1, 1], [1] * 6])
    np.testing.assert_array_equal(model.generate(other, mask, 30, seed=5, **DRAWN)[0, 6:], drawn_BT[0, 4:34])
    twins_BT = model.generate(IDS[[0, 0]], max_new_tokens=40, seed=5, **DRAWN)
    assert (twins_BT[0] != twins_BT[1]).any()


def test_stream_yields_the_tokens_of_generate_and_stops_with_the_last_row(model):
    whole_BT = model.generate(IDS, max_new_tokens=70, eos_token_id=())
    streamed_TB = list(model.stream(IDS, max_new_tokens=70, eos_token_id=()))
    np.testing.assert_array_equal(np.stack(streamed_TB, axis=1), whole_BT[:, 4:])
    stop = int(whole_BT[0, 4 + 3])
    ends = [row.tolist().index(stop) + 1 for row in whole_BT[:1, 4:]]
    assert len(list(model.stream(IDS[:1], max_new_tokens=70, eos_token_id=stop))) == ends[0]


def test_matrices_apart_share_the_memory_of_the_model(model):
    apart = engine_lib.taken_apart(model.params)
    w_EDF = model.params["groups"]["layer_1"]["moe"]["experts"]["w_up_EDF"]
    part = apart["groups"]["layer_1"]["moe"]["experts"]["w_up_EDF"][1][2]
    np.testing.assert_array_equal(part, w_EDF[1, 2])
    first = w_EDF.unsafe_buffer_pointer()
    if (w_EDF[0, 0].nbytes % 64) == 0:
        assert first <= part.unsafe_buffer_pointer() < first + w_EDF.nbytes


def test_an_expert_without_tokens_is_not_read(model):
    """One that nobody chose may hold anything; 0 * NaN would reach the tokens."""
    from hunyuan_jax.model import moe, routing

    rng = np.random.default_rng(0)
    x_gTD = rng.normal(size=(3, 1, 8)).astype(np.float32)
    weights = {name: tuple(rng.normal(size=(2, 8, 8)).astype(np.float32)) for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD")}
    expert_Tk = np.zeros((3, 1, 1), np.int32)
    ones = np.ones((3, 1, 1), np.float32)
    assignment = routing.Assignment(expert_Tk, 0 * expert_Tk, ones, ones > 0, ones < 0, np.array([[1, 0]] * 3, np.int32))
    expected = moe.serve_few({name: w[:1] for name, w in weights.items()}, x_gTD, assignment)
    weights = {name: (w[0], np.full_like(w[1], np.nan)) for name, w in weights.items()}
    np.testing.assert_allclose(jax.jit(moe.serve_few)(weights, x_gTD, assignment), expected, rtol=1e-5)
