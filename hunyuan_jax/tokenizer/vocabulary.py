"""Base class of the tokenizers: the bytes of every id, and decoding."""

import hashlib
import operator
import types
from collections.abc import Iterable, Mapping, Sequence

# Text of an id without a token.  A model's table may have more rows than the tokenizer has ids
# (docs/model.md, Sizes), and an untrained model does generate them.
UNUSED_ID = "\ufffd".encode()


class Vocabulary:
    """Maps ids to bytes.

    token_bytes: bytes of ids 0, 1, ...
    special_ids: ids of the special tokens among them, by name.
    """

    # Settings of a model folder: the jinja text of its chat template, and the texts of bos_token
    # and the like.
    chat_template: str | None = None
    named_tokens: Mapping[str, str] = types.MappingProxyType({})
    _rules: tuple[str, ...] = ()  # whatever else decides the ids of a text

    def __init__(self, token_bytes: Sequence[bytes], special_ids: Mapping[str, int]):
        self._token_bytes = list(token_bytes)
        self._special_ids = dict(special_ids)
        self._dropped = frozenset(special_ids.values())

    @property
    def vocab_size(self) -> int:
        """Number of ids, including special tokens."""
        return len(self._token_bytes)

    @property
    def special_names(self) -> tuple[str, ...]:
        """Names of the special tokens, in the order of their ids."""
        return tuple(sorted(self._special_ids, key=self._special_ids.__getitem__))

    def special_id(self, name: str) -> int:
        """Returns the id of the special token called `name`.

        Raises:
          ValueError: there is none of that name.
        """
        if name not in self._special_ids:
            first, *_, last = self.special_names * 2 or ("none", "none")
            raise ValueError(
                f"special token {name!r} is unknown: this tokenizer has {len(self._special_ids)}, "
                f"{first} to {last}; use one of them, or the tokenizer of a Hunyuan ranks file"
            )
        return self._special_ids[name]

    def fingerprint(self) -> str:
        """Returns 16 hexadecimal digits that change with any token, its id, and `_rules`."""
        digest = hashlib.blake2b(
            repr((type(self).__name__, self._rules, sorted(self._special_ids.items()))).encode(),
            digest_size=8,
        )
        digest.update(
            b"".join(len(token).to_bytes(4, "little") + token for token in self._token_bytes)
        )
        return digest.hexdigest()

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Joins the bytes of `ids`, a list or an integer array [S].

        The result may begin or end inside a UTF-8 character.  A special token gives its name, and
        an id past the vocabulary gives U+FFFD.  `skip_special` drops both.  For Hunyuan-Large this
        is the official rule: it drops every id from <|endoftext|> on (docs/model.md, Tokenizer).

        Raises:
          ValueError: an id is negative.
        """
        ids = [operator.index(token_id) for token_id in ids]
        if ids and min(ids) < 0:
            raise ValueError(
                f"token id {min(ids)} cannot be decoded: ids start at 0; remove ignored labels "
                "and padding marks first"
            )
        if skip_special:
            ids = [
                token_id
                for token_id in ids
                if token_id < self.vocab_size and token_id not in self._dropped
            ]
        return b"".join(
            self._token_bytes[token_id] if token_id < self.vocab_size else UNUSED_ID
            for token_id in ids
        )

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Returns `decode_bytes` as text.

        Bytes that are not UTF-8 become U+FFFD, as in the official class.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")


def replace_surrogates(text: str) -> str:
    r"""Joins surrogate pairs and replaces lone surrogates (JSON's "\ud83d") with U+FFFD.

    A string with surrogates has no UTF-8 form, and hence no tokens.  tiktoken repairs it in this
    way, and so do all tokenizers here.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
