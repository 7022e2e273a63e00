"""Reasoning and answer, as thinking models write them."""

import itertools

import hypothesis
import pytest
from hypothesis import strategies

from hunyuan_jax.serve.reasoning import ReasoningSplitter, tags_of

CASES = {
    "<think>\nwhy\n</think>\n<answer>\nbecause\n</answer>": ("why", "because"),
    "<think>a</think><answer>b</answer>": ("a", "b"),
    "<think>\n\n</think>\n<answer>\nb\n\nc\n</answer>\n": ("", "b\n\nc"),
    "\n<think> a b </think>\n\nplain answer ": ("a b", "plain answer "),
    "<answer>only</answer>": ("", "only"),
    "no tags, x < y <b>": ("", "no tags, x < y <b>"),
    "says <think> later </think>": ("", "says <think> later </think>"),
    "<thinner> than": ("", "<thinner> than"),
    "<think>never ends </thin": ("never ends </thin", ""),
    "<think>a</think><answer>cut </ans": ("a", "cut </ans"),
    "<think>a</think>  ": ("a", ""),
    "<thi": ("", "<thi"),
    "": ("", ""),
    "  indented": ("", "  indented"),
    "<answer>a</answer> and more": ("", "a and more"),
}


def split(text, cuts, **options):
    splitter = ReasoningSplitter(**options)
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    said = [*map(splitter.push, pieces), splitter.finish()]
    return "".join(s.reasoning for s in said), "".join(s.content for s in said)


@pytest.mark.parametrize("text", CASES)
@hypothesis.given(cuts=strategies.lists(strategies.integers(0, 60)))
@hypothesis.settings(max_examples=30)
def test_the_parts_are_the_same_however_the_text_arrives(text, cuts):
    assert split(text, cuts) == CASES[text]
    assert split(text, range(len(text))) == CASES[text]


@pytest.mark.parametrize("suffix", ["", ":opensource"])
def test_tags_are_spelled_as_in_the_template(suffix):
    tags = tags_of(f"{{{{ '<think{suffix}>' }}}}")
    text = f"<think{suffix}>why</think{suffix}>because </think:other>"
    assert split(text, range(40), tags=tags) == ("why", "because </think:other>")
    assert tags_of("no tags") == tags_of("<think>")


def test_a_prompt_that_ends_with_think_starts_inside():
    text = "so</think>\n<answer>it is</answer>"
    assert split(text, range(40), starts_inside=True) == ("so", "it is")


@hypothesis.given(
    strategies.text("ab <>/thinkanswer\n", max_size=60),
    strategies.lists(strategies.integers(0, 80)),
)
def test_any_text_is_split_the_same_in_pieces_and_whole(text, cuts):
    assert split(text, cuts) == split(text, ())


def test_an_answer_flows():
    """It is not held back until its tag ends."""
    splitter = ReasoningSplitter()
    said = [splitter.push(piece) for piece in ("<think>", "one ", "two", "</think>", "3 ", "4")]
    assert [s.reasoning for s in said] == ["", "one", " two", "", "", ""]
    assert [s.content for s in said] == ["", "", "", "", "3 ", "4"]
