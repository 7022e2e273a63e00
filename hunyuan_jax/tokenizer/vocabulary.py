"""What the tokenizers share: the bytes of every id, and text made safe to encode."""

import hashlib
import operator
from collections.abc import Iterable, Sequence

# A model's table may have more rows than the tokenizer has ids (specification sections 1 and 7), and an untrained
# model does pick such a row.  It shows as U+FFFD, as bytes that are no character do.
_BYTES_OF_UNUSED_ID = "\ufffd".encode()


class Vocabulary:
    """Ids to bytes: the ordinary tokens come first, the named special tokens follow, nothing lies beyond.

    `tokens` is the bytes of ids 0, 1, ...; `specials` the names (also the text) of the ids after the last of them.
    """

    _rules: tuple[str, ...] = ()  # what else decides the ids of a text

    def __init__(self, tokens: Sequence[bytes], specials: Sequence[str]):
        self._num_ordinary = len(tokens)
        self._token_bytes = [*tokens, *(name.encode() for name in specials)]
        self._special_ids = {name: len(tokens) + index for index, name in enumerate(specials)}

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._token_bytes)

    def special_id(self, name: str) -> int:
        """Return the id of the special token called `name`; ValueError if this vocabulary has none of that name."""
        if name not in self._special_ids:
            first, *_, last = self._special_ids
            raise ValueError(
                f"special token {name!r} is unknown: this tokenizer has {len(self._special_ids)}, {first} to {last}; "
                "use one of them, or the tokenizer of a Hunyuan ranks file"
            )
        return self._special_ids[name]

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change with any token, its id, and how text is cut (`_rules`)."""
        digest = hashlib.blake2b(repr((type(self).__name__, self._rules, self._num_ordinary)).encode(), digest_size=8)
        digest.update(b"".join(len(token).to_bytes(4, "little") + token for token in self._token_bytes))
        return digest.hexdigest()

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Join the bytes of `ids` (a list or an integer array [S]); they need not be whole UTF-8 characters.

        A special token gives its name, an id past the vocabulary gives U+FFFD; `skip_special` drops both, which is
        the official rule: everything from <|endoftext|> on (specification section 7).  A negative id is a ValueError.
        """
        ids = [operator.index(token_id) for token_id in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"token id {min(ids)} cannot be decoded: ids start at 0; remove ignored labels and padding marks first")
        if skip_special:
            ids = [token_id for token_id in ids if token_id < self._num_ordinary]
        return b"".join(self._token_bytes[token_id] if token_id < self.vocab_size else _BYTES_OF_UNUSED_ID for token_id in ids)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Return `decode_bytes` as text; bytes that are no UTF-8 character become U+FFFD, as the official class does."""
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")


def replace_surrogates(text: str) -> str:
    r"""Return `text` with surrogate pairs joined and lone surrogates (JSON's "\ud83d") turned into U+FFFD.

    Such a string has no UTF-8 form, hence no tokens.  tiktoken repairs it in this way; so do all tokenizers here.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
