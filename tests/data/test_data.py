"""Split, packing, mixtures and batches: nothing lost, nothing twice, and a batch is a function of
data, seed and step alone.
"""

import base64
import hashlib
import itertools
import json
import math
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from hunyuan_jax.config import DataConfig, PhaseConfig, SourceConfig, TrainConfig
from hunyuan_jax.data import loader, pack, source, tokens
from hunyuan_jax.data.mixture import Mixture
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.tokenizer import ByteTokenizer, HyTokenizer
from support.texts import (
    FIELDS,
    TOKENIZER,
    assert_same_batches,
    assert_shapes,
    check_row,
    counted_pairs,
    document_ids,
    expected_pairs,
    iterating,
    num_rows,
    order_of,
    pieces_of,
    take,
)

few_examples = settings(max_examples=10, derandomize=True)
corpora = st.lists(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), min_size=1, max_size=8
)
row_lengths = st.integers(1, 24)


def memory(texts, prefix=""):
    documents = [
        (f"{prefix}{index}.txt", np.array(document_ids(text), np.uint16))
        for index, text in enumerate(texts)
    ]
    return tokens.MemoryTokens(documents, source.Tally(1.0, ""))


# --- text in memory ---


def open_folder(path, **fields):
    return loader.open_corpus(DataConfig(source=str(path), **fields), TOKENIZER)


def test_documents_of_a_folder_are_tokenised(tmp_path):
    texts = {"a.txt": "first", "b.jsonl:1": "second\né"}
    (tmp_path / "a.txt").write_text(texts["a.txt"])
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": texts["b.jsonl:1"]}))
    [opened] = open_folder(tmp_path, text_field="body").sources
    assert opened.num_documents == 2
    found = {opened.document(piece): opened.read(piece).tolist() for piece in range(2)}
    assert found == {name: document_ids(text) for name, text in texts.items()}
    assert opened.hashes.tolist() == sorted(map(tokens.name_hash, texts))
    assert opened.ends.tolist()[-1] == sum(len(document_ids(text)) - 1 for text in texts.values())


def test_a_text_in_parts_is_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "PART_CHARS", 10)
    text = "some lines\n" * 20
    (tmp_path / "a.txt").write_text(text)
    [opened] = open_folder(tmp_path).sources
    assert opened.read(0).tolist() == document_ids(text)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"blank.jsonl": "\n\n"},
            r"config.data.source = '.*' holds no usable document \(0 skipped: no rows\)",
        ),
        (
            {"rows.jsonl": '{"body": "b"}\n{}\n'},
            r"\(2 skipped: rows.jsonl:1: no field 'text', it has "
            r"\['body'\]\).*config.data.text_field",
        ),
        (
            {"rows.jsonl": "bad\n" * 11},
            r"11 of 11 rows .* rows.jsonl:11.*config.data.max_bad_fraction = 0.01",
        ),
        (
            {"big.txt": "x" * 2000},
            r"config.data.source = '.*' holds 0 MB; .*python -m hunyuan_jax tokenize",
        ),
        (
            {"big.jsonl.gz": None},
            r"config.data.source = '.*' holds 0 MB; .*python -m hunyuan_jax tokenize",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line_with_the_remedy(tmp_path, monkeypatch, files, message):
    import gzip

    monkeypatch.setattr(tokens, "IN_MEMORY_BYTES", 1000)
    for name, text in files.items():
        if text is None:  # small as a file, large as text
            (tmp_path / name).write_bytes(gzip.compress(json.dumps({"text": "x" * 2000}).encode()))
        else:
            (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        open_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_max_bad_fraction_is_the_limit(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\nbad\n')
    assert open_folder(tmp_path).sources[0].num_documents == 1
    with pytest.raises(ConfigError, match=r"max_bad_fraction = 0.0"):
        open_folder(tmp_path, max_bad_fraction=0.0)


def test_identity_tells_texts_apart():
    one = memory(["abc", "defg"])
    assert one.identity() == memory(["abc", "defg"]).identity()
    assert one.identity() != memory(["abc", "defh"]).identity()
    assert one.identity() != memory(["abc", "defg"], prefix="x").identity()
    assert json.loads(json.dumps(one.identity())) == one.identity()


# --- split ---


def held_out_names(opened, fraction):
    [count] = pack.split(opened, fraction, "the source")
    return {opened.document(piece) for piece in range(count)}


@few_examples
@given(
    st.sets(st.text(min_size=1, max_size=8), min_size=2, max_size=40),
    st.floats(0.001, 0.999),
    st.randoms(use_true_random=False),
)
def test_split_leaves_something_on_both_sides_and_ignores_the_order(names, fraction, random):
    documents = [(name, np.zeros(3, np.uint16)) for name in sorted(names)]
    opened = tokens.MemoryTokens(documents, source.Tally(1.0, ""))
    held_out = held_out_names(opened, fraction)
    assert 0 < len(held_out) < len(names)
    shuffled = tokens.MemoryTokens(random.sample(documents, len(documents)), source.Tally(1.0, ""))
    assert held_out_names(shuffled, fraction) == held_out


def test_split_holds_out_the_fraction_and_keeps_it_when_the_corpus_grows():
    held_out = held_out_names(memory("x" * 4000), 0.1)
    assert 320 < len(held_out) < 480
    before = held_out_names(memory("x" * 500), 0.1)
    assert before == {name for name in held_out if int(name.removesuffix(".txt")) < 500}


# a run resumed by a later version must not train on what it held out
def test_split_never_changes():
    names = sorted(
        held_out_names(memory("x" * 40), 0.25), key=lambda name: int(name.removesuffix(".txt"))
    )
    assert names == ["1.txt", "7.txt", "13.txt", "14.txt", "23.txt", "26.txt", "30.txt", "33.txt"]


def test_split_of_nothing_and_of_one_document():
    assert held_out_names(memory(["only"]), 0.0) == set()
    with pytest.raises(
        ConfigError,
        match=r"validation_fraction = 0\.02 needs at least 2 documents, s0 holds 1.*Set it to 0",
    ):
        order_of(memory(["only"]), fraction=0.02)


# --- rows ---


@few_examples
@given(corpora, row_lengths, st.integers(-5, 2**40))
def test_every_pair_counts_exactly_once_an_epoch(texts, seq_len, seed):
    order = order_of(memory(texts), seq_len=seq_len, seed=seed)
    rows = num_rows(texts, seq_len)  # rounded up: no padding but in the last row
    for epoch in range(3):
        batches = [order.batch(step) for step in range(epoch * rows, (epoch + 1) * rows)]
        assert counted_pairs(batches) == expected_pairs(texts)


@few_examples
@given(corpora, row_lengths)
def test_rows_are_document_pieces_one_after_the_other(texts, seq_len):
    pieces = pieces_of(texts, seq_len)
    order = order_of(memory(texts), batch_size=3, seq_len=seq_len)
    for step in range(5):
        batch = order.batch(step)
        assert_shapes(batch, (3, seq_len))
        for row in range(3):
            check_row({name: array[row] for name, array in batch.items()}, pieces)


def test_a_long_document_does_not_fill_a_batch_of_its_own():
    order = order_of(memory(["a" * 5000, "b" * 5000]), batch_size=16, seq_len=10)
    for step in range(3):
        assert {ord("a"), ord("b")} <= set(order.batch(step)["tokens"].flat)


def test_rows_are_cut_elsewhere_in_every_epoch():
    text = "".join(map(chr, np.random.default_rng(0).integers(0, 128, 2000)))
    order = order_of(memory([text]), seq_len=25)
    rows = num_rows([text], 25)
    cuts = [
        {
            tuple(order.batch(step)["tokens"][0, :5].tolist())
            for step in range(epoch * rows, (epoch + 1) * rows)
        }
        for epoch in range(3)
    ]
    assert not cuts[0] & cuts[1]
    assert not cuts[1] & cuts[2]


def test_order_depends_on_seed_and_epoch():
    texts = [chr(97 + index) * 30 for index in range(20)]
    rows = num_rows(texts, 8)
    orders = []
    for seed in (0, 0, 1):
        order = order_of(memory(texts), seed=seed)
        epochs = [range(rows), range(rows, 2 * rows)]
        orders.append(
            [
                np.concatenate([order.batch(step)["tokens"] for step in epoch]).tobytes()
                for epoch in epochs
            ]
        )
    assert orders[0] == orders[1]
    assert len({*orders[0], *orders[2]}) == 4


# --- mixtures ---

three_weights = st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any)
phase_lists = st.lists(st.tuples(st.integers(0, 300), three_weights), min_size=1, max_size=4)


@few_examples
@given(phase_lists, st.integers(0, 2**40))
def test_rows_of_each_source_are_counted_without_walking(phases, offset):
    starts = [0, *itertools.accumulate(length for length, _ in phases[:-1])]
    mixture = Mixture(starts, [weights for _, weights in phases], offset)
    counts = [0, 0, 0]
    for row in range(starts[-1] + 200):
        assert mixture.counts(row) == counts
        assert mixture.phase(row) == max(p for p, start in enumerate(starts) if start <= row)
        counts[mixture.source(row)] += 1
    far = 10**15 + 12_345
    counts = mixture.counts(far)
    assert sum(counts) == far
    counts[mixture.source(far)] += 1
    assert mixture.counts(far + 1) == counts


@few_examples
@given(
    st.lists(st.integers(0, 100), min_size=2, max_size=6).filter(any),
    st.integers(0, 10**9),
    st.integers(1, 3000),
    st.integers(0, 2**32),
)
def test_every_stretch_of_rows_has_its_shares(weights, start, length, offset):
    mixture = Mixture([0], [weights], offset)
    for before, after, weight in zip(
        mixture.counts(start), mixture.counts(start + length), weights, strict=True
    ):
        assert abs(after - before - length * weight / sum(weights)) < 7
        assert weight or after == before


def test_phases_change_the_shares_at_their_step():
    sources = [memory([letter * 50] * 20) for letter in "abc"]
    order = order_of(
        *sources, batch_size=10, weights=((3, 1, 0), (1, 1, 2)), starts=(0.0, 0.9), num_steps=100
    )
    letters = np.stack([order.batch(step)["tokens"][:, 4] for step in range(100)])
    shares = [
        [np.isin(part, [ord(letter)]).sum() for letter in "abc"]
        for part in (letters[:90], letters[90:])
    ]
    # A few of the tokens looked at are bos or eos, hence of no letter.
    assert shares[0] == pytest.approx([675, 225, 0], abs=45)
    assert shares[1] == pytest.approx([25, 25, 50], abs=8)
    assert order.rows_before(90) == pytest.approx({"s0": 675, "s1": 225, "s2": 0}, abs=3)
    assert [order.describe(step)["phase"] for step in (0, 89, 90, 500)] == ["p0", "p0", "p1", "p1"]


def test_each_source_of_a_mixture_goes_through_its_own_epochs():
    texts = [["abcdef"] * 5, ["ghi"] * 9]
    order = order_of(*map(memory, texts), weights=((2.0, 1.0),))
    rows = [num_rows(source_texts, 8) for source_texts in texts]
    seen = [[], []]
    for step in range(90):
        described = order.describe(step)["rows"][0]
        seen[int(described["source"][1])].append((described["epoch"], order.batch(step)))
    for per_epoch, source_texts, epochs in zip(rows, texts, seen, strict=True):
        assert [epoch for epoch, _ in epochs] == [i // per_epoch for i in range(len(epochs))]
        for i in range(len(epochs) // per_epoch):
            assert counted_pairs(
                batch for _, batch in epochs[i * per_epoch : (i + 1) * per_epoch]
            ) == expected_pairs(source_texts)


def test_mixture_config_opens_its_sources(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(3):
            (tmp_path / name / f"{index}.txt").write_text(name * 10)
    sources = tuple(SourceConfig(name, str(tmp_path / name)) for name in "ab")
    data = DataConfig(
        sources=sources, phases=(PhaseConfig("all", (1.0, 0.0)),), validation_fraction=0.3
    )
    corpus = loader.open_corpus(data, TOKENIZER)
    assert corpus.names == ("a", "b")
    order = loader.PackedRows(corpus, data, TrainConfig(batch_size=2, seq_len=8))
    assert set(order.batch(0)["tokens"].flat) <= {
        *b"a",
        TOKENIZER.bos_id,
        TOKENIZER.eos_id,
        TOKENIZER.pad_id,
    }
    assert set(b"ab") <= set(
        np.concatenate([batch["tokens"] for batch in order.validation(9)]).flat
    )  # what is held out of all
    assert str(order).startswith("a: 3 documents")
    missing = DataConfig(
        sources=(SourceConfig("a", str(tmp_path / "none")),), phases=(PhaseConfig("all", (1.0,)),)
    )
    with pytest.raises(ConfigError, match=r"config.data.sources\['a'\] = '.*none' does not exist"):
        loader.open_corpus(missing, TOKENIZER)


# --- batches of a run ---

TWO = [["abcdefgh" * 9, "ijk", "lmnop"], ["q" * 40, "rstu" * 3]]


def two_sources(weights=((1.0, 3.0), (1.0, 1.0)), starts=(0.0, 0.5), seed=0):
    return order_of(
        *map(memory, TWO),
        batch_size=8,
        seq_len=16,
        weights=weights,
        starts=starts,
        num_steps=10,
        seed=seed,
    )


@pytest.mark.cases(3)
@pytest.mark.parametrize(("num_hosts", "num_threads"), [(1, 0), (1, 3), (2, 1), (4, 0), (8, 3)])
def test_hosts_and_threads_have_no_say(num_hosts, num_threads):
    expected = [two_sources(seed=3).batch(step) for step in range(10)]
    hosts = []
    for host in range(num_hosts):
        rows = np.arange(8)[host::num_hosts]  # not consecutive, as on a torus
        with iterating(two_sources(seed=3), rows=rows, num_threads=num_threads) as batches:
            hosts.append((rows, take(batches, 10)))
    for step, batch in enumerate(expected):
        for rows, kept in hosts:
            assert_same_batches([kept[step]], [{name: batch[name][rows] for name in FIELDS}])


@pytest.mark.heavy
@settings(few_examples, max_examples=2)  # each starts nine iterators
@given(
    corpora,
    row_lengths,
    st.integers(1, 4),
    st.lists(st.integers(0, 10**7), min_size=3, max_size=3),
)
def test_resume_at_any_step_continues_bit_equal(texts, seq_len, batch_size, steps):
    arguments = {"batch_size": batch_size, "seq_len": seq_len}
    with iterating(order_of(memory(texts), **arguments), num_threads=1) as batches:
        for step in (0, *steps):
            batches.set_state({"next_index": step, "rows": {"s0": step * batch_size}})
            expected = take(batches, 2)
            state = json.dumps(batches.get_state())
            expected += take(batches, 2)
            assert_same_batches(
                expected, [order_of(memory(texts), **arguments).batch(step + i) for i in range(4)]
            )
            with iterating(order_of(memory(texts), **arguments)) as resumed:
                resumed.set_state(json.loads(state))
                assert json.dumps(resumed.get_state()) == state
                assert_same_batches(take(resumed, 2), expected[2:])


def test_a_state_of_another_mixture_is_refused():
    with iterating(two_sources()) as batches:
        take(batches, 6)
        state = json.loads(json.dumps(batches.get_state()))
        batches.set_state(state)
    assert sum(state["rows"].values()) == 48
    assert len(json.dumps(state)) < 200
    later = two_sources(weights=((1.0, 3.0), (0.0, 1.0)), starts=(0.0, 0.7))
    with (
        iterating(later) as batches,
        pytest.raises(
            ConfigError, match=r"was made after .*Phases may change only from the checkpoint on"
        ),
    ):
        batches.set_state(state)
    changed_after = two_sources(
        weights=((1.0, 3.0), (1.0, 1.0), (1.0, 0.0)), starts=(0.0, 0.5, 0.6)
    )
    with iterating(changed_after) as batches:
        batches.set_state(state)
        with pytest.raises(ConfigError, match="earlier version"):
            batches.set_state({"epoch": 0, "rows": {}})


RESUME_IN_NEW_PROCESS = """
import hashlib, json, sys
from hunyuan_jax.config import DataConfig, TrainConfig
from hunyuan_jax.data import loader, stream
from hunyuan_jax.tokenizer import ByteTokenizer

data = DataConfig(source=sys.argv[1], validation_fraction=0.1)
corpus = loader.open_corpus(data, ByteTokenizer())
order = loader.PackedRows(corpus, data, TrainConfig(batch_size=4, seq_len=16, seed=7))
batches = stream.read_ahead(order)
batches.set_state(json.loads(sys.argv[2]))
hashes = []
for _ in range(10):
    joined = b"".join(array.tobytes() for array in next(batches).values())
    hashes.append(hashlib.sha256(joined).hexdigest())
print(hashes)
batches.close()
"""


@pytest.mark.heavy
def test_resume_in_a_new_process(tmp_path):
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text(f"{index} " * (index + 1))
    data = DataConfig(source=str(tmp_path), validation_fraction=0.1)
    order = loader.PackedRows(
        loader.open_corpus(data, TOKENIZER), data, TrainConfig(batch_size=4, seq_len=16, seed=7)
    )
    with iterating(order) as batches:
        take(batches, 5)
        state = json.dumps(batches.get_state())
        expected = [
            hashlib.sha256(b"".join(array.tobytes() for array in batch.values())).hexdigest()
            for batch in take(batches, 10)
        ]
    command = [sys.executable, "-c", RESUME_IN_NEW_PROCESS, str(tmp_path), state]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == (
        str(expected),
        "",
    )  # stderr: a closed iterator leaves nothing to destroy


# a run continued by a later version must see what it would have seen
def test_the_order_never_changes():
    batches = [two_sources(seed=5).batch(step) for step in (0, 7, 1000)]
    assert [
        hashlib.sha256(batch["tokens"].tobytes()).hexdigest()[:12] for batch in batches
    ] == ORDER


ORDER = ["82518ae2818e", "b838871fa012", "cc963c2dabbd"]


@few_examples
@given(corpora, row_lengths, st.integers(0, 50))
def test_description_names_what_a_batch_holds(texts, seq_len, step):
    order = order_of(memory(texts), batch_size=2, seq_len=seq_len)
    batch, described = order.batch(step), order.describe(step)
    assert json.loads(json.dumps(described)) == described
    assert described["efficiency"] == batch["loss_weights"].mean()
    for row, told in enumerate(described["rows"]):
        ids = [
            document_ids(texts[int(part["name"].removesuffix(".txt"))])[
                part["start"] : part["stop"]
            ]
            for part in told["documents"]
        ]
        assert [*itertools.chain(*ids)] == batch["tokens"][row][
            batch["segment_ids"][row] > 0
        ].tolist()
        assert {part["piece"] for part in told["documents"]} == {0}


# --- validation ---


@few_examples
@given(corpora, row_lengths, st.integers(1, 5))
def test_validation_holds_every_pair_once_and_is_filled_with_padding(texts, seq_len, batch_size):
    order = order_of(
        memory([*texts, "x" * 30]), batch_size=batch_size, seq_len=seq_len, fraction=0.5
    )
    training = range(num_rows([*texts, "x" * 30], seq_len))
    batches = order.validation(1000)
    for batch in batches:
        text_bytes = batch.pop("target_bytes")
        assert_shapes(batch, (batch_size, seq_len))
        is_text = (batch["segment_ids"] > 0) & (batch["targets"] < 256)
        np.testing.assert_array_equal(text_bytes, is_text.astype(np.float32), strict=True)
    held_out = counted_pairs(batches)
    assert held_out
    assert expected_pairs([*texts, "x" * 30]) >= held_out
    rows = math.ceil(held_out.total() / seq_len)
    assert len(batches) == math.ceil(rows / batch_size)
    is_padding = np.concatenate([batch["segment_ids"] for batch in batches]) == 0
    assert is_padding[rows:].all()
    for name in ("tokens", "targets"):
        assert set(np.concatenate([batch[name] for batch in batches])[is_padding]) <= {
            TOKENIZER.pad_id
        }
    # An epoch of training is the rest.
    per_epoch = math.ceil((expected_pairs([*texts, "x" * 30]) - held_out).total() / seq_len)
    assert per_epoch <= len(training)
    single = order_of(memory([*texts, "x" * 30]), seq_len=seq_len, fraction=0.5)
    assert counted_pairs(
        single.batch(step) for step in range(per_epoch)
    ) + held_out == expected_pairs([*texts, "x" * 30])


def test_validation_of_few_batches_samples_all_documents_for_every_seed():
    texts = [chr(97 + index) * 200 for index in range(12)]
    batches = order_of(memory(texts), batch_size=8, seq_len=10, fraction=0.4).validation(2)
    assert len(batches) == 2
    letters = set(np.concatenate([batch["tokens"] for batch in batches]).flat) - {
        TOKENIZER.bos_id,
        TOKENIZER.eos_id,
    }
    held_out = held_out_names(memory(texts), 0.4)
    assert len(letters) >= len(held_out) - 1 > 2
    other = order_of(memory(texts), batch_size=8, seq_len=10, fraction=0.4, seed=9)
    assert_same_batches(batches, other.validation(5)[:2])
    assert_same_batches(
        other.validation(2, rows=np.array([2, 0])),
        [{name: array[[2, 0]] for name, array in batch.items()} for batch in batches],
    )
    assert order_of(memory(texts)).validation(2) == []


def test_bytes_of_targets_are_those_of_the_text(tmp_path):
    ranked = [*(bytes([b]) for b in range(256)), b"the ", "é".encode()]
    (tmp_path / "ranks").write_text(
        "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranked))
    )
    for tokenizer in (ByteTokenizer(), HyTokenizer(tmp_path / "ranks")):
        ids = [*tokenizer.encode("the é the café"), tokenizer.eos_id, tokenizer.pad_id]
        weights = np.ones((1, len(ids)), np.float32)
        weights[0, -1] = 0
        (made,) = loader.with_target_bytes(
            [{"targets": np.array([ids]), "loss_weights": weights}], tokenizer
        )
        assert made["target_bytes"].sum() == len("the é the café".encode())


def test_importing_the_package_loads_neither_jax_nor_grain():
    check = (
        "import sys, hunyuan_jax.data.loader, hunyuan_jax.data.source; assert not {'jax', "
        "'grain'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
