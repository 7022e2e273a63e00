"""Text in, text out: a tokenizer around `Pretrained.stream`, and a conversation around that."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from hunyuan_jax.chat.render import render_chat
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer import pretrained
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from hunyuan_jax.weights.open import open_model


def load(
    checkpoint: str | os.PathLike, tokenizer: str | None = None, mesh: Mesh | None = None
) -> tuple[Pretrained, Tokenizer]:
    """A model and its tokenizer.

    Args:
      checkpoint, mesh: as for `from_pretrained`.
      tokenizer: as for `load_tokenizer`; None takes the one the run was trained with, or that of
        the model folder.

    Raises:
      ConfigError: no model there, or no tokenizer that fits it.
    """
    opened = open_model(checkpoint)
    vocabulary = load_tokenizer(tokenizer or opened.tokenizer_folder)
    if vocabulary.vocab_size > opened.cfg.vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocabulary.vocab_size} ids, the model {opened.cfg.vocab_size}; "
            "pass the one it was trained with."
        )
    return pretrained.load(opened, mesh), vocabulary


def stream(
    model: Pretrained, vocabulary: Tokenizer, prompt: str, **sampling: Any
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, one a token, never half a character; `sampling`:
    keywords of `Pretrained.stream`.
    """
    # No bos: the prompt is continued as a passage from the middle of a document, which most of the
    # training rows are.
    return _decoded(model, vocabulary, vocabulary.encode(prompt), **sampling)


class Chat:
    """A conversation.

    messages: what was said so far, {"role", "content"} each.
    """

    def __init__(
        self, model: Pretrained, vocabulary: Tokenizer, system: str = "", **sampling: Any
    ):
        """`sampling`: keywords of `Pretrained.stream`; max_new_tokens is for each answer.

        Raises:
          ConfigError: the tokenizer has no chat tokens.
        """
        self._model, self._vocabulary, self._sampling = model, vocabulary, sampling
        self._opening = [{"role": "system", "content": system}] if system else []
        self.reset()
        try:
            render_chat([{"role": "user", "content": "?"}], vocabulary)
        except ValueError as e:
            raise ConfigError(
                f"this tokenizer cannot chat: {e}; use `generate`, or pass --tokenizer=FILE with "
                "chat tokens."
            ) from e

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = list(self._opening)

    def ask(self, question: str) -> Iterator[str]:
        """Pieces of the answer.  What was read of it when the iterator is closed is what the
        conversation remembers.

        Raises:
          ValueError: the conversation fills the model's positions, or bad sampling settings; the
            question is then forgotten.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        ids = render_chat(asked, self._vocabulary)
        room = self._model.config.max_position - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, the model "
                f"{self._model.config.max_position} positions; /reset starts a new one."
            )
        wanted = self._sampling.get("max_new_tokens", 256)
        pieces = _decoded(
            self._model,
            self._vocabulary,
            ids,
            **self._sampling | {"max_new_tokens": min(wanted, room)},
        )
        return self._remembered(asked, pieces)

    def _remembered(self, asked: list[dict[str, str]], pieces: Iterator[str]) -> Iterator[str]:
        said = []
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]


def _decoded(
    model: Pretrained, vocabulary: Tokenizer, ids: list[int], **sampling: Any
) -> Iterator[str]:
    stop_ids = {*vocabulary.stop_ids, *model.config.eos_token_ids}
    tokens = model.stream(
        np.array([ids]), eos_token_id=sorted(stop_ids), **sampling
    )  # refuses bad arguments here, not later
    return _texts(tokens, StreamDecoder(vocabulary, skip_special=True))


def _texts(tokens: Iterator[np.ndarray], decoder: StreamDecoder) -> Iterator[str]:
    for token_B in tokens:
        yield decoder.push(int(token_B[0]))
    yield decoder.finish()
