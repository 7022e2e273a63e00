"""What the tokenizers share: the bytes of every id, and text made safe to encode."""

import hashlib
import operator
import types
from collections.abc import Iterable, Mapping, Sequence

# A model's table may have more rows than the tokenizer has ids (docs/model.md, Sizes),
# and an untrained model does pick such a row.  It shows as U+FFFD, as bytes that are no character
# do.
UNUSED_ID = "\ufffd".encode()


class Vocabulary:
    """Ids to bytes; nothing lies beyond the last of them.

    `token_bytes` is the bytes of ids 0, 1, ...; `special_ids` the ids of the special tokens among
    them by name.
    """

    # What a folder can bring besides: the jinja text of its chat template, and the texts that it
    # calls bos_token and the like.
    chat_template: str | None = None
    named_tokens: Mapping[str, str] = types.MappingProxyType({})
    _rules: tuple[str, ...] = ()  # what else decides the ids of a text

    def __init__(self, token_bytes: Sequence[bytes], special_ids: Mapping[str, int]):
        self._token_bytes = list(token_bytes)
        self._special_ids = dict(special_ids)
        self._dropped = frozenset(special_ids.values())

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._token_bytes)

    @property
    def special_names(self) -> tuple[str, ...]:
        """Names of the special tokens, in the order of their ids."""
        return tuple(sorted(self._special_ids, key=self._special_ids.__getitem__))

    def special_id(self, name: str) -> int:
        """Return the id of the special token called `name`; ValueError if this vocabulary has none
        of that name.
        """
        if name not in self._special_ids:
            first, *_, last = *self.special_names, "none", "none"
            raise ValueError(
                f"special token {name!r} is unknown: this tokenizer has {len(self._special_ids)}, "
                f"{first} to {last}; use one of them, or the tokenizer of a Hunyuan ranks file"
            )
        return self._special_ids[name]

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change with any token, its id, and how text is cut
        (`_rules`).
        """
        digest = hashlib.blake2b(
            repr((type(self).__name__, self._rules, sorted(self._special_ids.items()))).encode(),
            digest_size=8,
        )
        digest.update(
            b"".join(len(token).to_bytes(4, "little") + token for token in self._token_bytes)
        )
        return digest.hexdigest()

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Join the bytes of `ids` (a list or an integer array [S]); they need not be whole UTF-8
        characters.

        A special token gives its name, an id past the vocabulary gives U+FFFD; `skip_special`
        drops both, which for Hunyuan-Large is the official rule: everything from <|endoftext|> on
        (docs/model.md, Tokenizer).  A negative id is a ValueError.
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
        """Return `decode_bytes` as text; bytes that are no UTF-8 character become U+FFFD, as the
        official class does.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")


def replace_surrogates(text: str) -> str:
    r"""Return `text` with surrogate pairs joined and lone surrogates (JSON's "\ud83d") turned into
    U+FFFD.

    Such a string has no UTF-8 form, hence no tokens.  tiktoken repairs it in this way; so do all
    tokenizers here.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
