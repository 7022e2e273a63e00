"""Text of an answer whose token ids arrive bit by bit, cut at the first stop string."""

from collections.abc import Collection, Iterable, Sequence

from hunyuan_jax.tokenizer import StreamDecoder, Tokenizer


class Detokenizer:
    """Turns ids into text as they arrive, however they are split over calls.

    The texts of `push` and `finish`, joined, are the answer up to its first stop string: the one
    that is complete first, and the longest of those that end together.  Nothing of a stop string
    comes out, and never a part of a character.

    stopped_by: the stop string that ended the answer, or None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        skip_special: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
        shown: Collection[int] = (),
    ):
        """Starts an empty answer.

        Args:
          stop: not empty strings; each ends the answer.
          skip_special: leave out the names of special tokens.
          include_stop: the answer ends with its stop string instead of before it.
          min_tokens: stop strings are looked for behind this many tokens.
          shown: special tokens that skip_special does not leave out.
        """
        self.stopped_by: str | None = None
        self._decoder = StreamDecoder(tokenizer, skip_special=skip_special, shown=shown)
        self._stop, self._include_stop = tuple(stop), include_stop
        self._num_free = min_tokens
        self._held = ""

    def push(self, token_ids: Iterable[int]) -> str:
        """Returns the text that these ids complete; "" once a stop string was found."""
        texts = []
        for token_id in token_ids:
            if self.stopped_by is not None:
                break
            text = self._decoder.push(token_id)
            if self._num_free > 0:
                self._num_free -= 1
                texts.append(text)
            else:
                texts.append(self._released(text))
        return "".join(texts)

    def finish(self) -> str:
        """Returns what was held back, at the end of the answer."""
        if self.stopped_by is not None:
            return ""
        text = self._released(self._decoder.finish())
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        return text

    def _released(self, text: str) -> str:
        """What can no longer become part of a stop string."""
        text = self._held + text
        ends = [(start + len(stop), start, stop) for stop in self._stop
                if (start := text.find(stop)) >= 0]  # fmt: skip
        if ends:
            end, start, self.stopped_by = min(ends)
            self._held = ""
            return text[: end if self._include_stop else start]
        num_held = held_back(text, self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def held_back(text: str, marks: Iterable[str]) -> int:
    """Number of characters at the end of `text` that may be the beginning of one of `marks`."""
    return max(
        (
            length
            for mark in marks
            for length in range(1, min(len(mark), len(text) + 1))
            if text.endswith(mark[:length])
        ),
        default=0,
    )
