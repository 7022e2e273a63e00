"""RULER's samples: each can be solved by reading it, fits its length, and is drawn by its seed."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax.evals import ruler, words

LENGTH = 1500


def count(prompt, prefix):
    """A tokenizer of words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", prompt + prefix))


def solved(task, prompt):
    """What somebody finds who reads the prompt and knows the task."""
    if task == "vt":
        text, question = prompt.rsplit("Question: ", 1)
        text = text.rsplit("Memorize and track", 1)[1]
        value = re.search(r"the value (\d+) in", question)[1]
        known = {value}
        for name, _, other in re.findall(r"VAR (\w+) = (VAR )?(\w+)", text):
            if other in known:
                known.add(name)
        return known - {value}
    if task == "cwe":
        text = prompt.rsplit("Below is a numbered list", 1)[1]
        found = Counter(re.findall(r"\d+\. (\w+)", text.split("Question:")[0]))
        return {word for word, _ in found.most_common(10)}
    if task == "fwe":
        text = prompt.split("coded words. ", 1)[1].split("\nQuestion:")[0]
        found = Counter(word for word in text.split() if word != "...")
        return {word for word, _ in found.most_common(3)}
    asked = re.search(r" for (.*) mentioned in the provided text\?$", prompt)[1]
    found = re.findall(r"One of the special magic \w+ for ([\w-]+) is: ([\w-]+)\.", prompt)
    return {value for key, value in found if key in re.split(r", and |, ", asked)}


@pytest.mark.parametrize("task", ruler.TASKS)
def test_the_prompt_holds_the_answer(task):
    for index in range(3):
        made = ruler.sample(task, LENGTH, index, count)
        assert solved(task, made.prompt) == set(made.references)
        num = count(made.prompt, made.prefix) + made.num_new
        # The next larger haystack has at most a sentence or a needle more.
        assert LENGTH - 90 <= num <= LENGTH
        assert not made.prefix.endswith(" ") and made.num_new == ruler.TASKS[task]


def test_there_are_eleven_tasks_with_the_sizes_of_ruler():
    assert len(ruler.TASKS) == 11
    sizes = {task: (len(made.references), made.num_new) for task in ruler.TASKS
             for made in [ruler.sample(task, LENGTH, 0, count)]}  # fmt: skip
    assert sizes["niah_multivalue"] == sizes["niah_multiquery"] == (4, 128)
    assert sizes["niah_single_1"] == sizes["niah_multikey_3"] == (1, 128)
    assert (sizes["vt"], sizes["cwe"], sizes["fwe"]) == ((5, 30), (10, 120), (3, 50))


def test_templates_are_those_of_ruler():
    made = ruler.sample("niah_single_1", 400, 0, count)
    key = re.search(r"numbers for ([\w-]+) is", made.prompt)[1]
    assert made.prompt.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. I "
        f"will quiz you about the number afterwards.\n{words.NOISE}\n"
    )
    assert made.prompt.endswith(
        f"\nWhat is the special magic number for {key} mentioned in the provided text?"
    )
    assert made.prefix == f" The special magic number for {key} mentioned in the provided text is"
    made = ruler.sample("niah_multiquery", LENGTH, 0, count)
    assert made.prompt.startswith("Some special magic numbers are hidden within")
    assert re.search(r"numbers for [\w-]+, [\w-]+, [\w-]+, and [\w-]+ mentioned", made.prefix)
    made = ruler.sample("vt", LENGTH, 0, count)
    assert "5 variables are assgined the value" in made.prefix
    assert made.prompt.count("Memorize and track the chain(s)") == 2  # one is an example
    assert made.prompt.count("\nVAR") + made.prompt.count(" VAR") >= 10


def test_a_sample_depends_on_its_own_number_alone():
    one = ruler.sample("niah_multikey_1", LENGTH, 3, count, seed=1)
    assert one == ruler.sample("niah_multikey_1", LENGTH, 3, count, seed=1)
    others = [
        ruler.sample("niah_multikey_1", LENGTH, 4, count, seed=1),
        ruler.sample("niah_multikey_1", LENGTH, 3, count, seed=2),
        ruler.sample("niah_multikey_1", LENGTH + 300, 3, count, seed=1),
        ruler.sample("niah_multivalue", LENGTH, 3, count, seed=1),
    ]
    assert len({made.references for made in [one, *others]}) == 5


def test_needles_lie_at_their_depths():
    needles = ruler.Needles("essay")
    for depth in (0, 25, 50, 75, 100):
        made = ruler.needle_sample("needle", needles, 3000, 0, count, "name", (), depths=[depth])
        text = made.prompt.split("afterwards.\n")[1].split("\nWhat is")[0]
        place = 100 * text.index("One of the special") / len(text)
        assert abs(place - depth) < 5 and made.depth == depth


def test_an_essay_may_be_a_text_of_the_user():
    text = words.split_sentences("It rained.  Was it\nlate? Nobody knew!")
    assert text == ["It rained.", "Was it late?", "Nobody knew!"]
    made = ruler.sample("niah_single_2", 400, 0, count, text=text)
    assert "It rained. Was it late? Nobody knew! It rained." in made.prompt
    assert solved("niah_single_2", made.prompt) == set(made.references)


def test_a_length_that_is_too_short_says_what_is_needed():
    with pytest.raises(ValueError, match=r"cwe needs at least \d+ tokens; length 300 is too"):
        ruler.sample("cwe", 300, 0, count)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("they are 12, 34 and 56", 1.0),
        ("12 and 34", 2 / 3),
        ("", 0.0),
        ("none of them\x0012", 1 / 3),
    ],
)
def test_the_score_is_the_share_of_references(answer, expected):
    assert ruler.score(answer, ["12", "34", "56"]) == pytest.approx(expected)


def test_the_score_ignores_the_case_of_letters():
    assert ruler.score(" abc DEF", ["ABC", "def"]) == 1.0


@settings(max_examples=20)
@given(num=st.integers(1, 3000), seed=st.integers(0, 9))
def test_words_are_different(num, seed):
    import random

    drawn = words.many_words(num, random.Random(seed))
    assert len(set(drawn)) == num and all(word.isalpha() for word in drawn)
