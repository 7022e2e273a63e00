"""Text to token ids and back."""

import codecs
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from hunyuan_jax import hub
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.storage import HeldFiles, Place
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


_SUFFIXES = (".json", ".jinja", ".tiktoken")  # of the files that a tokenizer consists of


class Tokenizer(Protocol):
    """Interface of `ByteTokenizer`, `HyTokenizer` and `HfTokenizer`.

    chat_template: jinja text of the model folder, or None.
    named_tokens: texts that the template may use, such as bos_token.
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
        """Number of ids, including special tokens; the model's table may be larger."""

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Returns the ids of `text`, without bos or eos.

        Names of special tokens in it are ordinary text unless `parse_special`.
        """

    def normalized(self, text: str) -> str:
        """Returns what the bytes of the ids of `text` say: the text in the tokenizer's form."""

    def encode_array(self, text: str) -> "np.ndarray":
        """Returns `encode(text)` as an array of unsigned integers [S]."""

    def fingerprint(self) -> str:
        """Returns a short text that differs if any text would get different ids."""

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Returns the bytes of `ids`, which may begin or end inside a character."""

    def special_id(self, name: str) -> int:
        """Returns the id of a special token, such as "<|eos|>".

        Raises:
          ValueError: there is none of that name.
        """


class StreamDecoder:
    """Decodes ids that arrive one by one.

    The texts of `push` and `finish`, joined, equal `tokenizer.decode` of all ids.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = False, shown: Collection[int] = ()
    ):
        """`shown`: special tokens that skip_special does not leave out."""
        self._tokenizer = tokenizer
        self._skip_special, self._shown = skip_special, frozenset(shown)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Returns the text that `token_id` completes, maybe "" but never part of a character."""
        skip = self._skip_special and token_id not in self._shown
        return self._utf8.decode(self._tokenizer.decode_bytes([token_id], skip_special=skip))

    def finish(self) -> str:
        """Returns U+FFFD if the ids ended inside a character, else "".

        The decoder is then ready for a new text.
        """
        return self._utf8.decode(b"", final=True)


def load_tokenizer(source: str | os.PathLike | Place) -> Tokenizer:
    """Returns the tokenizer of a model folder or file; "byte" is the byte tokenizer.

    A folder has tokenizer.json or hy.tiktoken, and maybe a chat template (`files.read_settings`).
    A file is a tokenizer.json, whose folder is read too, or a ranks file alone: chats then use
    Hunyuan-Large's built-in template.  A GGUF file has both in its metadata.  The files of a hub
    id (`hub.hub_id`) or of an fsspec URL, such as gs://BUCKET/FOLDER, are copied; else the network
    is not used.

    Raises:
      ConfigError: the path has no tokenizer, or a damaged one.
    """
    if source == "byte":
        return ByteTokenizer()
    place = source
    if not isinstance(source, Place):
        place = Place(source, "the tokenizer", hub.TOKENIZER_FILES)
    if place.url.endswith(".gguf") and not place.is_file("tokenizer.json"):
        from hunyuan_jax.gguf import vocabulary

        place = vocabulary.folder(place.file if isinstance(place, HeldFiles) else place)
    file = ""
    if not place.is_local and place.url.endswith(_SUFFIXES):
        place, file = place.parent()
    with place.local_copy(_SUFFIXES) as path:
        try:
            return _load(path / file)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(path), place.url)) from error


def _load(path: pathlib.Path) -> Tokenizer:
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
