"""Generation as a user calls it: programs compiled, seeds, batches, meshes, the two layouts of the
weights, the chat.
"""

import base64
import dataclasses
import io
import os
import shutil

import jax
import numpy as np
import pytest

from hunyuan_jax import Sampling, cli, from_pretrained
from hunyuan_jax.chat.render import render_chat
from hunyuan_jax.config import MoeConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer import command as command_lib
from hunyuan_jax.infer import cpu_layout, score, text
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.layers.ffn.moe import routing
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.tokenizer import load_tokenizer
from support import jax_settings
from support.folders import random_params, small
from support.models import mesh_of

IDS = np.array([[1, 2, 3, 4], [7, 8, 9, 10]])
DRAWN = {
    "temperature": 0.9,
    "top_k": 12,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "eos_token_id": (),
}


@pytest.fixture(scope="module")
def config():
    return small(
        num_layers=4,
        cla_share_factor=2,
        moe=MoeConfig(num_experts=4, top_k=2),
        max_position=512,
        pad_token_id=5,
    )


@pytest.fixture(scope="module")
def model(config):
    return Pretrained(config, random_params(config))


@pytest.mark.heavy
def test_greedy_tokens_are_those_of_the_whole_forward(model):
    """Chunks, buckets, cache and the CPU layout, against logits of the whole text
    without any of them.
    """
    tokens_BT = model.generate(IDS, max_new_tokens=40, eos_token_id=())
    logits_BTV = np.asarray(model.logits(tokens_BT[:, :-1]))[:, IDS.shape[1] - 1 :]
    np.testing.assert_array_equal(tokens_BT[:, IDS.shape[1] :], logits_BTV.argmax(-1))


@pytest.mark.heavy
def test_the_same_tokens_on_a_mesh(config, model):
    """Two rows over four batch shards: two idle rows, experts and heads split."""
    mesh = mesh_of(data=2, expert=2, tensor=2)
    spread = Pretrained(config, random_params(config), mesh=mesh)
    w_gate = spread.params["groups"]["layer_0"]["moe"]["experts"]["w_gate_EDF"]
    assert w_gate.addressable_shards[0].data.size == w_gate.size // 8
    np.testing.assert_array_equal(
        spread.generate(IDS, max_new_tokens=9, **DRAWN),
        model.generate(IDS, max_new_tokens=9, **DRAWN),
    )
    assert spread.loss(IDS[:1], IDS[:1]) == pytest.approx(model.loss(IDS[:1], IDS[:1]), rel=1e-5)


@pytest.mark.heavy
def test_nothing_is_compiled_for_another_length_or_setting_or_fewer_rows(model):
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: events.append(name)
    )
    model.generate(IDS, max_new_tokens=20, **DRAWN)
    events.clear()
    for length, new, temperature, top_p, seed in (
        (1, 3, 0.5, 0.5, 1),
        (31, 64, 1.5, 0.99, 2),
        (17, 1, 0.1, 0.2, 3),
    ):
        how = {
            "temperature": temperature,
            "top_k": 12,
            "top_p": top_p,
            "repetition_penalty": 1.3,
            "seed": seed,
        }
        model.generate(np.ones((2, length), np.int32), None, new, eos_token_id=(), **how)
    assert not [name for name in events if name.startswith("/jax/core/compile")]
    # Six rows: so compilations are seen here.
    model.generate(np.ones((6, 3), np.int32), None, 3, **DRAWN)
    assert any(name.startswith("/jax/core/compile") for name in events)
    events.clear()
    model.generate(np.ones((1, 3), np.int32), None, 3, **DRAWN)
    assert not [name for name in events if name.startswith("/jax/core/compile")]


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1e-40},
        {"temperature": 1e-6},
        {"temperature": 0.9, "top_p": 1e-40},
        {"temperature": 0.9, "top_p": 1e-40, "top_k": 12},
        {"temperature": 0.9, "top_k": 1},
    ],
)
def test_the_limits_of_drawing_are_greedy(model, how):
    for penalty in (1e-20, 1e20) if how == {"temperature": 1e-6} else (1.0,):
        options = {"max_new_tokens": 9, "eos_token_id": (), "repetition_penalty": penalty}
        np.testing.assert_array_equal(
            model.generate(IDS, **options, **how), model.generate(IDS, **options)
        )


def test_buckets_are_few_and_waste_little():
    lengths = range(1, 5000)
    sizes = [score.bucket(length, 32) for length in lengths]
    assert all(
        length <= size <= max(32, 1.25 * length + 31)
        for length, size in zip(lengths, sizes, strict=True)
    )
    assert all(
        size <= 1.25 * length for length, size in zip(lengths, sizes, strict=True) if length > 128
    )
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 32


def test_draws_depend_on_seed_row_and_step_alone(model):
    drawn_BT = model.generate(IDS, max_new_tokens=40, seed=5, **DRAWN)
    np.testing.assert_array_equal(
        drawn_BT, model.generate(IDS, max_new_tokens=40, seed=5, **DRAWN)
    )
    assert (drawn_BT != model.generate(IDS, max_new_tokens=40, seed=6, **DRAWN)).any()
    # Another neighbour, other padding and another length: the first row stays.
    other = np.array([[0, 0, *IDS[0]], [5, 5, 5, 5, 5, 5]])
    mask = np.array([[0, 0, 1, 1, 1, 1], [1] * 6])
    np.testing.assert_array_equal(
        model.generate(other, mask, 30, seed=5, **DRAWN)[0, 6:], drawn_BT[0, 4:34]
    )
    twins_BT = model.generate(IDS[[0, 0]], max_new_tokens=40, seed=5, **DRAWN)
    assert (twins_BT[0] != twins_BT[1]).any()


@pytest.mark.slow
def test_slices_of_a_batch_change_no_token(config, monkeypatch):
    """Three rows in one slice and in three."""
    ids, drawn_BT = np.concatenate([IDS, IDS[:1]]), []
    for cores in (1, 3):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert cpu_layout.num_slices(config, 3) == cores
        model = Pretrained(config, random_params(config))
        drawn_BT.append(model.generate(ids, max_new_tokens=40, **DRAWN))
    np.testing.assert_array_equal(*drawn_BT)
    assert (drawn_BT[0][0] != drawn_BT[0][2]).any()


def test_a_slice_that_has_stopped_is_filled_up(model, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    whole_BT = model.generate(IDS, max_new_tokens=70, eos_token_id=())
    stop = next(token for token in whole_BT[0, 4:].tolist() if token not in whole_BT[1, 4:])
    length = whole_BT[0, 4:].tolist().index(stop) + 1
    expected_BT = whole_BT.copy()
    expected_BT[0, 4 + length :] = model._fill_id()
    np.testing.assert_array_equal(
        model.generate(IDS, max_new_tokens=70, eos_token_id=stop), expected_BT
    )


def test_no_slice_of_a_batch_is_padding(config, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert [cpu_layout.num_slices(config, batch_size) for batch_size in (1, 2, 4, 5, 6, 8, 9)] == [
        1,
        2,
        4,
        3,
        3,
        4,
        3,
    ]


def test_large_experts_and_dense_models_are_not_generated_in_slices(config):
    large = dataclasses.replace(config, hidden_size=1024, intermediate_size=2048)
    dense = dataclasses.replace(config, moe=MoeConfig())
    assert [cpu_layout.num_slices(cfg, 1) for cfg in (config, large, dense)] == [1, 1, 1]
    assert [cpu_layout.num_slices(cfg, 64) > 1 for cfg in (config, large, dense)] == [
        (os.cpu_count() or 1) > 1,
        False,
        False,
    ]
    assert cpu_layout.suits(config, mesh_of())
    assert not cpu_layout.suits(config, mesh_of(data=2))


def test_stream_yields_the_tokens_of_generate_and_stops_with_the_last_row(model):
    whole_BT = model.generate(IDS, max_new_tokens=70, eos_token_id=())
    streamed_TB = list(model.stream(IDS, max_new_tokens=70, eos_token_id=()))
    np.testing.assert_array_equal(np.stack(streamed_TB, axis=1), whole_BT[:, 4:])
    stop = int(whole_BT[0, 4 + 3])
    ends = [row.tolist().index(stop) + 1 for row in whole_BT[:1, 4:]]
    assert len(list(model.stream(IDS[:1], max_new_tokens=70, eos_token_id=stop))) == ends[0]


def test_unstacked_matrices_share_the_memory_of_the_model(model):
    specs = abstract_model(model.config, single_device_mesh())[1]
    unstacked = cpu_layout.unstacked(model.config, model.params, specs)
    w_EDF = model.params["groups"]["layer_1"]["moe"]["experts"]["w_up_EDF"]
    part = unstacked["groups"]["layer_3"]["moe"]["experts"]["w_up_EDF_2"]
    np.testing.assert_array_equal(part, w_EDF[1, 2])
    first = w_EDF.unsafe_buffer_pointer()
    if (w_EDF[0, 0].nbytes % 64) == 0:
        assert first <= part.unsafe_buffer_pointer() < first + w_EDF.nbytes


@pytest.mark.parametrize("num_tokens", [1, 4, 6, 9])
def test_experts_one_by_one_compute_what_their_tokens_ask_for(num_tokens):
    """An expert that nobody chose is not read: it may hold anything, and 0 * NaN would reach the
    tokens.
    """
    rng = np.random.default_rng(num_tokens)
    x_MD = rng.normal(size=(num_tokens, 8)).astype(np.float32)
    gate, up, down = (0.3 * rng.normal(size=(4, 8, 8)).astype(np.float32) for _ in range(3))
    expert_Mk = np.array([rng.permutation(3)[:2] for _ in range(num_tokens)], np.int32)
    weight_Mk = rng.random((num_tokens, 2)).astype(np.float32)
    expected_MD = np.zeros_like(x_MD)
    for m, k in np.ndindex(*expert_Mk.shape):
        e, h = expert_Mk[m, k], x_MD[m] @ gate[expert_Mk[m, k]]
        expected_MD[m] += weight_Mk[m, k] * (h / (1 + np.exp(-h)) * (x_MD[m] @ up[e])) @ down[e]
    weights = {
        f"{name}_{e}": w[e] if e < 3 else np.full_like(w[e], np.nan)
        for name, w in zip(("w_gate_EDF", "w_up_EDF", "w_down_EFD"), (gate, up, down), strict=True)
        for e in range(4)
    }
    is_kept = np.ones_like(expert_Mk, bool)
    assignment = routing.Assignment(
        expert_Mk, 0 * expert_Mk, weight_Mk, is_kept, ~is_kept, np.zeros(4, np.int32)
    )
    assignment = jax.tree.map(lambda a: a[None], assignment)
    np.testing.assert_allclose(
        jax.jit(cpu_layout.run_experts_one_by_one)(weights, x_MD[None], assignment)[0],
        expected_MD,
        atol=1e-5,
    )


# -----------------------------------------------------------------------------
# chat


@pytest.mark.heavy
def test_tokens_and_scores_do_not_depend_on_the_settings_of_the_process():
    """Draws, dtypes and broadcasting are stated, also in the threads that compile."""
    config = small(num_layers=1, cla_share_factor=1, max_position=64)

    def results():
        model = Pretrained(config, random_params(config))
        labels = np.where(IDS > 3, IDS, -100)
        return (
            model.generate(IDS, max_new_tokens=8, temperature=1.0, seed=3, eos_token_id=()),
            model.loss(IDS, labels),
            score.logprobs(model, IDS.tolist()),
        )

    expected = results()
    with jax_settings.unusual():
        found = results()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda x: np.asarray(x).dtype, found) == jax.tree.map(
        lambda x: np.asarray(x).dtype, expected
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A tokenizer file of single bytes: with its special tokens 456 ids."""
    path = tmp_path_factory.mktemp("tokenizer") / "hy.tiktoken"
    path.write_text(
        "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    )
    return path


@pytest.fixture(scope="module")
def talker(ranks):
    config = small(
        num_layers=1,
        cla_share_factor=1,
        moe=MoeConfig(),
        vocab_size=466,
        max_position=128,
        eos_token_ids=(),
        pad_token_id=-1,
    )
    return text.LM(Pretrained(config, random_params(config)), load_tokenizer(ranks))


@pytest.mark.heavy
def test_a_chat_remembers_what_was_said_and_what_was_read(talker):
    chat = text.Chat(talker, "Be brief.", Sampling(max_new_tokens=5, temperature=0))
    answer = "".join(chat.ask("Hello"))
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    model, vocabulary = talker.model, talker.tokenizer
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    ids = render_chat(asked, vocabulary)
    expected = model.generate([ids], max_new_tokens=5, eos_token_id=vocabulary.stop_ids)[
        0, len(ids) :
    ]
    assert answer == vocabulary.decode(expected, skip_special=True)
    ended = [i for i in expected if i not in vocabulary.stop_ids]
    assert chat.messages[-1]["content"] == vocabulary.decode(ended)
    again = talker.chat_ids([*chat.messages, {"role": "user", "content": "And now?"}])
    read = model.generate([again], max_new_tokens=1)[0, -1:].tolist()
    pieces = chat.ask("And now?")
    assert next(pieces) == vocabulary.decode(read, skip_special=True)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": vocabulary.decode(read)}
    chat.reset()
    assert chat.messages == asked[:1]
    with pytest.raises(
        ValueError, match=r"the conversation has \d+ tokens, the model 128 positions; /reset"
    ):
        chat.ask("x" * 200)
    assert chat.messages == asked[:1]


def test_a_tokenizer_without_chat_tokens_is_refused(talker):
    with pytest.raises(ConfigError, match="this tokenizer cannot chat: .*use `generate`"):
        text.Chat(text.LM(talker.model, load_tokenizer("byte")))


def test_a_checkpoint_that_is_not_there_is_not_taken_for_a_tokenizer(tmp_path):
    (tmp_path / "absence").mkdir()
    with pytest.raises(
        ConfigError,
        match=f"absent is not a model folder: .* Did you mean {tmp_path}/absence?",
    ):
        text.load(tmp_path / "absent")


@pytest.mark.heavy
def test_chat_command_reads_questions_from_a_pipe(talker, ranks, tmp_path, monkeypatch, capsys):
    talker.model.save_pretrained(tmp_path)
    shutil.copy(ranks, tmp_path)
    command = [
        "chat",
        f"--checkpoint={tmp_path}",
        "--temperature=0",
        "--top_k=5",
        "--top_p=1",
        "--max_new_tokens=4",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\n/reset\nHello\nHello\n"))
    assert cli.run(command) == 0
    chat = text.Chat(talker, sampling=Sampling(max_new_tokens=4, temperature=0))
    first, second = "".join(chat.ask("Hello")), "".join(chat.ask("Hello"))
    written = capsys.readouterr()
    assert written.out == f"{first}\n{first}\n{second}\n"
    assert "--temperature=0 is greedy, whatever --top_k is" in written.err
    for option, message in (
        (
            "--mesh=expert",
            "'expert' is not AXIS:SIZE; axes are replica, data, context, expert, tensor",
        ),
        ("--mesh=expert:3", "does not use the 8 devices exactly"),
        ("--top_p=2", "top_p = 2.0"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        with pytest.raises(ConfigError, match=message):
            cli.run([*command, option])
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert cli.run([*command, "--mesh=data:4,tensor:2"]) == 0
    assert capsys.readouterr().out == f"{first}\n"


def test_the_folders_eos_goes_before_that_of_its_config(talker, tmp_path):
    talker.model.save_pretrained(tmp_path)
    own = talker.model.config.eos_token_ids
    assert from_pretrained(tmp_path).config.eos_token_ids == own != (9, 3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 3]}')
    assert from_pretrained(tmp_path).config.eos_token_ids == (9, 3)


def test_chat_in_a_terminal_survives_ctrl_c(talker, monkeypatch, capsys):
    """Ctrl-C at the prompt gives a new prompt, in an answer it ends the answer; Ctrl-D leaves."""
    lines = iter([KeyboardInterrupt, "Hello", EOFError])

    def answer(prompt):
        line = next(lines)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert list(command_lib._questions()) == ["Hello"]

    def pieces():
        yield "half"
        raise KeyboardInterrupt

    command_lib._print_answer(pieces())
    assert capsys.readouterr().out.endswith("half\n")
