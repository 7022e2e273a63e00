"""Text to token ids and back."""

import codecs
import pathlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import user_path
from hunyuan_jax.tokenizer.byte import ByteTokenizer
from hunyuan_jax.tokenizer.files import read_settings
from hunyuan_jax.tokenizer.hf import HfTokenizer
from hunyuan_jax.tokenizer.hy import HyTokenizer

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "ByteTokenizer",
    "HfTokenizer",
    "HyTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "load_tokenizer",
]


class Tokenizer(Protocol):
    """What data, generation and chats need; `ByteTokenizer`, `HyTokenizer` and `HfTokenizer`
    provide it.

    chat_template: jinja text that the folder brings, or None; named_tokens: texts that the
    template may ask for, such as bos_token.
    """

    bos_id: int
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]
    chat_template: str | None
    named_tokens: Mapping[str, str]

    @property
    def special_names(self) -> tuple[str, ...]:
        """Names of the special tokens."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included; the model's table may be larger."""

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`, no bos or eos added; names of special tokens are text unless
        `parse_special`.
        """

    def encode_array(self, text: str) -> "np.ndarray":
        """Return `encode(text)` as an array of unsigned integers [S]."""

    def fingerprint(self) -> str:
        """Return a short text that differs for tokenizers that give any text other ids."""

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 character become U+FFFD."""

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Return the bytes of `ids`, which may begin or end inside a character."""

    def special_id(self, name: str) -> int:
        """Return the id of the special token called `name`, e.g.

        "<|eos|>"; ValueError if there is none.
        """


class StreamDecoder:
    """Text of ids that arrive one by one; the pushed texts and the finish together are
    `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes: possibly "", never part of a character."""
        return self._utf8.decode(
            self._tokenizer.decode_bytes([token_id], skip_special=self._skip_special)
        )

    def finish(self) -> str:
        """Return U+FFFD if the ids ended inside a character, else ""; the decoder is then ready
        for a new text.
        """
        return self._utf8.decode(b"", final=True)


def load_tokenizer(name_or_path: str | pathlib.Path) -> Tokenizer:
    """Return the byte tokenizer for "byte", else that of a model folder or of a single file; no
    network is used.

    A folder holds tokenizer.json or hy.tiktoken, and beside them the chat template
    (`files.read_settings`).  A file is a tokenizer.json, with what lies beside it, or a ranks
    file, alone: chats then follow Hunyuan-Large's built-in template.

    Raises ValueError when the path holds no tokenizer, or a damaged one.
    """
    if name_or_path == "byte":
        return ByteTokenizer()
    path = pathlib.Path(user_path(str(name_or_path)))
    if not path.is_dir():
        return HfTokenizer(path) if path.suffix == ".json" else HyTokenizer(path)
    if (path / "tokenizer.json").is_file():
        return HfTokenizer(path / "tokenizer.json")
    if not (path / "hy.tiktoken").is_file():
        raise ConfigError(
            f"{path} holds no tokenizer: neither tokenizer.json nor hy.tiktoken. Copy one there, "
            "or give the path of another."
        )
    settings = read_settings(path)
    tokenizer = HyTokenizer(path / "hy.tiktoken", settings.num_ids)
    tokenizer.chat_template, tokenizer.named_tokens = settings.chat_template, settings.named_tokens
    return tokenizer
