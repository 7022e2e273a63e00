"""Text out of ids: stop strings across tokens, whole characters, any way of arriving."""

import itertools

import hypothesis
import pytest
from hypothesis import strategies

from hunyuan_jax.infer.detokenize import Detokenizer
from hunyuan_jax.tokenizer import ByteTokenizer, load_tokenizer
from support import paths

BYTES = ByteTokenizer()
WORDS = load_tokenizer(str(paths.GOLDEN / "hf" / "moe_top1"))  # has tokens of several letters
TEXTS = strategies.text("the€😀 \n", max_size=40)
STOPS = strategies.lists(strategies.text("the€😀", min_size=1, max_size=4), max_size=4)
CUTS = strategies.lists(strategies.integers(0, 200))


def pieces_of(ids, cuts):
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


def cut_by_hand(text, stops):
    """(text before the first stop string that is complete, the stop string or None)."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["bytes", "words"])
@hypothesis.given(TEXTS, STOPS, CUTS, strategies.booleans())
def test_the_text_ends_before_the_first_stop_string_however_it_arrives(
    tokenizer, text, stops, cuts, include
):
    detokenizer = Detokenizer(tokenizer, stops, include_stop=include)
    expected, stop = cut_by_hand(text, stops)
    if include and stop:
        expected += stop
    said = ""
    for ids in pieces_of(tokenizer.encode(text), cuts):
        said += detokenizer.push(ids)
        assert expected.startswith(said)  # nothing is taken back, no stop string leaks
    assert said + detokenizer.finish() == expected
    assert detokenizer.stopped_by == stop
    if stop:
        assert detokenizer.push(tokenizer.encode("more")) == "" == detokenizer.finish()


def test_what_cannot_begin_a_stop_string_comes_out_at_once():
    detokenizer = Detokenizer(BYTES, ["</answer>"])
    assert [detokenizer.push([byte]) for byte in b"a < b</an </answer"] == [
        *"a ", "", "< ", "b", "", "", "", "", "</an ", *[""] * 8,
    ]  # fmt: skip
    assert detokenizer.push(b">x") == ""
    assert detokenizer.stopped_by == "</answer>"


def test_half_a_character_waits_and_ends_as_a_replacement():
    detokenizer = Detokenizer(BYTES)
    data = "😀".encode()
    assert [detokenizer.push([byte]) for byte in data] == ["", "", "", "😀"]
    assert detokenizer.push(data[:2]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_stop_strings_are_looked_for_behind_min_tokens():
    detokenizer = Detokenizer(BYTES, ["ab"], min_tokens=3)
    assert detokenizer.push(BYTES.encode("abab")) == "abab"
    assert detokenizer.stopped_by is None
    detokenizer = Detokenizer(BYTES, ["ab"], min_tokens=2)
    assert detokenizer.push(BYTES.encode("abab")) == "ab"
    assert detokenizer.stopped_by == "ab"


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_left_out_unless_asked(skip):
    ids = WORDS.encode("a<|eos|>b", parse_special=True)
    detokenizer = Detokenizer(WORDS, skip_special=skip)
    assert detokenizer.push(ids) == ("ab" if skip else "a<|eos|>b")
