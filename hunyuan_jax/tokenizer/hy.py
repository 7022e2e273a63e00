"""The official Hunyuan tokenizer: BPE by tiktoken with a local ranks file.

See docs/model.md, Tokenizer.
"""

import base64
import binascii
import pathlib
import re
import unicodedata
from typing import TYPE_CHECKING

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.tokenizer.vocabulary import Vocabulary, replace_surrogates

if TYPE_CHECKING:
    import numpy as np

NUM_EXTRA_TOKENS = 204
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|startoftext|>",
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    *(f"<|extra_{index}|>" for index in range(NUM_EXTRA_TOKENS)),
)

# Pre-tokenization: BPE never merges across these pieces.  Unlike in cl100k, a digit is a piece.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

# `\s+(?!\S)` backtracks through the whole run of whitespace.  tiktoken's regex engine aborts near
# a million characters (999,999 with tiktoken 0.14), so the official class cannot encode longer
# runs.  They are split first here.
MAX_BLANK_RUN = 900_000
# tiktoken's \s.  Python's has four more characters.
_BLANK = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_LONG_BLANK_RUN = re.compile(rf"(?<!{_BLANK}){_BLANK}{{{MAX_BLANK_RUN + 1},}}")

_GET_AGAIN = "get the file again, it is damaged or of another kind"


class HyTokenizer(Vocabulary):
    """Tokenizer of Hunyuan-Large from its ranks file.

    `bos_id`, `eos_id` and `pad_id` are the official attributes.  eos is <|endoftext|>, the end of
    a pre-training document.  A chat turn ends with another token: generation stops on `stop_ids`,
    <|eos|> and <|extra_5|>.  The special ids follow the last rank, so a small file works too.

    Raises:
      ConfigError: the file is missing or is not a ranks file, see `read_ranks`.
    """

    _rules = ("NFC", SPLIT_PATTERN)

    def __init__(self, path: str | pathlib.Path, num_ids: int | None = None):
        """Reads the ranks file.

        num_ids: rows of the model's table.  A13B has one more token, <|extra_204|>, and its table
        has exactly as many rows as its tokenizer has ids.
        """
        tokens = read_ranks(path)
        import tiktoken  # here: the byte tokenizer does not need it

        special_ids = special_ids_of(len(tokens), num_ids)
        super().__init__([*tokens, *(name.encode() for name in special_ids)], special_ids)
        self.bos_id = self.special_id("<|startoftext|>")
        self.eos_id = self.special_id("<|endoftext|>")
        self.pad_id = self.special_id("<|pad|>")
        self.stop_ids = (self.special_id("<|eos|>"), self.special_id("<|extra_5|>"))
        self._encoding = tiktoken.Encoding(
            "hunyuan",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens=special_ids,
        )

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Returns the ids of NFC(`text`), without bos or eos; lone surrogates become U+FFFD.

        Names of special tokens in `text` are ordinary text, so that input cannot forge a chat
        turn.  `parse_special` parses them, as the official class does.
        """
        text = unicodedata.normalize("NFC", replace_surrogates(text))
        ids = []
        for piece in _cut_long_blanks(text):
            if parse_special:
                ids += self._encoding.encode(piece, allowed_special="all", disallowed_special=())
            else:
                ids += self._encoding.encode_ordinary(piece)
        return ids

    def normalized(self, text: str) -> str:
        """Returns what the bytes of the ids of `text` say."""
        return unicodedata.normalize("NFC", replace_surrogates(text))

    def encode_array(self, text: str) -> "np.ndarray":
        """Returns `encode(text)` as uint32 [S].

        It creates no Python int per token, which matters with several processes.
        """
        import numpy as np

        pieces = _cut_long_blanks(unicodedata.normalize("NFC", replace_surrogates(text)))
        return np.concatenate(
            [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
        )


def read_ranks(path: str | pathlib.Path) -> list[bytes]:
    """Returns the bytes of ranks 0, 1, ... from a file with a line "BASE64 RANK" per token.

    The rank is the line number; the rank column is ignored (docs/model.md, Tokenizer).

    Raises:
      ConfigError: the file is missing, a line is malformed, a token is repeated, or one of the 256
        single bytes has no rank.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ConfigError(
            f"tokenizer {str(path)!r} is not a file: it must be 'byte' or a ranks file of lines "
            "'BASE64 RANK'; give the path of the model's hy.tiktoken"
        )
    return parse_ranks(str(path), path.read_bytes())


def special_ids_of(num_ranks: int, num_ids: int | None) -> dict[str, int]:
    """Ids of the special tokens, which follow the ranks; `num_ids` as for `HyTokenizer`."""
    names = (*SPECIAL_TOKENS, f"<|extra_{NUM_EXTRA_TOKENS}|>")
    names = names if num_ids == num_ranks + len(names) else SPECIAL_TOKENS
    return {name: num_ranks + i for i, name in enumerate(names)}


def parse_ranks(path: str, raw: bytes) -> list[bytes]:
    """As `read_ranks`, of the bytes of a file; `path` is for errors."""
    rank_of = {}
    for line_number, line in enumerate(raw.splitlines(), start=1):
        token = _parse_line(line)
        if token is None:
            raise ConfigError(
                f"{path}, line {line_number}: {_shorten(line)} is not 'BASE64 RANK'; {_GET_AGAIN}"
            )
        if token in rank_of:
            raise ConfigError(
                f"{path}, line {line_number}: {_shorten(line)} repeats the token of line "
                f"{rank_of[token] + 1}, but a token has one rank; {_GET_AGAIN}"
            )
        rank_of[token] = line_number - 1
    missing = [byte for byte in range(256) if bytes([byte]) not in rank_of]
    if missing:
        raise ConfigError(
            f"{path}: {len(missing)} of the 256 single bytes have no rank (first: "
            f"{missing[0]:#04x}), but any text must be encodable; {_GET_AGAIN}"
        )
    return list(rank_of)


def _parse_line(line: bytes) -> bytes | None:
    """Returns the token of one line, or None if the line is malformed."""
    fields = line.split()
    if len(fields) != 2:
        return None
    try:
        return base64.b64decode(fields[0], validate=True)
    except binascii.Error:
        return None


def _shorten(line: bytes) -> str:
    text = line.decode("utf-8", errors="replace")
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _cut_long_blanks(text: str) -> list[str]:
    """Splits runs of whitespace that are longer than MAX_BLANK_RUN; most texts have none."""
    if len(text) <= MAX_BLANK_RUN:
        return [text]
    cuts = [0]
    for run in _LONG_BLANK_RUN.finditer(text):
        cuts += range(run.start() + MAX_BLANK_RUN, run.end(), MAX_BLANK_RUN)
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]
