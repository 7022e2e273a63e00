"""Sources of documents of some length: whole documents, of text and of shards, drawn by weight."""

import collections
import os

import pytest

from hunyuan_jax.config import DataConfig, PhaseConfig, SourceConfig, TrainConfig
from hunyuan_jax.data import loader, shards, tokenize, tokens
from hunyuan_jax.data.shards import Job
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.tokenizer import load_tokenizer

LONG, SHORT = ["x" * 90, "y" * 50], ["a" * 9, "b" * 20, "c" * 28, "d" * 4]


@pytest.fixture(params=["text", "shards"])
def folder(request, tmp_path, monkeypatch):
    """Six documents, as text or as shards of few pieces of 7 pairs."""
    (tmp_path / "text").mkdir()
    for index, text in enumerate(LONG + SHORT):
        (tmp_path / "text" / f"{index}.txt").write_text(text)
    if request.param == "text":
        return tmp_path / "text"
    monkeypatch.setattr(tokens, "PIECE_PAIRS", 7)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    job = Job(str(tmp_path / "text"), str(tmp_path / "shards"), "byte", shard_bytes=80)
    plan = tokenize.prepare(job)
    for number, unit in enumerate(plan.units):
        shards.run_unit(job, number, unit)
    shards.finish(job, len(plan.units), plan.settings)
    return tmp_path / "shards"


def stream(*sources, weights=(1.0, 3.0)):
    data = DataConfig(
        sources=sources,
        phases=(PhaseConfig("all", weights[: len(sources)]),),
        validation_fraction=0.0,
    )
    corpus = loader.open_corpus(data, load_tokenizer("byte"))
    return loader.PackedRows(corpus, data, TrainConfig(batch_size=4, seq_len=16))


def test_documents_are_drawn_by_their_length(folder):
    # A document of n letters has n + 2 tokens.
    long = SourceConfig("long", str(folder), min_tokens=52)
    short = SourceConfig("short", str(folder), max_tokens=51)
    rows = stream(long, short)
    kept = {"long": set(), "short": set()}
    counts = collections.Counter()
    for step in range(100):
        for row in rows.describe(step)["rows"]:
            counts[row["source"]] += 1
            kept[row["source"]] |= {part["name"] for part in row["documents"]}
    assert {name: len(found) for name, found in kept.items()} == {"long": 2, "short": 4}
    assert counts["long"] == pytest.approx(100, abs=3)
    assert "2 documents of 52 tokens and more, of " in str(rows)
    assert "4 documents of 0 to 51 tokens, of " in str(rows)


def test_only_documents_within_both_limits_are_read(folder):
    rows = stream(SourceConfig("some", str(folder), min_tokens=22, max_tokens=52))
    ids = {int(i) for step in range(8) for i in rows.batch(step)["tokens"].reshape(-1)}
    letters = {chr(i) for i in ids if i < 128}
    assert letters == set("ybc")


def test_other_limits_are_other_text(folder):
    a, b = (
        stream(SourceConfig("some", str(folder), min_tokens=least)).identity()
        for least in (10, 11)
    )
    assert a != b


def test_a_length_that_no_document_has_is_refused(folder):
    message = (
        r"config\.data\.sources\['some'\] = .* has no document of 1000 tokens and more; its "
        r"documents have 6 to 92\. Change min_tokens or max_tokens"
    )
    with pytest.raises(ConfigError, match=message):
        stream(SourceConfig("some", str(folder), min_tokens=1000))
