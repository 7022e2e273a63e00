"""RULER's synthetic long-context tasks, made here: 11 of its 13, without the two of questions and
answers, whose texts would have to be downloaded.

Templates, sizes and scoring are those of https://github.com/NVIDIA/RULER
(scripts/data/synthetic, scripts/synthetic.yaml), mistakes in spelling included; the beginning of
an answer has no blank at its end, as in lm-eval's port.  Words and haystacks are our own or a text
file of the user.  A sample depends on (seed, task, length, its index) alone.
"""

import dataclasses
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence

from hunyuan_jax.evals import words

# Depths in percent at which RULER puts needles.
DEPTHS = tuple(round(100 * i / 39) for i in range(40))
# Of the words and the zeta distribution of frequent words, as in RULER.
_CODED_LENGTH = 6
_ZETA_OF_2 = math.pi**2 / 6

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_NEEDLE_TEXT = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} "
    "for {query} mentioned in the provided text?"
)
_NEEDLE_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
_TRACKING_TEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
    "above."
)
_TRACKING_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {num} variables "
    "are assgined the value {query}, they are:"
)
_COMMON_TEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list?"
)
_COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_FREQUENT_TEXT = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. "
    "Please ignore the dots '....'. What are the three most frequently appeared words in the "
    "above coded text?"
)
_FREQUENT_PREFIX = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)

# (text, beginning of the answer, references) of a sample with a haystack of some size.
Draft = tuple[str, str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question about a long text.

    prompt: the text with its question; prefix: how the answer begins; references: texts that a
    right answer holds; length: tokens of prompt, prefix and answer that it was made for; num_new:
    of them, those of the answer; depth: of the needle that is asked for first, in percent.
    """

    task: str
    length: int
    index: int
    prompt: str
    prefix: str
    references: tuple[str, ...]
    num_new: int
    depth: float | None = None


@dataclasses.dataclass(frozen=True)
class Needles:
    """What is hidden in which haystack.

    haystack: "noise", "essay" or "needle", other needles; key, value: "words", "numbers" or
    "uuids"; num_keys, num_values: keys, and values of each; num_queries: keys that are asked for.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


NEEDLE_TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuids"),
    "niah_multikey_1": Needles("essay", num_keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essay", num_values=4),
    "niah_multiquery": Needles("essay", num_keys=4, num_queries=4),
}
# Task -> tokens of its answer.
TASKS = dict.fromkeys(NEEDLE_TASKS, 128) | {"vt": 30, "cwe": 120, "fwe": 50}


def sample(
    task: str,
    length: int,
    index: int,
    count: Callable[[str, str], int],
    *,
    seed: int = 0,
    text: Sequence[str] = (),
) -> Sample:
    """Makes a sample whose prompt is as long as fits.

    Args:
      task: of TASKS.
      length: tokens of prompt, prefix and answer together.
      index: number of the sample.
      count: tokens of a prompt and the beginning of its answer.
      seed: of the run.
      text: sentences of an essay haystack; empty takes made-up ones.

    Raises:
      ValueError: a length that not even the smallest haystack fits into.
    """
    name = f"{seed}/{task}/{length}/{index}"
    if task in NEEDLE_TASKS:
        return needle_sample(task, NEEDLE_TASKS[task], length, index, count, name, text)

    def draft(size: int) -> Draft:
        rng = random.Random(name)
        if task == "vt":
            return _tracking(size, rng)
        if task == "cwe":
            return _common(size, length, rng)
        return _frequent(size, length, rng)

    prompt, prefix, references = _fitted(draft, count, length, TASKS[task], task)
    return Sample(task, length, index, prompt, prefix, references, TASKS[task])


def needle_sample(
    task: str,
    needles: Needles,
    length: int,
    index: int,
    count: Callable[[str, str], int],
    name: str,
    text: Sequence[str] = (),
    depths: Sequence[float] | None = None,
) -> Sample:
    """As `sample`, of hidden needles.

    Args:
      name: what the draws depend on.
      depths: in percent, for each needle; None draws them.
    """
    found: list[float] = []

    def draft(size: int) -> Draft:
        *made, depth = _hidden(needles, size, random.Random(name), text, depths)
        found[:] = [depth]
        return tuple(made)

    num_new = TASKS["niah_single_1"]
    prompt, prefix, references = _fitted(draft, count, length, num_new, task)
    return Sample(task, length, index, prompt, prefix, references, num_new, found[0])


def score(answer: str, references: Sequence[str]) -> float:
    """Share of the references that the answer holds, in any case of letters: RULER's
    string_match_all of one sample, 0 to 1.
    """
    cleaned = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()
    return sum(reference.lower() in cleaned for reference in references) / len(references)


def _fitted(
    draft: Callable[[int], Draft],
    count: Callable[[str, str], int],
    length: int,
    num_new: int,
    task: str,
) -> Draft:
    """The draft with the largest haystack that fits, by doubling and halving."""

    def num_tokens(size: int) -> int:
        prompt, prefix, _ = draft(size)
        return count(prompt, prefix) + num_new

    size, step = 0, 1
    if num_tokens(0) > length:
        raise ValueError(
            f"{task} needs at least {num_tokens(0)} tokens; length {length} is too short."
        )
    while num_tokens(size + step) <= length:
        size, step = size + step, 2 * step
    while step > 1:
        step //= 2
        if num_tokens(size + step) <= length:
            size += step
    return draft(size)


def _drawn(kind: str, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(words.ADJECTIVES)}-{rng.choice(words.NOUNS)}"


def _distinct(kind: str, num: int, rng: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < num:
        found[_drawn(kind, rng)] = None
    return list(found)


def _hidden(
    needles: Needles,
    size: int,
    rng: random.Random,
    text: Sequence[str],
    depths: Sequence[float] | None,
) -> tuple[str, str, tuple[str, ...], float]:
    """A draft, and the depth of the first needle that is asked for."""
    keys = _distinct(needles.key, needles.num_keys, rng)
    values = {key: _distinct(needles.value, needles.num_values, rng) for key in keys}
    pairs = [(key, value) for key in keys for value in values[key]]
    asked = rng.sample(keys, needles.num_queries)
    if depths is None:
        rng.shuffle(pairs)
        depths = sorted(rng.sample(DEPTHS, len(pairs)))
    straws = _haystack(needles, size, random.Random(rng.random()), keys, text)
    places = [int(len(straws) * depth / 100) for depth in depths]
    for place, (key, value) in sorted(
        zip(places, pairs, strict=True), key=lambda item: item[0], reverse=True
    ):
        straws.insert(place, _NEEDLE.format(kind=needles.value, key=key, value=value))
    first = depths[next(i for i, (key, _) in enumerate(pairs) if key == asked[0])]
    context = (" " if needles.haystack == "essay" else "\n").join(straws)
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    body, prefix, kind = _NEEDLE_TEXT, _NEEDLE_PREFIX, needles.value
    if needles.num_queries * needles.num_values == 1:
        body, prefix = _singular(body), _singular(prefix)
        kind = kind[:-1]
    shown = {"kind": kind, "query": query}
    references = tuple(value for key in asked for value in values[key])
    return body.format(context=context, **shown), prefix.format(**shown), references, first


def _singular(template: str) -> str:
    """As RULER turns its templates into the singular."""
    return template.replace("Some", "A").replace("are all", "is").replace("are", "is")


def _haystack(
    needles: Needles, size: int, rng: random.Random, keys: Sequence[str], text: Sequence[str]
) -> list[str]:
    if needles.haystack == "noise":
        return [words.NOISE] * size
    if needles.haystack == "needle":
        straws = []
        while len(straws) < size:
            key = _drawn(needles.key, rng)
            if key not in keys:  # or there would be two right answers
                value = _drawn(needles.value, rng)
                straws.append(_NEEDLE.format(kind=needles.value, key=key, value=value))
        return straws
    if text:
        return [text[i % len(text)] for i in range(size)]
    made = words.sentences(rng)
    return [next(made) for _ in range(size)]


def _tracking(size: int, rng: random.Random) -> Draft:
    """Variable tracking: one chain of four hops, after an example that is solved."""
    prompt, prefix, names = _chain(size, rng, 5)
    example, example_prefix, example_names = _chain(10, rng, 3)
    solved = f"{example}{example_prefix} {' '.join(example_names)}\n\n\n\n"
    return solved + prompt, prefix, names


def _chain(size: int, rng: random.Random, num_letters: int, num_hops: int = 4) -> Draft:
    names: list[str] = []
    while len(names) <= num_hops:
        name = "".join(rng.choices(string.ascii_uppercase, k=num_letters))
        names += [name] * (name not in names)
    value = rng.randint(10000, 99998)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(num_hops)]
    straws = [words.NOISE + "\n"] * size
    if size <= len(chain):
        straws = [f"{part.strip()}." for part in words.NOISE.split(".") if part] * (size + 1)
    places = sorted(rng.sample(range(len(straws)), len(chain)))
    for offset, (place, link) in enumerate(zip(places, chain, strict=True)):
        straws.insert(place + offset, link)
    context = " ".join(straws).replace(". \n", ".\n")
    prefix = _TRACKING_PREFIX.format(num=num_hops + 1, query=value)
    return _TRACKING_TEXT.format(context=context, query=value), prefix, tuple(names)


def _common(size: int, length: int, rng: random.Random, num_common: int = 10) -> Draft:
    """Common words: ten appear more often than `size` others, after an example."""
    is_short = length < 4096
    example, common = _numbered(10 if is_short else 30, 3 if is_short else 10,
                                1 if is_short else 3, num_common, rng)  # fmt: skip
    solved = _COMMON_TEXT.format(context=example) + _COMMON_PREFIX
    solved += " ".join(f"{i + 1}. {word}" for i, word in enumerate(common))
    repeats = (6, 1) if is_short else (30, 3)
    context, common = _numbered(size, *repeats, num_common, rng)
    text = _COMMON_TEXT.format(context=context)
    return f"{solved}\n{text}", _COMMON_PREFIX, tuple(common)


def _numbered(
    num_others: int, repeats: int, repeats_of_others: int, num_common: int, rng: random.Random
) -> tuple[str, list[str]]:
    drawn = words.many_words(num_common + num_others, rng)
    common, others = drawn[:num_common], drawn[num_common:]
    listed = common * repeats + others * repeats_of_others
    rng.shuffle(listed)
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(listed)), common


def _frequent(size: int, length: int, rng: random.Random) -> Draft:
    """Frequent words: made-up words whose counts fall off as 1 / rank^2; the first is dots."""
    num_known = max(4, length // 50)
    vocabulary: dict[str, None] = {}
    while len(vocabulary) < num_known:
        vocabulary["".join(rng.choices(string.ascii_lowercase, k=_CODED_LENGTH))] = None
    known = ["...", *list(vocabulary)[1:]]
    # 50 words are the least that give the fourth word a count of its own.
    counts = [int((50 + size) / rank**2 / _ZETA_OF_2) for rank in range(1, num_known + 1)]
    drawn = [word for word, num in zip(known, counts, strict=True) for _ in range(num)]
    rng.shuffle(drawn)
    text = _FREQUENT_TEXT.format(context=" ".join(drawn))
    return text, _FREQUENT_PREFIX, tuple(known[1:4])
