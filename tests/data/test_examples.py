"""Whole examples in packed rows, and what a row of a chat teaches.

Letters: B rows, T positions.
"""

import json

import numpy as np
import pytest

from hunyuan_jax.config import DataConfig, PhaseConfig, SourceConfig, TrainConfig
from hunyuan_jax.data import chats, examples
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.tokenizer import ByteTokenizer

# A line break behind the token that stops, as ChatML has it.
BY_PREFIX = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
BY_TAGS = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|eos|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "A<|eos|>"},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "B"},
]


def tokenizer_of(template=BY_PREFIX):
    tokenizer = ByteTokenizer()
    tokenizer.chat_template, tokenizer.named_tokens = template, {}
    return tokenizer


def learned(row, template=BY_PREFIX):
    tokenizer = tokenizer_of(template)
    [text] = chats.chat_of(row, tokenizer)
    return tokenizer.decode(text.ids[text.is_learned])


# --- Labels


@pytest.mark.parametrize("template", [BY_PREFIX, BY_TAGS])
def test_labels_are_the_assistants_text_and_its_stop(template):
    assert learned({"messages": CHAT}, template) == "A<|eos|><|eos|>B<|eos|>"
    # What is said in the prompt is given.
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    assert learned(row, template) == "B<|eos|>"
    assert learned({"prompt": CHAT[:3], "completion": "B"}, template) == "B<|eos|>"


def test_a_completion_of_text_ends_with_eos():
    [text] = chats.chat_of({"prompt": "ab", "completion": "c"}, tokenizer_of())
    assert text.ids.tolist() == [97, 98, 99, 257]
    assert text.is_learned.tolist() == [False, False, True, True]


def test_tools_reach_the_template():
    template = "{% if tools %}{{ tools[0].name }}{% endif %}" + BY_PREFIX
    for tools in ([{"name": "f"}], '[{"name": "f"}]'):
        tokenizer = tokenizer_of(template)
        [text] = chats.chat_of({"messages": CHAT[:2], "tools": tools}, tokenizer)
        assert tokenizer.decode(text.ids).startswith("fuser:q")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "a row has 'messages', or 'prompt' and 'completion'; this one has"),
        ({"messages": []}, "the chat is empty"),
        ({"messages": "q"}, "messages is a str; it must be a list of messages"),
        ({"messages": CHAT[:1]}, "the assistant says nothing"),
        ({"messages": [*CHAT[:2], CHAT[1]]}, r"messages\[2\] follows another message of the"),
        ({"messages": ["q", CHAT[1]]}, r"messages\[0\] is 'q'"),
        ({"messages": [{"role": 3, "content": ""}, CHAT[1]]}, r"messages\[0\] has role 3"),
        ({"prompt": "a", "completion": ""}, "the completion is empty"),
        ({"prompt": "", "completion": "a"}, "the prompt is empty"),
        ({"prompt": "a", "completion": CHAT[1:2]}, "prompt is a text but completion is not"),
        ({"messages": CHAT, "tools": "{"}, "tools is not JSON"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, message):
    with pytest.raises(ValueError, match=message):
        chats.chat_of(row, tokenizer_of())


def test_a_message_that_the_template_leaves_out_makes_a_bad_row():
    template = BY_PREFIX.replace("messages %}", "messages if m.role != 'tool' %}", 1)
    row = {"messages": [CHAT[0], {"role": "tool", "content": "x"}, CHAT[1]]}
    with pytest.raises(ValueError, match=r"leaves out messages\[1\]"):
        chats.chat_of(row, tokenizer_of(template))


# --- Reading


def test_all_kinds_of_files_give_the_same_examples(tmp_path):
    import pyarrow
    import pyarrow.parquet
    from array_record.python.array_record_module import ArrayRecordWriter

    rows = [{"messages": CHAT}, {"messages": CHAT[:2]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    writer = ArrayRecordWriter(str(tmp_path / "c.array_record"), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()
    found = read(tmp_path).kept
    assert [example.name for example in found] == [
        f"{file}:{row}" for file in ("a.jsonl", "b.parquet", "c.array_record") for row in (1, 2)
    ]
    for first, *others in (found[::2], found[1::2]):
        for other in others:
            assert np.array_equal(first.texts[0].ids, other.texts[0].ids)
            assert np.array_equal(first.texts[0].is_learned, other.texts[0].is_learned)


def read(path, seq_len=64, **data):
    return examples.read_examples(
        DataConfig(source=str(path), **data),
        seq_len,
        lambda row: chats.chat_of(row, tokenizer_of()),
    )


def write(path, lengths):
    rows = [{"prompt": "a", "completion": "b" * (length - 1)} for length in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_bad_rows_are_counted_and_named_and_stop_a_run_above_the_limit(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + '\n{"messages": []}\n{\n')
    (tmp_path / "b.txt").write_text("text")
    found = read(tmp_path)
    assert len(found.kept) == 1
    assert found.tally.skipped().startswith("; 3 bad row(s) skipped in 2 file(s)\n  a.jsonl: 2")
    assert "first: a.jsonl:2: the chat is empty" in found.tally.skipped()
    with pytest.raises(ConfigError, match=r"the last is a\.jsonl:2: the chat is empty.*allows"):
        read(tmp_path, max_bad_fraction=0.0)


def test_long_examples_are_left_out_whole_and_reported(tmp_path):
    path = write(tmp_path / "a.jsonl", [3, 9, 8, 12])
    found = read(path, 8)
    assert [example.num_pairs for example in found.kept] == [3, 8]
    assert (found.num_long, found.longest) == (2, ("a.jsonl:4", 12))
    assert "2 longer than config.train.seq_len = 8 left out, the longest a.jsonl:4 with 12" in str(
        stream_of(found, 8)
    )
    with pytest.raises(ConfigError, match=r"no example that can be used; 4 are longer than"):
        read(path, 2)


def test_a_mixture_is_refused():
    with pytest.raises(ConfigError, match=r"config\.data\.sources \['a'\] mixes texts"):
        examples.read_examples(
            DataConfig(
                sources=(SourceConfig("a", "x"),),
                phases=(PhaseConfig("p", (1.0,)),),
            ),
            8,
            None,
        )


# --- Rows


def stream_of(found, seq_len, max_examples=99, fraction=0.5, batch_size=2, seed=0):
    return examples.PackedExamples(
        found,
        DataConfig(validation_fraction=fraction),
        TrainConfig(batch_size=batch_size, seq_len=seq_len, seed=seed),
        258,
        max_examples,
    )


@pytest.mark.parametrize("max_examples", [2, 99])
def test_every_example_is_in_one_row_that_has_room(max_examples):
    lengths = np.random.default_rng(0).integers(1, 65, 300).tolist()
    rows = examples.pack_rows(lengths, 64, max_examples)
    assert sorted(index for row in rows for index in row) == list(range(300))
    assert all(sum(lengths[i] for i in row) <= 64 and len(row) <= max_examples for row in rows)
    if max_examples == 99:
        assert len(rows) <= 1.05 * sum(lengths) / 64


def test_an_epoch_has_every_row_once_and_a_process_its_own(tmp_path):
    stream = stream_of(read(write(tmp_path / "a.jsonl", range(3, 33)), 32), 32, fraction=0.0)
    num_rows = stream.rows_per_epoch
    epochs = [
        sorted(
            document["name"]
            for number in range(epoch * num_rows, (epoch + 1) * num_rows)
            for document in stream.describe(number // 2)["rows"][number % 2]["documents"]
        )
        for epoch in range(2)
    ]
    assert epochs[0] == epochs[1] == sorted(f"a.jsonl:{row}" for row in range(1, 31))
    orders = [stream.describe(s)["rows"][0]["documents"] for s in range(num_rows)]
    assert orders[: num_rows // 2] != orders[num_rows // 2 :]
    whole = stream.batch(3)
    for name, part in stream.batch(3, np.array([1])).items():
        assert np.array_equal(part, whole[name][1:])


def test_a_row_has_whole_segments_with_targets_of_their_own(tmp_path):
    batch = stream_of(read(write(tmp_path / "a.jsonl", [3, 4, 5, 6]), 12), 12, fraction=0.0).batch(
        0
    )
    for r in range(2):
        for segment in range(1, batch["segment_ids"][r].max() + 1):
            [here] = np.nonzero(batch["segment_ids"][r] == segment)
            tokens, targets = batch["tokens"][r, here], batch["targets"][r, here]
            assert tokens[0] == ord("a") and (tokens[1:] == ord("b")).all()
            assert np.array_equal(targets[:-1], tokens[1:]) and targets[-1] == 257
            assert np.array_equal(batch["positions"][r, here], np.arange(len(here)))
            assert (batch["loss_weights"][r, here] == 1).all()  # pad is no label, eos is
    padding = batch["segment_ids"] == 0
    assert (batch["loss_weights"][padding] == 0).all() and (batch["tokens"][padding] == 258).all()


def test_held_out_examples_are_whole_and_the_same_for_every_seed(tmp_path):
    found = read(write(tmp_path / "a.jsonl", range(3, 33)), 32)
    first, second = (stream_of(found, 32, seed=seed).validation(99) for seed in range(2))
    assert len(first) == len(second) > 1
    for a, b in zip(first, second, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert stream_of(found, 32, fraction=0.0).validation(99) == []
    with pytest.raises(ConfigError, match="needs at least 2 examples"):
        stream_of(found.__class__(found.kept[:1], 0, ("", 0), found.tally), 32)


def test_the_identity_is_of_tokens_and_labels(tmp_path):
    path = tmp_path / "a.jsonl"

    def identity(*rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return stream_of(read(path), 64, fraction=0.0).identity()

    first = identity({"prompt": "ab", "completion": "c"})
    assert first == identity({"prompt": "ab", "completion": "c"})
    assert first != identity({"prompt": "a", "completion": "bc"})
