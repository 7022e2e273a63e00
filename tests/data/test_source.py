"""Documents of text files: every kind and compression, a fixed order, spans of big files, and bad
rows counted with their place.
"""

import dataclasses
import glob
import gzip
import itertools
import json
import os
import random
import tempfile
from pathlib import Path

import fsspec
import hypothesis.strategies as st
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile
from hypothesis import given, settings

from hunyuan_jax.data import source
from hunyuan_jax.errors import ConfigError
from support import paths

pyarrow = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
parquet = pytest.importorskip("pyarrow.parquet")

few_examples = settings(max_examples=30, derandomize=True)
KINDS = ".txt, .py, .md, .jsonl (plain, .gz, .zst), .parquet, .array_record"


def read_all(path, text_field="text"):
    """[(name, text)] and [(where, reason)] of a source."""
    documents, bad = [], []
    for span in source.find_files(str(path), "data.source"):
        for item in source.read(span, text_field):
            if isinstance(item, source.Bad):
                bad.append((item.where, item.reason))
            else:
                documents.append((item.name, "".join(item.parts)))
    return documents, bad


def texts(path, **options):
    return dict(read_all(path, **options)[0])


def write_records(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


# --- finding ---


def test_stdlib_is_the_sorted_sources_without_tests_and_build_files():
    names = [span.name for span in source.find_files("stdlib", "data.source")]
    assert names == sorted(names)
    assert len(names) > 300
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not [
        name
        for name in names
        if not name.endswith(".py") or "config-" in name or "_sysconfigdata" in name
    ]


def test_folder_is_read_recursively_and_in_order(tmp_path):
    for name in (
        "b.md",
        "a/z.txt",
        "a/y.PY",
        "c.csv",
        "d.csv.gz",
        "e.parquet.gz",
        ".git/x.txt",
        "a/.hidden.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "d.jsonl").write_text('{"text": "first"}\n{"text": "second"}')
    expected = {
        "a/y.PY": "a/y.PY",
        "a/z.txt": "a/z.txt",
        "b.md": "b.md",
        "d.jsonl:1": "first",
        "d.jsonl:2": "second",
    }
    assert read_all(tmp_path) == (list(expected.items()), [])


def test_file_and_glob_give_names_that_other_files_do_not_change(tmp_path, monkeypatch):
    (tmp_path / "one" / "deep").mkdir(parents=True)
    (tmp_path / "one" / "deep" / "a.txt").write_text("a")
    assert list(texts(tmp_path / "one" / "deep" / "a.txt")) == ["a.txt"]
    assert list(texts(tmp_path / "*" / "**" / "*.txt")) == ["one/deep/a.txt"]
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "b.txt").write_text("b")
    (tmp_path / "two" / "b.csv").write_text("b")
    assert list(texts(tmp_path / "*" / "**" / "*")) == ["one/deep/a.txt", "two/b.txt"]
    monkeypatch.chdir(tmp_path / "two")
    assert list(texts("*.txt")) == ["b.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(texts("~/two")) == ["b.txt"]


def test_links_are_followed_once(tmp_path):
    """By folder and by glob; loops of links end, and links to what is read anyway add nothing."""
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus / "a/b", elsewhere / "deep"):
        folder.mkdir(parents=True)
    (corpus / "a/one.txt").write_text("one")
    (corpus / "a/b/two.txt").write_text("two")
    (elsewhere / "deep/three.txt").write_text("three")
    (elsewhere / "four.txt").write_text("four")
    (tmp_path / "five.txt").write_text("five")
    (corpus / "a/back").symlink_to(corpus)  # a loop
    (corpus / "a/b/self").symlink_to(".")
    (corpus / "linked").symlink_to(elsewhere)
    (elsewhere / "deep/up").symlink_to(elsewhere)
    (elsewhere / "deep/around").symlink_to(corpus)  # a loop over two links
    (corpus / "again").symlink_to(corpus / "a/b")  # a second path
    (corpus / "a/one-again.txt").symlink_to("one.txt")
    (corpus / "z.txt").symlink_to(tmp_path / "five.txt")
    (corpus / "a/.hidden").symlink_to(elsewhere)
    expected = {
        "a/b/two.txt": "two",
        "a/one.txt": "one",
        "linked/deep/three.txt": "three",
        "linked/four.txt": "four",
        "z.txt": "five",
    }
    for where in ("", "**", "**/*.txt", "**/*"):
        assert texts(corpus / where) == expected, where
    assert texts(corpus / "l*d/**/*.txt") == {
        "linked/deep/three.txt": "three",
        "linked/four.txt": "four",
    }
    assert list(texts(corpus / "linked")) == [
        "deep/around/a/one.txt",
        "deep/around/again/two.txt",
        "deep/around/z.txt",
        "deep/three.txt",
        "four.txt",
    ]
    (tmp_path / "link").symlink_to(corpus)
    assert texts(tmp_path / "link") == texts(f"{tmp_path}/link/") == expected
    os.mkfifo(corpus / "pipe.txt")  # would be waited for
    (corpus / "gone.txt").symlink_to(tmp_path / "absent")
    for where in ("", "**", "**/*"):
        found, bad = read_all(corpus / where)
        assert dict(found) == expected, where
        assert [name for name, _ in bad] == ["gone.txt"]


@pytest.mark.parametrize(
    "pattern",
    ["*", "**", "**/*.txt", "*/**/*", "**/b/*", "a/**/b/**", ".*/**", "**/.h/*", "[ab]/**/?.txt"],
)
def test_a_glob_without_links_is_that_of_python(tmp_path, monkeypatch, pattern):
    for name in ("x.txt", "a/x.txt", "a/b/x.txt", "b/a/b/yy.txt", ".h/x.txt", "a/.h/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    matches = glob.glob(pattern, root_dir=tmp_path, recursive=True)
    expected = sorted(name for name in matches if (tmp_path / name).is_file())
    root = {"a/**/b/**": "a/"}.get(pattern, "")
    assert [root + name for name in texts(tmp_path / pattern)] == expected
    monkeypatch.chdir(tmp_path)
    assert [root + name for name in texts(pattern)] == expected


def test_urls_are_read_through_fsspec():
    files = fsspec.filesystem("memory")
    try:
        files.pipe(
            {
                "/corpus/a.txt": b"first",
                "/corpus/sub/b.jsonl.gz": gzip.compress(b'{"text": "second"}'),
                "/corpus/.c.txt": b"hidden",
            }
        )
        expected = {"a.txt": "first", "sub/b.jsonl.gz:1": "second"}
        assert texts("memory://corpus") == expected
        assert texts("memory://corpus/**/*.gz") == {"sub/b.jsonl.gz:1": "second"}
        assert texts("memory://corpus/a.txt") == {"a.txt": "first"}
        assert source.size_of("memory://corpus/a.txt") == 5
        [gone] = source.find_files("memory://corpus/a.txt", "data.source")
        files.rm(
            "/corpus/a.txt"
        )  # as a failing network: not a bad row, which would be the end of the matter
        with pytest.raises(ConfigError, match=r"memory:///?corpus/a.txt cannot be read"):
            list(source.read(gone, "text"))
        with pytest.raises(ConfigError, match="does not exist"):
            source.find_files("memory://nothing", "data.source")
        with pytest.raises(
            ConfigError,
            match="data.source = 'nowhere://corpus' cannot be used: Protocol not known: nowhere",
        ):
            source.find_files("nowhere://corpus", "data.source")
    finally:
        files.rm("/corpus", recursive=True)


class RangedFile(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        return Path(self.path).read_bytes()[start:end]


class RangedFileSystem(LocalFileSystem):
    """Reads files in ranges of bytes, as those of gs:// are; their readline has no limit."""

    protocol = "ranged"

    def _open(self, path, mode="rb", **kwargs):
        return RangedFile(self, path, mode)

    def unstrip_protocol(self, name):
        return f"ranged://{name}"


def test_rows_of_a_file_that_is_read_in_ranges(tmp_path):
    fsspec.register_implementation("ranged", RangedFileSystem, clobber=True)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(1000)))
    assert texts(f"ranged://{tmp_path}/a.jsonl") == texts(tmp_path / "a.jsonl")
    [span] = source.find_files(f"ranged://{tmp_path}", "data.source")
    part = dataclasses.replace(span, start=1700, stop=1734, first_row=101)
    assert [document.name for document in source.read(part, "text")] == [
        "a.jsonl:101",
        "a.jsonl:102",
    ]


def test_a_file_name_that_is_not_utf8_has_a_printable_name(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("a")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    assert list(texts(tmp_path)) == ["caf\\xe9.txt"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", ["missing", "does not exist", "Correct the path"]),
        ("missing/*.txt", ["does not exist"]),
        ("", ["does not exist"]),  # not the current folder
        ("table.csv", ["table.csv", f"holds no {KINDS} file"]),
        ("nothing", ["nothing", f"holds no {KINDS} file"]),
    ],
)
def test_unusable_source_is_one_line_with_the_remedy(tmp_path, name, words):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "table.csv").write_text("a")
    with pytest.raises(ConfigError) as error:
        source.find_files(str(tmp_path / name) if name else "", "data.source")
    message = str(error.value)
    assert message.startswith("data.source = ")
    assert "\n" not in message
    assert all(word in message for word in words)


# --- reading ---


def test_text_is_kept_as_it_is_but_for_the_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffline\r\n\u2028é\0 ".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "\\ufeff\\ud83d\\ude00 \\ud83d"}'.encode())
    assert list(texts(tmp_path).values()) == ["line\r\n\u2028é\0 ", "😀 \ufffd"]


def test_every_kind_and_compression_gives_the_same_documents(tmp_path):
    rows = ["one", "zwei\nlines", "三"]
    lines = "\n".join(json.dumps({"text": row, "id": 1}) for row in rows).encode()
    two_frames = zstandard.compress(lines[:20]) + zstandard.compress(lines[20:])
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.JSONL.ZST").write_bytes(two_frames)
    parquet.write_table(
        pyarrow.table({"id": [1, 2, 3], "text": rows}), tmp_path / "d.parquet", row_group_size=2
    )
    write_records(tmp_path / "e.array_record", [row.encode() for row in rows])
    found = texts(tmp_path)
    for name in ("a.jsonl", "b.jsonl.gz", "c.JSONL.ZST", "d.parquet", "e.array_record"):
        assert [found.pop(f"{name}:{row}") for row in (1, 2, 3)] == rows
    assert not found
    (tmp_path / "f.txt.zst").write_bytes(zstandard.compress(b"text"))
    (tmp_path / "g.md.gz").write_bytes(gzip.compress(b"text"))
    assert texts(tmp_path / "[fg]*") == {"f.txt.zst": "text", "g.md.gz": "text"}


def test_text_field_chooses_field_and_column(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "body": "b"}')
    parquet.write_table(pyarrow.table({"text": ["a"], "body": ["b"]}), tmp_path / "table.parquet")
    assert list(texts(tmp_path, text_field="body").values()) == ["b", "b"]


def test_a_column_of_text_may_be_stored_in_any_way(tmp_path):
    rows = ["first", None, "thïrd", "first"]
    kinds = {
        "a": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "b": pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
        "c": pyarrow.binary(),
        "d": pyarrow.large_string(),
    }
    for name, kind in kinds.items():
        table = pyarrow.table({"text": pyarrow.array(rows).cast(kind)})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    empty = pyarrow.table({"text": pyarrow.array([None, None])})
    parquet.write_table(empty, tmp_path / "e.parquet")
    documents, bad = read_all(tmp_path)
    assert documents == [
        (f"{name}.parquet:{row}", rows[row - 1]) for name in kinds for row in (1, 3, 4)
    ]
    places = [*((name, 2) for name in kinds), ("e", 1), ("e", 2)]
    assert bad == [(f"{name}.parquet:{row}", "empty") for name, row in places]


BAD_ROWS = [
    (b'{"text": ', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at 13)"),
    (b'["text"]', "a list, not an object"),
    (b'{"body": "b"}', "no field 'text', it has ['body']"),
    (b'{"text": 7}', "field 'text' is a int, not a string"),
    (b'{"text": ""}', "empty"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_bad_rows_are_reported_with_their_number(tmp_path, row, reason):
    (tmp_path / "rows.jsonl").write_bytes(
        b'{"text": "one"}\n\n' + row + b'\n{"text": "four"}\nnull\n'
    )
    documents, bad = read_all(tmp_path)
    assert documents == [("rows.jsonl:1", "one"), ("rows.jsonl:4", "four")]
    assert [where for where, _ in bad] == ["rows.jsonl:3", "rows.jsonl:5"]
    assert bad[0][1].startswith(reason)


def test_a_row_too_long_for_memory_is_bad_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MAX_ROW_BYTES", 32)
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "one"}\n{"text": "' + "x" * 100 + '"}\n{"text": "three"}\n'
    )
    documents, bad = read_all(tmp_path)
    assert [name for name, _ in documents] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert bad == [("rows.jsonl:2", "longer than 32 bytes")]


def test_unusable_files_are_reported(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "no.jsonl.gz").write_bytes(b"no archive")
    (tmp_path / "no.jsonl.zst").write_bytes(b"no archive")
    (tmp_path / "no.parquet").write_bytes(b"no table")
    (tmp_path / "no.array_record").write_bytes(b"no records")
    parquet.write_table(pyarrow.table({"body": ["b"]}), tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "number.parquet")
    parquet.write_table(pyarrow.table({"text": ["good", None, ""]}), tmp_path / "rows.parquet")
    write_records(tmp_path / "rows.array_record", [b"good", b"\xff", b""])
    documents, bad = read_all(tmp_path)
    assert [name for name, _ in documents] == ["good.txt", "rows.array_record:1", "rows.parquet:1"]
    reasons = dict(bad)
    assert len(reasons) == len(bad)
    expected = {
        "latin.txt": "not UTF-8 (byte 0xe9 at 3)",
        "empty.txt": "empty",
        "gone.txt": "cannot be read (No such file or directory)",
        "no.jsonl.gz:1": "damaged archive (Not a gzipped file",
        "no.jsonl.zst:1": "damaged archive (",
        "no.parquet:1": "damaged file (",
        "no.array_record:1": "damaged file (",
        "other.parquet": "no column 'text', it has ['body']",
        "number.parquet": "column 'text' is int64, not string",
        "rows.parquet:2": "empty",
        "rows.parquet:3": "empty",
        "rows.array_record:2": "not UTF-8 (byte 0xff at 0)",
        "rows.array_record:3": "empty",
    }
    assert reasons.keys() == expected.keys()
    for where, reason in expected.items():
        assert reasons[where].startswith(reason), (where, reasons[where])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_archive_gives_what_it_holds_and_one_bad_row(tmp_path, suffix):
    rng = random.Random(0)
    rows = [
        json.dumps({"text": "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=2000))})
        for _ in range(400)
    ]
    compress = gzip.compress if suffix == ".gz" else zstandard.compress
    data = compress("\n".join(rows).encode())
    (tmp_path / f"rows.jsonl{suffix}").write_bytes(data[: len(data) // 2])
    documents, bad = read_all(tmp_path)
    assert 50 < len(documents) < 350
    assert [json.dumps({"text": text}) for _, text in documents] == rows[: len(documents)]
    assert bad == [(f"rows.jsonl{suffix}:{len(documents) + 1}", "truncated archive")]
    (tmp_path / f"text.txt{suffix}").write_bytes(data[:-3])
    assert read_all(tmp_path / f"text.txt{suffix}") == (
        [],
        [(f"text.txt{suffix}", "truncated archive")],
    )


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_truncated_tables_are_bad_rows(tmp_path, keep):
    rows = [f"text {i} " * 200 for i in range(300)]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    write_records(tmp_path / "b.array_record", [row.encode() for row in rows])
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data))])
    documents, bad = read_all(tmp_path)
    assert {where.split(":")[0] for where, _ in bad} == {"a.parquet", "b.array_record"}
    assert all(reason.startswith("damaged file") for _, reason in bad)
    assert [text for _, text in documents] == rows[: len(documents)]


@few_examples
@given(
    st.lists(
        st.sampled_from(["", " ", "bad", '{"text": "good"}', '{"text": "' + "long" * 9 + '"}']),
        max_size=12,
    ),
    st.integers(1, 60),
)
def test_spans_of_a_file_give_its_rows_with_their_numbers(lines, step):
    """Cut anywhere: each row belongs to the span in which it begins."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.jsonl")
        data = "\n".join(lines).encode()
        with open(path, "wb") as file:
            file.write(data)
        whole = [
            (getattr(item, "name", None) or item.where)
            for item in source.read(source.Span("rows.jsonl", path), "text")
        ]
        parts = []
        for start in range(0, len(data), step):
            first_row = 1 if start == 0 else 2 + data[: start - 1].count(b"\n")
            span = source.Span("rows.jsonl", path, start, min(start + step, len(data)), first_row)
            parts += [
                (getattr(item, "name", None) or item.where) for item in source.read(span, "text")
            ]
        assert parts == whole


# --- parts ---


@pytest.fixture(scope="module")
def real():
    from hunyuan_jax.tokenizer import HyTokenizer

    ranks = paths.SHARED / "data/hy.tiktoken"
    if not ranks.is_file():
        pytest.skip(
            "the released ranks file is not beside the checkout (../shared/data/hy.tiktoken)"
        )
    return HyTokenizer(ranks)


@few_examples
@given(
    st.lists(
        st.sampled_from(
            ["a", "bc", " ", "\n", "\r\n", "!", "\u0301", "e", "7", "中", "\x1c", "'s"]
        ),
        max_size=60,
    ).map("".join)
)
def test_parts_have_the_tokens_of_the_text(real, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "PART_CHARS", 7)
        parts = source.cut(text)
    assert "".join(parts) == text
    assert all(0 < len(part) <= 7 for part in parts) or parts == [""]
    # Where a part has no line break to be cut behind, tokens may differ; skip those.
    if all(
        part.endswith("\n") and not after[:1].isspace()
        for part, after in itertools.pairwise(parts)
    ):
        assert [token for part in parts for token in real.encode(part)] == real.encode(text)


def test_a_long_text_file_arrives_in_parts_and_is_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "PART_CHARS", 100)
    monkeypatch.setattr(source, "_TEXT_AT_ONCE", 1000)
    text = "\ufeff" + "".join(f"line {i} é中\n" for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    [span] = source.find_files(str(tmp_path / "a.txt"), "data.source")
    [document] = source.read(span, "text")
    parts = list(document.parts)
    assert "".join(parts) == text[1:]
    assert max(map(len, parts)) <= 100
    (tmp_path / "b.txt").write_bytes(text.encode() + b"\xe9")
    assert read_all(tmp_path / "b.txt") == ([], [("b.txt", "not UTF-8 (unexpected end of data)")])
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(text.encode())[:-20])
    assert read_all(tmp_path / "c.txt.gz") == ([], [("c.txt.gz", "truncated archive")])


# --- counting ---


def tally_of(path, max_bad_fraction):
    tally = source.Tally(max_bad_fraction, "data.max_bad_fraction")
    for span in source.find_files(str(path), "data.source"):
        for item in source.read(span, "text"):
            if isinstance(item, source.Bad):
                tally.add_bad(span.name, item)
            else:
                tally.add_document(span.name, sum(len(part.encode()) for part in item.parts))
    return tally


def test_bad_rows_are_counted_by_file_and_above_the_limit_they_stop(tmp_path):
    good = '{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_text(good * 5 + "bad\n")
    (tmp_path / "b.jsonl").write_text("bad\n" * 9 + good)
    tally = tally_of(tmp_path, 0.01)  # 10 bad of 16: no more than 1 % of 1000
    assert (tally.total.num_documents, tally.total.num_bad, tally.total.num_bytes) == (6, 10, 24)
    assert tally.files["b.jsonl"] == source.FileCounts(
        1, 4, 9, "b.jsonl:1: not JSON (Expecting value: line 1 column 1 (char 0))"
    )
    (tmp_path / "c.jsonl").write_text(good + "\nbad\n")
    with pytest.raises(
        ConfigError,
        match=r"11 of 18 rows cannot be used, the last is c.jsonl:3: not JSON "
        r".*data.max_bad_fraction = 0.01",
    ):
        tally_of(tmp_path, 0.01)
    with pytest.raises(ConfigError, match=r"1 of 6 rows.*a.jsonl:6"):
        tally_of(tmp_path, 0.0)
    assert tally_of(tmp_path, 0.02).total.num_bad == 11
    (tmp_path / "a.jsonl").write_text(good * 2000 + "bad\n" * 9)
    assert tally_of(tmp_path, 0.01).total.num_bad == 19  # of 2021


def test_report_is_short_and_complete():
    tally = source.Tally(1.0, "")
    for index in range(7):
        tally.add_file(
            f"{index}.jsonl", source.FileCounts(2, 500_000, index + 1, f"{index}.jsonl:3: empty")
        )
    lines = str(tally).splitlines()
    assert lines[0] == "14 documents, 3.5 MB; 28 bad row(s) skipped in 7 file(s)"
    assert lines[1] == "  0.jsonl: 1 skipped, first: 0.jsonl:3: empty"
    assert lines[-1] == "  and 2 more file(s)"
