"""Byte-level BPE from a tokenizer.json, by the `tokenizers` library; the dense models use it."""

import hashlib
import json
import pathlib
from typing import TYPE_CHECKING, Any

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.tokenizer.files import read_settings
from hunyuan_jax.tokenizer.vocabulary import UNUSED_ID, Vocabulary, replace_surrogates

if TYPE_CHECKING:
    import numpy as np


class HfTokenizer(Vocabulary):
    """Tokenizer of a tokenizer.json and the settings in its folder.

    Without a bos_token, a document starts with eos_token, as in GPT-2.  Without a pad_token,
    eos_token pads too.

    Raises:
      ConfigError: the file is missing, damaged or not byte-level, or no eos_token is named.
    """

    def __init__(self, path: str | pathlib.Path):
        path = pathlib.Path(path)
        if not path.is_file():
            raise ConfigError(
                f"tokenizer {str(path)!r} is not a file; give the path of a model folder or of "
                "its tokenizer.json."
            )
        from tokenizers import Tokenizer  # here: the byte tokenizer does not need it

        try:
            self._parsing, self._plain = (Tokenizer.from_file(str(path)) for _ in range(2))
        except Exception as e:  # the library raises plain Exceptions
            raise ConfigError(
                f"{path} is not a tokenizer.json ({e}); get the file again, it is damaged or of "
                "another kind."
            ) from e
        self._plain.encode_special_tokens = True  # special names are ordinary text
        kinds = _decoder_kinds(json.loads(path.read_text(encoding="utf-8")).get("decoder"))
        if kinds != ["ByteLevel"]:
            raise ConfigError(
                f"{path}: its decoder is {' + '.join(kinds) or 'none'}; only ByteLevel tokenizers "
                "can be read."
            )
        added = {
            token_id: token.content
            for token_id, token in self._parsing.get_added_tokens_decoder().items()
        }
        special = {
            token.content: i
            for i, token in self._parsing.get_added_tokens_decoder().items()
            if token.special
        }
        num_ids = max(self._parsing.get_vocab(with_added_tokens=True).values()) + 1
        tokens = (added.get(i) or self._parsing.id_to_token(i) for i in range(num_ids))
        byte_of = bytes_of_characters()
        try:
            token_bytes = [
                UNUSED_ID
                if token is None
                else token.encode()
                if i in added
                else bytes(byte_of[c] for c in token)
                for i, token in enumerate(tokens)
            ]
        except KeyError as e:
            raise ConfigError(
                f"{path}: a token holds {e.args[0]!r}, which stands for no byte; only ByteLevel "
                "tokenizers can be read."
            ) from e
        super().__init__(token_bytes, special)
        self._rules = (hashlib.sha256(path.read_bytes()).hexdigest(),)
        settings = read_settings(path.parent)
        self.chat_template, self.named_tokens = settings.chat_template, settings.named_tokens
        ids = {}
        for name, text in settings.named_tokens.items():
            ids[name] = self._parsing.token_to_id(text)
            if ids[name] is None:
                raise ConfigError(
                    f"{path.parent}/tokenizer_config.json: {name} = {text!r} is not a token of "
                    f"{path.name}."
                )
        if "eos_token" not in ids:
            raise ConfigError(
                f"{path.parent}/tokenizer_config.json names no eos_token; copy it from the "
                "model's folder, it ends a text."
            )
        self.eos_id = ids["eos_token"]
        self.bos_id, self.pad_id = (
            ids.get("bos_token", self.eos_id),
            ids.get("pad_token", self.eos_id),
        )
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, *settings.stop_ids)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plain.encode_special_tokens = True  # a pickled copy forgets it

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Returns the ids of `text`, without bos or eos; lone surrogates become U+FFFD.

        Names of special tokens in `text` are ordinary text unless `parse_special`.
        """
        tokenizer = self._parsing if parse_special else self._plain
        return tokenizer.encode(replace_surrogates(text), add_special_tokens=False).ids

    def normalized(self, text: str) -> str:
        """Returns what the bytes of the ids of `text` say."""
        normalizer = self._parsing.normalizer
        text = replace_surrogates(text)
        return text if normalizer is None else normalizer.normalize_str(text)

    def encode_array(self, text: str) -> "np.ndarray":
        """Returns `encode(text)` as uint32 [S]."""
        import numpy as np

        return np.asarray(self.encode(text), np.uint32)


def _decoder_kinds(decoder: dict | None) -> list[str]:
    if not decoder:
        return []
    return [
        kind for part in decoder.get("decoders", [decoder]) for kind in [part.get("type", "?")]
    ]


def bytes_of_characters() -> dict[str, int]:
    """Returns the byte of each character of a byte-level token.

    A printable byte is its own character; the others are numbered from U+0100.
    """
    seen = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("\xa1"), ord("\xac") + 1),
        *range(ord("\xae"), ord("\xff") + 1),
    ]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {
        chr(256 + i): byte for i, byte in enumerate(unseen)
    }
