"""Splits what a thinking model writes into its reasoning and its answer, as it arrives."""

import re
from typing import NamedTuple

from hunyuan_jax.infer.detokenize import held_back

_THINK = re.compile(r"<think(:\w+)?>")


class Tags(NamedTuple):
    """The names of the tags, without and with the suffix that Hy3's have."""

    think: str = "<think>"
    think_end: str = "</think>"
    answer: str = "<answer>"
    answer_end: str = "</answer>"


PLAIN = Tags()


def tags_of(template: str) -> Tags:
    """The tags that a chat template writes: <think:opensource> is Hy3's."""
    found = _THINK.search(template)
    suffix = (found and found[1]) or ""
    return Tags(*(tag.replace(">", f"{suffix}>") for tag in PLAIN))


class Said(NamedTuple):
    """A piece of an answer."""

    reasoning: str
    content: str


class ReasoningSplitter:
    """Splits `<think>REASONING</think><answer>CONTENT</answer>`, where every tag may be absent.

    Tags count only where the model writes them: <think> at the beginning, <answer> after it, and
    </answer> at the end of what <answer> opened.  Whitespace beside a tag is left out.  However
    the text is split over calls, the pieces joined are the same.
    """

    def __init__(self, starts_inside: bool = False, tags: Tags = PLAIN):
        """`starts_inside`: the prompt ends with <think>, so that the text begins behind it."""
        self._tags = tags
        self._state = "thinking" if starts_inside else "start"
        self._held = ""
        self._at_start = True  # of reasoning or content: whitespace is left out

    def push(self, text: str) -> Said:
        """Returns what is certain now."""
        self._held += text
        return self._advanced(is_end=False)

    def finish(self) -> Said:
        """Returns what was held back, at the end of the text."""
        return self._advanced(is_end=True)

    def _advanced(self, is_end: bool) -> Said:
        reasoning, content = "", ""
        while True:
            state = self._state
            if state in ("start", "between"):
                if not self._leave_start(is_end):
                    break
            elif state == "thinking":
                reasoning += self._up_to(self._tags.think_end, "between", is_end)
            elif state == "answer":
                content += self._up_to(self._tags.answer_end, "behind", is_end)
            elif state == "behind":  # whitespace at the very end is left out
                if not self._held.strip():
                    break
                self._state = "content"
            else:
                content, self._held = content + self._held, ""
            if self._state == state:
                break
        return Said(reasoning, content)

    def _leave_start(self, is_end: bool) -> bool:
        """Whether it is known what follows; then the state has changed."""
        text = self._held.lstrip()
        think, answer = self._tags.think, self._tags.answer
        tags = (think, answer) if self._state == "start" else (answer,)
        for tag, state in ((think, "thinking"), (answer, "answer")):
            if tag in tags and text.startswith(tag):
                self._held, self._state, self._at_start = text[len(tag) :], state, True
                return True
        if not is_end and any(tag.startswith(text) for tag in tags):
            return False
        if self._state == "between":
            self._held = text
        self._state = "content"
        return True

    def _up_to(self, tag: str, following: str, is_end: bool) -> str:
        """The held text up to the tag, without whitespace at its ends."""
        text = self._held.lstrip() if self._at_start else self._held
        end = text.find(tag)
        if end >= 0:
            self._held, self._state = text[end + len(tag) :], following
            self._at_start = True
            return text[:end].rstrip()
        if is_end:
            self._held = ""
            return text
        kept = text[: len(text) - held_back(text, (tag,))].rstrip()
        self._held = text[len(kept) :]
        self._at_start = self._at_start and not kept
        return kept
