"""Byte tokenizer: one id per UTF-8 byte, without a file, for tests and the tiny model."""

import re
from typing import TYPE_CHECKING

from hunyuan_jax.tokenizer.vocabulary import Vocabulary, replace_surrogates

if TYPE_CHECKING:
    import numpy as np

_SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
_SPECIAL_TEXT = re.compile("(" + "|".join(map(re.escape, _SPECIAL_TOKENS)) + ")")


class ByteTokenizer(Vocabulary):
    """Ids 0-255 are bytes, then <|bos|>, <|eos|> and <|pad|>.

    It has no chat tokens and does not normalise text.
    """

    def __init__(self):
        names = [name.encode() for name in _SPECIAL_TOKENS]
        super().__init__(
            [*(bytes([byte]) for byte in range(256)), *names],
            {name: 256 + i for i, name in enumerate(_SPECIAL_TOKENS)},
        )
        self.bos_id, self.eos_id, self.pad_id = map(self.special_id, _SPECIAL_TOKENS)
        self.stop_ids = (self.eos_id,)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Returns the UTF-8 bytes of `text`, without bos or eos; lone surrogates become U+FFFD.

        Names of special tokens in `text` are ordinary text unless `parse_special`.
        """
        text = replace_surrogates(text)
        if not parse_special:
            return list(text.encode("utf-8"))
        ids = []
        for index, piece in enumerate(_SPECIAL_TEXT.split(text)):
            # split() with a group alternates: text, name, text, name, ...
            ids += [self.special_id(piece)] if index % 2 else piece.encode("utf-8")
        return ids

    def normalized(self, text: str) -> str:
        """Returns what the bytes of the ids of `text` say."""
        return replace_surrogates(text)

    def encode_array(self, text: str) -> "np.ndarray":
        """Returns `encode(text)` as uint8 [S]; faster."""
        import numpy as np

        return np.frombuffer(replace_surrogates(text).encode("utf-8"), np.uint8)
