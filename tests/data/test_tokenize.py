"""Token shards: the documents of the text, the same bytes after any kill and by any runner,
refused when they do not fit.
"""

import contextlib
import dataclasses
import gzip
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from hunyuan_jax import cli
from hunyuan_jax.config import DataConfig, PhaseConfig, SourceConfig
from hunyuan_jax.data import loader, shards, source, tokenize, tokens
from hunyuan_jax.data.shards import Job
from hunyuan_jax.errors import ConfigError
from support import paths, processes
from support.texts import (
    TOKENIZER,
    assert_same_batches,
    check_row,
    counted_pairs,
    document_ids,
    expected_pairs,
    iterating,
    order_of,
    pieces_of,
    take,
)

ROOT = paths.ROOT

few_examples = settings(max_examples=12, derandomize=True)


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run_here(job):
    """A job without processes."""
    plan = tokenize.prepare(job)
    for number, unit in enumerate(plan.units):
        shards.run_unit(job, number, unit)
    return shards.finish(job, len(plan.units), plan.settings)


def command(*arguments):
    return [sys.executable, "-m", "hunyuan_jax", *map(str, arguments)]


def run(*arguments, timeout=processes.PATIENCE):
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


def main(*arguments):
    """The command in this process; overrides of the config are read from sys.argv."""
    arguments = [*map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hunyuan_jax", *arguments])
        return cli.run(arguments)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def documents_of(opened):
    """{name: ids} of a token source, pieces joined."""
    found = {}
    for piece in range(len(opened.ends)):
        ids, number = opened.read(piece).tolist(), int(opened.numbers[piece])
        have = found.setdefault(opened.document(piece), [])
        assert len(have) == (number * tokens.PIECE_PAIRS + 1 if number else 0)
        assert have[-1:] == ids[:1] or not number
        have += ids[1:] if number else ids
    return found


@contextlib.contextmanager
def small_pieces(num_pairs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE_PAIRS", num_pairs)
        patch.setattr(os, "fsync", lambda file: None)  # hundreds of tiny shards
        yield


corpora = st.lists(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), min_size=1, max_size=8
)


@few_examples
@given(corpora, st.integers(1, 24), st.integers(1, 20), st.integers(30, 200))
def test_rows_of_shards_hold_every_pair_once_an_epoch(texts, seq_len, piece_pairs, shard_bytes):
    with tempfile.TemporaryDirectory() as folder, small_pieces(piece_pairs):
        folder = Path(folder)
        write_rows(folder / "rows.jsonl", texts)
        manifest = run_here(
            Job(str(folder / "rows.jsonl"), str(folder / "out"), "byte", shard_bytes=shard_bytes)
        )
        opened = tokens.open_shards(folder / "out", TOKENIZER, "byte")
        assert documents_of(opened) == {
            f"rows.jsonl:{row}": document_ids(text) for row, text in enumerate(texts, 1)
        }
        assert (manifest["num_documents"], manifest["num_bad"]) == (len(texts), 0)
        assert manifest["num_bytes"] == sum(len(text.encode()) for text in texts)
        assert manifest["num_tokens"] == sum(len(document_ids(text)) for text in texts)
        for first, stop in zip(opened.shard_pieces[:-1], opened.shard_pieces[1:], strict=True):
            assert opened.hashes[first:stop].tolist() == sorted(opened.hashes[first:stop].tolist())
        pairs = np.diff(opened.ends.astype(np.int64)[opened.shard_pieces[1:] - 1], prepend=0)
        rows = sum(math.ceil(count / seq_len) for count in pairs)
        order = order_of(opened, seq_len=seq_len)
        allowed = pieces_of(texts, seq_len)
        for epoch in range(2):
            batches = [order.batch(step) for step in range(epoch * rows, (epoch + 1) * rows)]
            assert counted_pairs(batches) == expected_pairs(texts)
            for batch in batches:
                check_row({name: array[0] for name, array in batch.items()}, allowed)


def test_a_document_in_pieces_is_one_segment_of_a_row(tmp_path):
    text = "".join(random.Random(0).choices("abcdef", k=500))
    write_rows(tmp_path / "rows.jsonl", [text])
    with small_pieces(7):
        run_here(Job(str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), "byte"))
        order = order_of(tokens.open_shards(tmp_path / "out", TOKENIZER, "byte"), seq_len=40)
        segments = [order.batch(step)["segment_ids"].max() for step in range(13)]
        assert sorted(segments)[:-2] == [1] * 11  # but for the rows where the ring begins and ends
        assert max(segments) <= 2
        for part in order.describe(5)["rows"][0]["documents"]:
            assert part["start"] // 7 == part["piece"]
            ids = document_ids(text)[part["start"] : part["stop"]]
            assert bytes(ids).decode() in text


def test_held_out_documents_are_those_of_the_text(tmp_path):
    texts = [f"document {i} " * 5 for i in range(60)]
    write_rows(tmp_path / "rows.jsonl", texts)
    run_here(Job(str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), "byte", shard_bytes=700))
    held_out = []
    for path in (tmp_path / "rows.jsonl", tmp_path / "out"):
        data = DataConfig(source=str(path), validation_fraction=0.2)
        corpus = loader.open_corpus(data, TOKENIZER)
        held_out.append(
            counted_pairs(
                loader.PackedRows(
                    corpus, data, loader.TrainConfig(batch_size=2, seq_len=16)
                ).validation(100)
            )
        )
    assert held_out[0] == held_out[1]
    assert 100 < held_out[0].total() < 2000
    assert len(list((tmp_path / "out").glob("*.array_record"))) > 3


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with small_pieces(9):
        for name in "ab":
            write_rows(folder / f"{name}.jsonl", [f"{name}{i}" * (i % 9 + 1) for i in range(80)])
            run_here(
                Job(str(folder / f"{name}.jsonl"), str(folder / name), "byte", shard_bytes=300)
            )
    return folder


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 8])
def test_hosts_and_threads_read_the_same_global_batches(two_folders, num_hosts):
    data = DataConfig(
        sources=tuple(SourceConfig(name, str(two_folders / name)) for name in "ab"),
        phases=(PhaseConfig("main", (3.0, 1.0)), PhaseConfig("anneal", (0.0, 1.0), 0.5)),
    )

    def new_order():
        return loader.PackedRows(
            loader.open_corpus(data, TOKENIZER),
            data,
            loader.TrainConfig(num_steps=12, batch_size=8, seq_len=16),
        )

    with small_pieces(9):
        expected = [new_order().batch(step) for step in range(12)]
        for host in range(num_hosts):
            rows = np.arange(8)[host * 8 // num_hosts : (host + 1) * 8 // num_hosts]
            with iterating(new_order(), rows=rows, num_threads=1 + host % 3) as batches:
                mine = take(batches, 5)
                state = json.loads(json.dumps(batches.get_state()))
            with iterating(new_order(), rows=rows) as batches:
                batches.set_state(state)
                mine += take(batches, 7)
            assert_same_batches(
                mine, [{name: array[rows] for name, array in batch.items()} for batch in expected]
            )


# --- the job ---


def test_large_files_of_every_kind_are_units_of_their_own(tmp_path):
    """So several workers share them; what is in one of them is one worker's."""
    (tmp_path / "text").mkdir()
    names = [
        f"{i}{kind}"
        for i in range(2)
        for kind in (
            ".array_record",
            ".jsonl.gz",
            ".jsonl.zst",
            ".md.gz",
            ".parquet",
            ".py",
            ".txt",
        )
    ]
    for name in names:
        (tmp_path / "text" / name).write_bytes(bytes(3000))
    plan = tokenize.prepare(
        Job(str(tmp_path / "text"), str(tmp_path / "out"), "byte", shard_bytes=2000)
    )
    assert [[span.name for span in unit] for unit in plan.units] == [
        [name] for name in sorted(names)
    ]


def test_ranges_of_a_big_file_and_kinds_of_files_are_units(tmp_path):
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "big.jsonl", [f"row {i}" for i in range(1, 301)])
    (tmp_path / "in" / "z.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped row"}\n' * 200))
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / "in" / name).write_text(name)
    job = Job(str(tmp_path / "in"), str(tmp_path / "out"), "byte", shard_bytes=1000)
    plan = tokenize.prepare(job)
    assert [[span.name for span in unit] for unit in plan.units] == [
        ["a.txt", "b.txt"],
        *[["big.jsonl"]] * 6,
        ["c.md", "z.jsonl.gz"],
    ]
    manifest = run_here(job)
    found = documents_of(tokens.open_shards(tmp_path / "out", TOKENIZER, "byte"))
    expected = {f"big.jsonl:{i}": document_ids(f"row {i}") for i in range(1, 301)}
    expected |= {f"z.jsonl.gz:{i}": document_ids("zipped row") for i in range(1, 201)}
    assert found == expected | {name: document_ids(name) for name in ("a.txt", "b.txt", "c.md")}
    # A compressed file is one unit and more than one shard.
    names = [shard["file"] for shard in manifest["shards"] if shard["file"].startswith("00007")]
    assert names == ["00007-000.array_record", "00007-001.array_record"]
    assert manifest["files"]["big.jsonl"] == {
        "num_documents": 300,
        "num_bytes": 1992,
        "num_bad": 0,
        "first_bad": "",
    }


def test_a_text_larger_than_a_shard_is_cut_and_named_once(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "PART_CHARS", 100)
    monkeypatch.setattr(source, "_TEXT_AT_ONCE", 1000)
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    with small_pieces(64):
        manifest = run_here(
            Job(str(tmp_path / "a.txt"), str(tmp_path / "out"), "byte", shard_bytes=1500)
        )
        assert manifest["num_documents"] == 1
        assert len(manifest["shards"]) == 6
        assert documents_of(tokens.open_shards(tmp_path / "out", TOKENIZER, "byte")) == {
            "a.txt": document_ids(text)
        }


def test_finished_or_other_jobs(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ["one", "two"])
    job = Job(str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), "byte")
    run_here(job)
    before = contents(tmp_path / "out")
    assert before.keys() == {"00000-000.array_record", "index.npy", "manifest.json"}
    assert tokenize.prepare(job) is None
    assert contents(tmp_path / "out") == before
    with pytest.raises(ConfigError, match="was begun with other text_field; give another folder"):
        tokenize.prepare(
            Job(str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), "byte", text_field="body")
        )
    tokenize.prepare(Job(str(tmp_path / "rows.jsonl"), str(tmp_path / "begun"), "byte"))
    write_rows(tmp_path / "rows.jsonl", ["one", "two", "three"])
    for folder in ("out", "begun"):
        with pytest.raises(ConfigError, match="was begun with other files"):
            tokenize.prepare(Job(str(tmp_path / "rows.jsonl"), str(tmp_path / folder), "byte"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(ConfigError, match="holds something other than token shards"):
        tokenize.prepare(Job(str(tmp_path / "rows.jsonl"), str(tmp_path / "mine"), "byte"))
    with pytest.raises(ConfigError, match="cannot be made"):
        tokenize.prepare(
            Job(str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.jsonl" / "out"), "byte")
        )
    with pytest.raises(ConfigError, match=r"begun is unfinished.*tokenize` again; it continues"):
        loader.open_corpus(DataConfig(source=str(tmp_path / "begun")), TOKENIZER)


def test_shards_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    run_here(Job(str(tmp_path / "a.txt"), str(tmp_path / "out"), "byte"))
    data = DataConfig(source=str(tmp_path / "out"))
    other = type("Other", (type(TOKENIZER),), {"_rules": ("other",)})()
    message = (
        rf"was made with tokenizer 'byte' \(fingerprint {TOKENIZER.fingerprint()}\); .* has "
        rf"fingerprint {other.fingerprint()}"
    )
    with pytest.raises(ConfigError, match=message):
        loader.open_corpus(data, other)
    shard = tmp_path / "out" / "00000-000.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    message = (
        f"00000-000.array_record has {len(whole) - 1} bytes, the manifest says {len(whole)}; "
        f"copy it again"
    )
    with pytest.raises(ConfigError, match=message):
        loader.open_corpus(data, TOKENIZER)
    assert loader.damaged_shards(data) == [str(shard)]
    # One byte of the record: found when it is read, and by its hash.
    place = whole.rindex(b"a.txt")
    shard.write_bytes(whole[:place] + b"b" + whole[place + 1 :])
    assert loader.damaged_shards(data) == [str(shard)]
    with pytest.raises(
        ConfigError, match=r"00000-000.array_record: record 0 cannot be read .*data --verify"
    ):
        order_of(loader.open_corpus(data, TOKENIZER).sources[0]).batch(0)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(ConfigError, match="has format 0, this version reads 1"):
        loader.open_corpus(data, TOKENIZER)
    with pytest.raises(ConfigError, match="none of the sources .* is a folder of token shards"):
        loader.damaged_shards(DataConfig(source=str(tmp_path / "a.txt")))


def test_damaged_manifest_and_index_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    run_here(Job(str(tmp_path / "a.txt"), str(tmp_path / "out"), "byte"))
    data = DataConfig(source=str(tmp_path / "out"))
    for name, rest, message in [
        ("index.npy", -8, "cannot be read"),
        ("manifest.json", -9, "is damaged"),
    ]:
        path = tmp_path / "out" / name
        path.write_bytes(path.read_bytes()[:rest])
        with pytest.raises(ConfigError, match=rf"{name} {message} .*; copy it again, or "):
            loader.open_corpus(data, TOKENIZER)


def test_a_full_disk_is_one_line_and_the_same_command_continues(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [f"row {i}" for i in range(2000)])
    job = Job(str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), "byte")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for room, name in ((40_000, "00000-000.array_record"), (100, "plan.json")):
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (room, hard)
        )  # a write beyond it fails as on a full disk
        try:
            with pytest.raises(
                ConfigError, match=f"{name} cannot be written .*; the same command continues"
            ) as error:
                run_here(
                    job
                    if name != "plan.json"
                    else dataclasses.replace(job, output=str(tmp_path / "other"))
                )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert "\n" not in str(error.value)
    assert {path.name for path in (tmp_path / "out" / "unfinished").iterdir()} == {"plan.json"}
    assert run_here(job)["num_documents"] == 2000


def test_one_command_at_a_time(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    job = Job(str(tmp_path / "a.txt"), str(tmp_path / "out"), "byte")
    tokenize.prepare(job)
    left_by_a_killed_one = tmp_path / "out" / "unfinished" / "00000-000.array_record.1.tmp"
    left_by_a_killed_one.write_text("half")
    with shards.alone(job):
        assert not left_by_a_killed_one.exists()
        with (
            pytest.raises(
                ConfigError, match="another command is writing to --output = .*; wait for it"
            ),
            shards.alone(job),
        ):
            pass
    with shards.alone(job):
        pass


def test_text_without_a_document_makes_no_shards(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "text"}\n')
    with pytest.raises(
        ConfigError,
        match=r"no usable document \(1 skipped: rows.jsonl:1: no field 'text'.*set --text_field",
    ):
        run_here(Job(str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), "byte"))
    assert not (tmp_path / "out" / "manifest.json").exists()


# --- the command, in processes of its own ---


@pytest.fixture(scope="module")
def big_rows(tmp_path_factory):
    """A .jsonl of 6 MB, hence seven units of 1 MiB."""
    path = tmp_path_factory.mktemp("big") / "rows.jsonl"
    rng = random.Random(0)
    write_rows(
        path,
        [
            "".join(rng.choices("abcdefghijklmnop qrstuvw\n", k=rng.randrange(1, 4000)))
            for _ in range(3000)
        ],
    )
    return path


@pytest.fixture(scope="module")
def whole(big_rows):
    """The shards of an undisturbed run."""
    result = run(
        "tokenize",
        f"--input={big_rows}",
        f"--output={big_rows.parent / 'whole'}",
        "--tokenizer=byte",
        "--shard_mb=1",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["num_documents"], summary["shards"], summary["num_bad"]) == (3000, 6, 0)
    return contents(big_rows.parent / "whole")


@pytest.mark.slow
def test_killed_and_continued_gives_identical_shards(big_rows, whole, tmp_path):
    arguments = (
        "tokenize",
        f"--input={big_rows}",
        f"--output={tmp_path / 'out'}",
        "--tokenizer=byte",
        "--shard_mb=1",
        "--num_workers=2",
    )
    rng = random.Random(0)
    num_kills = num_done = 0
    while not (tmp_path / "out" / "manifest.json").exists():
        process = subprocess.Popen(
            command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Wait for one more unit than the last time, then strike at a random moment.
        while (
            process.poll() is None
            and len(list(tmp_path.glob("out/unfinished/0*.json"))) <= num_done
        ):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        num_kills += process.poll() is None
        process.kill()
        process.wait()
        num_done = len(list(tmp_path.glob("out/unfinished/0*.json")))
    assert num_kills >= 2
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out") == whole


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.heavy
def test_a_worker_that_dies_ends_the_command_which_continues(big_rows, whole, tmp_path):
    arguments = (
        "tokenize",
        f"--input={big_rows}",
        f"--output={tmp_path / 'out'}",
        "--tokenizer=byte",
        "--shard_mb=1",
        "--num_workers=1",
    )
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "out" / "unfinished" / "00000.json").exists():
        assert process.poll() is None
        time.sleep(0.002)
    for child in children_of(
        process.pid
    ):  # the worker, and the one that watches over shared memory
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2, errors
    assert "error: a worker process has died" in errors
    assert run(*arguments).returncode == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.heavy
def test_too_many_bad_rows_stop_the_command_with_file_and_line(tmp_path):
    good = '{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_text(good * 100 + "bad\n" * 10)
    (tmp_path / "b.jsonl").write_text(good * 7 + '{"text": 1}\n' + good * 3)
    arguments = ("tokenize", f"--input={tmp_path}", "--tokenizer=byte", "--num_workers=1")
    result = run(*arguments, f"--output={tmp_path / 'out'}")
    assert result.returncode == 2
    expected = (
        "error: 11 of 118 rows cannot be used, the last is b.jsonl:8: field 'text' is a int, not "
        "a string. That is more than --max_bad"
    )
    assert result.stderr.splitlines()[-1].startswith(expected)
    result = run(*arguments, f"--output={tmp_path / 'out'}", "--max_bad_fraction=0.02", "--json")
    assert json.loads(result.stdout.splitlines()[-1])["num_bad"] == 11
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (
        manifest["files"]["b.jsonl"]["first_bad"]
        == "b.jsonl:8: field 'text' is a int, not a string"
    )


def test_bad_rows_of_other_units_count(tmp_path):
    bad = source.Bad("a:1", "bad")
    counted = source.Tally(0.01, "limit", lambda: (500, 10))
    with pytest.raises(ConfigError, match="11 of 511 rows"):
        counted.add_bad("a", bad)
    source.Tally(0.01, "limit", lambda: (2000, 10)).add_bad("a", bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output=x", "--tokenizer=byte"), "--input is missing"),
        (("--input=stdlib", "--output=x", "--tokenizer=/no/ranks"), "/no/ranks"),
        (
            ("--input=/no/text", "--output=x", "--tokenizer=byte"),
            "--input = '/no/text' does not exist",
        ),
        (
            ("--input=stdlib", "--output=x", "--tokenizer=byte", "--max_bad_fraction=2"),
            "--max_bad_fraction=2",
        ),
        (
            ("--input=stdlib", "--output=x", "--tokenizer=byte", "--beam_options=--a"),
            "--beam_options acts with --runner only",
        ),
        (
            ("--input=stdlib", "--output=x", "--tokenizer=byte", "--runner=R", "--num_workers=2"),
            "--num_workers is of this machine's",
        ),
    ],
)
def test_command_lines_that_cannot_work(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        main("tokenize", *arguments)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
def test_data_command_names_the_documents_of_a_step(big_rows, whole, capsys):
    folder = big_rows.parent / "whole"
    arguments = ["data", "--config=configs/tiny.py", f"--config.data.source={folder}"]
    assert main(*arguments, "--step=1000000007", "--json") == 0
    described = json.loads(capsys.readouterr().out.splitlines()[-1])
    data = DataConfig(source=str(folder))
    order = loader.PackedRows(
        loader.open_corpus(data, TOKENIZER), data, loader.TrainConfig(batch_size=8, seq_len=256)
    )
    start = time.process_time()
    assert described == {"step": 1_000_000_007, **order.describe(1_000_000_006)}
    assert time.process_time() - start < 1  # any step is as near as the first
    assert described["rows"][0]["documents"][0]["name"].startswith("rows.jsonl:")
    assert main(*arguments, "--step=3") == 0
    text = capsys.readouterr().out
    assert (
        "\nstep 3, phase all, 100.00% of its positions hold tokens\nrow 0: text, epoch 0\n  "
        "rows.jsonl:" in text
    )
    assert "% full\n" in text
    with pytest.raises(ConfigError, match="needs --step=N or --verify, and not both"):
        main(*arguments)
    assert main(*arguments, "--verify") == 0
    assert capsys.readouterr().out == "every token shard is as its manifest says\n"
    copy = big_rows.parent / "copy"
    shutil.copytree(folder, copy)
    with open(copy / "00001-000.array_record", "r+b") as file:
        file.seek(100_000)
        file.write(b"flip")
    assert main(*arguments, f"--config.data.source={copy}", "--verify", "--json") == 1
    assert json.loads(capsys.readouterr().out) == {
        "damaged": [str(copy / "00001-000.array_record")]
    }


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
def test_the_recipe_of_the_docs_mixes_its_sources(tmp_path, monkeypatch, capsys):
    [recipe] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    (tmp_path / "recipe.py").write_text(recipe)
    for name in ("web", "code", "books"):
        (tmp_path / "shards" / name).mkdir(parents=True)
        for i in range(8):
            (tmp_path / "shards" / name / f"{i}.txt").write_text(f"{name} {i} " * 500)
    monkeypatch.chdir(tmp_path)
    sources = []
    for step in (1, 1000):
        assert main("data", "--config=recipe.py", f"--step={step}", "--json") == 0
        described = json.loads(capsys.readouterr().out)
        sources.append((described["phase"], {row["source"] for row in described["rows"]}))
    assert sources == [("main", {"web", "code", "books"}), ("anneal", {"code", "books"})]


@pytest.mark.filterwarnings("ignore")  # Beam's own
def test_beam_gives_the_shards_of_tokenize(big_rows, whole, tmp_path):
    pytest.importorskip(
        "apache_beam", reason="Apache Beam is not installed: pip install -e '.[beam]'"
    )
    from hunyuan_jax.data import beam

    job = Job(str(big_rows), str(tmp_path / "out"), "byte", shard_bytes=2**20)
    plan = tokenize.prepare(job)
    shards.run_unit(job, 2, plan.units[2])  # Beam continues what `tokenize` has begun
    left = (tmp_path / "out" / "00002-000.array_record").stat().st_mtime_ns
    manifest = beam.tokenize(job, "DirectRunner", ["--direct_num_workers=1"])
    assert manifest["num_documents"] == 3000
    assert contents(tmp_path / "out") == whole
    assert (tmp_path / "out" / "00002-000.array_record").stat().st_mtime_ns == left
    assert beam.tokenize(job, "DirectRunner", []) == manifest
    other = Job(str(big_rows), str(tmp_path / "other"), "byte")
    with pytest.raises(ConfigError, match="--runner=NoRunner .* is refused"):
        beam.tokenize(other, "NoRunner", [])
    with pytest.raises(
        ConfigError,
        match="with --beam_options='--directly=1' is refused: Beam has no option directly",
    ):
        beam.tokenize(other, "DirectRunner", ["--directly=1"])


def test_beam_that_is_not_installed_is_named(monkeypatch, tmp_path):
    from hunyuan_jax.data import beam

    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(
        ConfigError, match=r"--runner needs Apache Beam: pip install -e '\.\[beam\]'"
    ):
        beam.tokenize(Job(str(tmp_path), str(tmp_path / "out"), "byte"), "DirectRunner", [])
