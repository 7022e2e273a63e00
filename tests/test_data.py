"""Documents, their split, and packed batches: nothing lost, nothing twice, and a resumed stream is the same stream."""

import collections
import contextlib
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from hunyuan_jax.config import ConfigError, DataConfig
from hunyuan_jax.data import loader, pack, source
from hunyuan_jax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
FIELDS = {"tokens": np.int32, "targets": np.int32, "segment_ids": np.int32, "positions": np.int32, "loss_weights": np.float32}

few_examples = settings(max_examples=25, deadline=None, derandomize=True)
corpora = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), min_size=1, max_size=8)
row_lengths = st.integers(1, 24)
shuffle_windows = st.sampled_from([1, 50, 2**20])  # tokens; the smaller ones put several windows into an epoch


def make_documents(texts):
    return [source.Document(f"{index}.txt", text.encode()) for index, text in enumerate(texts)]


def open_folder(path, **fields):
    return source.open_source(DataConfig(source=str(path), **fields))


@contextlib.contextmanager
def training(documents, *, batch_size=1, seq_len=8, seed=0, window=2**20, rows=None):
    """A train iterator that is closed at the end, with `window` tokens per shuffle window."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "SHUFFLE_TOKENS", window)
        batches = loader.train_iterator(documents, TOKENIZER, batch_size=batch_size, seq_len=seq_len, seed=seed, rows=rows)
        with contextlib.closing(batches):
            yield batches


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same_batches(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], strict=True)


def assert_shapes(batch, shape):
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {name: (shape, dtype) for name, dtype in FIELDS.items()}


def document_ids(document):
    return [TOKENIZER.bos_id, *document.utf8, TOKENIZER.eos_id]


def expected_pairs(documents):
    return collections.Counter(pair for document in documents for pair in itertools.pairwise(document_ids(document)))


def counted_pairs(batches):
    """The (token, target) pairs that count in the loss."""
    return collections.Counter(
        pair
        for batch in batches
        for pair in zip(
            batch["tokens"][batch["loss_weights"] == 1].tolist(), batch["targets"][batch["loss_weights"] == 1].tolist(), strict=True
        )
    )


def num_rows(documents, seq_len):
    return math.ceil(expected_pairs(documents).total() / seq_len)


# --- documents ---


def test_stdlib_is_the_sorted_sources_without_tests_and_build_files():
    documents = source.open_source(DataConfig())
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not [name for name in names if not name.endswith(".py") or "config-" in name or "_sysconfigdata" in name]
    assert documents.report.num_documents == len(documents) > 300
    assert documents.report.num_bytes == sum(len(document.utf8) for document in documents) > 5e6
    assert documents == source.open_source(DataConfig())


def test_folder_is_read_recursively_and_in_order(tmp_path):
    for name in ("b.md", "a/z.txt", "a/y.PY", "c.csv", ".git/x.txt", "a/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "d.jsonl").write_text('{"text": "first"}\n{"text": "second"}')
    documents = open_folder(tmp_path)
    expected = {"a/y.PY": "a/y.PY", "a/z.txt": "a/z.txt", "b.md": "b.md", "d.jsonl:1": "first", "d.jsonl:2": "second"}
    assert [(document.name, document.text) for document in documents] == list(expected.items())
    assert documents.report == source.SourceReport(5, sum(map(len, expected.values())), {})


def test_file_and_glob_give_names_that_other_files_do_not_change(tmp_path, monkeypatch):
    (tmp_path / "one" / "deep").mkdir(parents=True)
    (tmp_path / "one" / "deep" / "a.txt").write_text("a")
    assert [document.name for document in open_folder(tmp_path / "one" / "deep" / "a.txt")] == ["a.txt"]
    assert [document.name for document in open_folder(tmp_path / "*" / "**" / "*.txt")] == ["one/deep/a.txt"]
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "b.txt").write_text("b")
    (tmp_path / "two" / "b.csv").write_text("b")
    assert [document.name for document in open_folder(tmp_path / "*" / "**" / "*")] == ["one/deep/a.txt", "two/b.txt"]
    monkeypatch.chdir(tmp_path / "two")
    assert [document.name for document in open_folder("*.txt")] == ["b.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [document.name for document in open_folder("~/two")] == ["b.txt"]


def test_a_file_name_that_is_not_utf8_has_a_printable_name(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("a")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    [document] = open_folder(tmp_path)
    assert document.name == "caf\\xe9.txt"


def test_text_is_kept_as_it_is_but_for_the_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffline\r\n\u2028é\0 ".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "\\ud83d\\ude00 \\ud83d"}'.encode())
    assert [document.text for document in open_folder(tmp_path)] == ["line\r\n\u2028é\0 ", "😀 \ufffd"]


def test_unusable_files_are_skipped_and_counted(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    documents = open_folder(tmp_path)
    assert [document.name for document in documents] == ["good.txt"]
    skipped = documents.report.skipped
    assert {name: count for name, (count, _) in skipped.items()} == {"latin.txt": 1, "empty.txt": 1, "gone.txt": 1}
    assert skipped["latin.txt"][1] == "not UTF-8 (byte 0xe9 at 3)"
    assert skipped["empty.txt"][1] == "empty"
    assert "cannot be read" in skipped["gone.txt"][1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"text": ', "row 3: not JSON"),
        (b"[" * 100_000, "row 3: not JSON"),
        (b'{"text": "caf\xe9"}', "row 3: not UTF-8"),
        (b'["text"]', "row 3: a list, not an object"),
        (b'{"body": "b"}', "row 3: no field 'text', it has ['body']"),
        (b'{"text": 7}', "row 3: field 'text' is a int, not a string"),
        (b'{"text": ""}', "row 3: empty"),
    ],
)
def test_bad_rows_are_counted_with_the_number_of_the_first(tmp_path, row, reason):
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "one"}\n\n' + row + b'\n{"text": "four"}\nnull\n')
    documents = open_folder(tmp_path)
    assert [document.name for document in documents] == ["rows.jsonl:1", "rows.jsonl:4"]
    [(count, first)] = documents.report.skipped.values()
    assert count == 2
    assert first.startswith(reason)


def test_text_field_chooses_the_field(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "body": "b"}')
    assert [document.text for document in open_folder(tmp_path, text_field="body")] == ["b"]


def test_report_is_short_and_complete():
    skipped = {f"{index}.jsonl": (index + 1, "row 3: empty") for index in range(7)}
    lines = str(source.SourceReport(12, 3_400_000, skipped)).splitlines()
    assert lines[0] == "12 documents, 3.4 MB; 28 skipped in 7 file(s)"
    assert lines[1] == "  0.jsonl: 1 skipped, first: row 3: empty"
    assert lines[-1] == "  and 2 more file(s)"
    assert str(source.SourceReport(12, 3_400_000, {})) == "12 documents, 3.4 MB"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", ["missing", "does not exist", "Correct the path"]),
        ("missing/*.txt", ["does not exist"]),
        ("table.csv", ["table.csv", "holds no .txt, .py, .md, .jsonl file"]),
        ("nothing", ["nothing", "holds no .txt, .py, .md, .jsonl file"]),
        ("blank.jsonl", ["blank.jsonl", "0 skipped: no rows"]),
        ("bad", ["bad", "2 skipped: rows.jsonl: row 1: no field 'text', it has ['body', 'id']", "config.data.text_field"]),
    ],
)
def test_unusable_source_is_one_line_with_the_remedy(tmp_path, name, words):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "table.csv").write_text("a")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "rows.jsonl").write_text('{"body": "b", "id": 1}\n{}\n')
    with pytest.raises(ConfigError) as error:
        open_folder(tmp_path / name)
    message = str(error.value)
    assert message.startswith("config.data.source = ")
    assert "\n" not in message
    assert all(word in message for word in words)


def test_empty_source_is_not_the_current_folder():
    with pytest.raises(ConfigError, match="does not exist"):
        source.open_source(DataConfig(source=""))


# --- split ---


@few_examples
@given(st.sets(st.text(min_size=1, max_size=8), min_size=2, max_size=40), st.floats(0.001, 0.999), st.randoms(use_true_random=False))
def test_split_is_a_partition_that_ignores_the_order(names, fraction, random):
    documents = [source.Document(name, b"text") for name in sorted(names)]
    training_side, validation_side = source.split_documents(documents, fraction)
    assert training_side
    assert validation_side
    assert sorted([*training_side, *validation_side], key=documents.index) == documents
    assert training_side == [document for document in documents if document in training_side]
    shuffled = random.sample(documents, len(documents))
    for side, other in zip((training_side, validation_side), source.split_documents(shuffled, fraction), strict=True):
        assert set(side) == set(other)


def test_split_holds_out_the_fraction_and_keeps_it_when_the_corpus_grows():
    documents = make_documents("x" * 4000)
    _, validation_side = source.split_documents(documents, 0.1)
    assert 320 < len(validation_side) < 480
    _, before = source.split_documents(documents[:500], 0.1)
    assert before == [document for document in validation_side if document in documents[:500]]


def test_split_never_changes():  # a run resumed by a later version must not train on what it held out
    _, validation_side = source.split_documents(make_documents("x" * 40), 0.25)
    assert [document.name for document in validation_side] == ["1.txt", "7.txt", "13.txt", "14.txt", "23.txt", "26.txt", "30.txt", "33.txt"]


def test_split_of_nothing_and_of_one_document():
    documents = make_documents(["only"])
    assert source.split_documents(documents, 0.0) == (documents, [])
    with pytest.raises(ConfigError, match=r"validation_fraction = 0\.02 needs at least 2 documents, the source holds 1.*Set it to 0"):
        source.split_documents(documents, 0.02)


# --- training batches ---


@few_examples
@given(corpora, row_lengths, shuffle_windows, st.integers(-5, 2**40))
def test_every_pair_counts_exactly_once_an_epoch(texts, seq_len, window, seed):
    documents = make_documents(texts)
    rows = num_rows(documents, seq_len)  # rounded up: no padding but in the last row
    with training(documents, seq_len=seq_len, window=window, seed=seed) as batches:
        for _ in range(3):
            assert counted_pairs(take(batches, rows)) == expected_pairs(documents)


@few_examples
@given(corpora, row_lengths, shuffle_windows)
def test_rows_are_document_pieces_one_after_the_other(texts, seq_len, window):
    documents = make_documents(texts)
    whole = [document_ids(document) for document in documents]
    pieces = {tuple(ids[i:j]) for ids in whole for i in range(len(ids)) for j in range(i + 2, min(i + 2 + seq_len, len(ids) + 1))}
    with training(documents, batch_size=3, seq_len=seq_len, window=window) as batches:
        for batch in take(batches, 5):
            assert_shapes(batch, (3, seq_len))
            for row in range(3):
                check_row({name: array[row] for name, array in batch.items()}, pieces)


def check_row(row, pieces):
    segment_ids, num_pieces = row["segment_ids"], row["segment_ids"].max()
    assert segment_ids[segment_ids > 0].tolist() == sorted(segment_ids[segment_ids > 0])
    assert set(segment_ids[segment_ids > 0]) == set(range(1, num_pieces + 1))
    np.testing.assert_array_equal(row["loss_weights"], segment_ids > 0)
    is_padding = segment_ids == 0
    assert not is_padding[: np.count_nonzero(~is_padding)].any()  # at the end
    assert set(row["tokens"][is_padding]) | set(row["targets"][is_padding]) <= {TOKENIZER.pad_id}
    assert not row["positions"][is_padding].any()
    for segment in range(1, num_pieces + 1):
        tokens, targets = row["tokens"][segment_ids == segment], row["targets"][segment_ids == segment]
        np.testing.assert_array_equal(row["positions"][segment_ids == segment], np.arange(len(tokens)))
        assert (*tokens.tolist(), int(targets[-1])) in pieces  # so the last target is of the same document
        np.testing.assert_array_equal(tokens[1:], targets[:-1])


def test_a_long_document_does_not_fill_a_batch_of_its_own():
    documents = make_documents(["a" * 5000, "b" * 5000])
    with training(documents, batch_size=16, seq_len=10) as batches:
        for batch in take(batches, 3):
            assert {ord("a"), ord("b")} <= set(batch["tokens"].flat)


@pytest.mark.parametrize("window", [1, 2**20])  # with 1, only the documents are shuffled
def test_order_depends_on_seed_and_epoch(window):
    documents = make_documents([chr(97 + index) * 30 for index in range(20)])
    rows = num_rows(documents, 8)
    orders = []
    for seed in (0, 0, 1):
        with training(documents, seed=seed, window=window) as batches:
            orders.append([np.concatenate([batch["tokens"] for batch in take(batches, rows)]).tobytes() for _ in range(2)])
    assert orders[0] == orders[1]
    assert len({*orders[0], *orders[2]}) == 4


def test_epoch_seeds_leave_room_for_the_window_number_in_32_bits():
    seeds = {pack.epoch_seed(seed, epoch) for seed in (-1, 0, 1, 2**40) for epoch in range(20)}
    assert len(seeds) == 80
    assert 0 <= min(seeds) < max(seeds) < 2**31


@settings(few_examples, max_examples=12)  # each restores at every step
@given(corpora, row_lengths, shuffle_windows, st.integers(1, 4))
def test_resume_at_any_step_continues_bit_equal(texts, seq_len, window, batch_size):
    documents = make_documents(texts)
    arguments = {"batch_size": batch_size, "seq_len": seq_len, "window": window}
    steps = min(2 * math.ceil(num_rows(documents, seq_len) / batch_size) + 1, 8)  # into the third epoch, when it is near
    with training(documents, **arguments) as batches:
        states, expected = [batches.get_state()], []
        for _ in range(steps):
            expected.append(next(batches))
            states.append(batches.get_state())
        states = [json.dumps(state) for state in states]
        expected += take(batches, 3)
    with training(documents, **arguments) as resumed:
        for step, state in enumerate(states):
            resumed.set_state(json.loads(state))
            assert json.dumps(resumed.get_state()) == state
            assert_same_batches(take(resumed, 3), expected[step : step + 3])


def test_resume_where_documents_end_with_their_rows():
    documents = make_documents(["abcdefg", "hijklmn", "opqrstuvwxyzABC"])  # 8, 8 and 16 pairs: grain's state has no remainder
    for window in (1, 2**20):
        with training(documents, window=window) as batches:
            for _ in range(6):
                state = json.loads(json.dumps(batches.get_state()))
                expected = take(batches, 5)
                with training(documents, window=window) as resumed:
                    resumed.set_state(state)
                    assert_same_batches(take(resumed, 5), expected)
                batches.set_state(state)
                next(batches)


def test_a_state_is_not_changed_by_its_users():
    documents = make_documents(["abc", "defgh"])
    with training(documents) as batches:
        next(batches)
        state = batches.get_state()
        saved = json.dumps(state)
        for _ in range(2):
            batches.set_state(state)
            take(batches, 9)  # several epochs on
            assert json.dumps(state) == saved


RESUME_IN_NEW_PROCESS = """
import hashlib, json, sys
from hunyuan_jax.config import DataConfig
from hunyuan_jax.data import loader, pack, source
from hunyuan_jax.tokenizer import ByteTokenizer

documents, _ = source.split_documents(source.open_source(DataConfig(source=sys.argv[1])), 0.1)
batches = loader.train_iterator(documents, ByteTokenizer(), batch_size=4, seq_len=16, seed=7)
batches.set_state(json.loads(sys.argv[2]))
print([hashlib.sha256(b"".join(array.tobytes() for array in next(batches).values())).hexdigest() for _ in range(10)])
batches.close()
"""


def test_resume_in_a_new_process(tmp_path):
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text(f"{index} " * (index + 1))
    documents, _ = source.split_documents(open_folder(tmp_path), 0.1)
    with training(documents, batch_size=4, seq_len=16, seed=7) as batches:
        take(batches, 5)
        state = json.dumps(batches.get_state())
        expected = [hashlib.sha256(b"".join(array.tobytes() for array in batch.values())).hexdigest() for batch in take(batches, 10)]
    command = [sys.executable, "-c", RESUME_IN_NEW_PROCESS, str(tmp_path), state]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == (str(expected), "")  # stderr: a closed iterator leaves nothing to destroy
    assert len(state) < 2000


@pytest.mark.parametrize("shares", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[3], [0, 1, 2]]])
def test_processes_keep_their_rows_of_the_global_batch(shares):
    documents = make_documents([chr(97 + index) * 7 * index for index in range(1, 20)])
    with contextlib.ExitStack() as stack:
        whole = stack.enter_context(training(documents, batch_size=4))
        shards = [stack.enter_context(training(documents, batch_size=4, rows=np.array(share))) for share in shares]
        for _ in range(40):
            expected = next(whole)
            for share, shard in zip(shares, shards, strict=True):
                assert_same_batches([next(shard)], [{name: expected[name][share] for name in FIELDS}])
        assert all(shard.get_state() == whole.get_state() for shard in shards)


def test_what_cannot_be_batched_is_an_error():
    with pytest.raises(ConfigError, match="0 documents to train on"):
        loader.train_iterator([], TOKENIZER, batch_size=4, seq_len=8, seed=0)


# --- validation batches ---


@few_examples
@given(corpora, row_lengths, st.integers(1, 5))
def test_validation_holds_every_pair_once_and_is_filled_with_padding(texts, seq_len, batch_size):
    documents = make_documents(texts)
    rows = num_rows(documents, seq_len)
    arguments = {"batch_size": batch_size, "seq_len": seq_len, "num_batches": 1000}
    batches = loader.validation_batches(documents, TOKENIZER, **arguments)
    assert len(batches) == math.ceil(rows / batch_size)
    for batch in batches:
        assert_shapes(batch, (batch_size, seq_len))
    assert counted_pairs(batches) == expected_pairs(documents)
    is_padding = np.concatenate([batch["segment_ids"] for batch in batches]) == 0
    assert is_padding[rows:].all()
    for name in ("tokens", "targets"):
        assert set(np.concatenate([batch[name] for batch in batches])[is_padding]) <= {TOKENIZER.pad_id}
    assert_same_batches(batches, loader.validation_batches(documents, TOKENIZER, **arguments))


def test_validation_of_few_batches_samples_all_documents():
    documents = make_documents([chr(97 + index) * 200 for index in range(4)])
    arguments = {"batch_size": 8, "seq_len": 10}
    batches = loader.validation_batches(documents, TOKENIZER, num_batches=2, **arguments)
    assert len(batches) == 2
    assert set(b"abcd") <= set(np.concatenate([batch["tokens"] for batch in batches]).flat)
    assert_same_batches(batches, loader.validation_batches(documents, TOKENIZER, num_batches=5, **arguments)[:2])
    shares = loader.validation_batches(documents, TOKENIZER, num_batches=2, rows=np.array([2, 0]), **arguments)
    assert_same_batches(shares, [{name: batch[name][[2, 0]] for name in FIELDS} for batch in batches])
    assert loader.validation_batches([], TOKENIZER, num_batches=2, **arguments) == []


def test_importing_the_package_loads_neither_jax_nor_grain():
    check = "import sys, hunyuan_jax.data.loader, hunyuan_jax.data.source; assert not {'jax', 'grain'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
