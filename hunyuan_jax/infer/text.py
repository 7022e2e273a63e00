"""Text in, text out: a tokenizer around `Pretrained.stream`."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_jax.config import ConfigError
from hunyuan_jax.infer.pretrained import from_pretrained
from hunyuan_jax.tokenizer import StreamDecoder, load_tokenizer


def stream(checkpoint: str | os.PathLike, prompt: str, *, tokenizer: str | None = None, **sampling: Any) -> Iterator[str]:
    """Pieces of text that continue `prompt`, one a token, never half a character.

    Args:
      checkpoint: as for `from_pretrained`.
      tokenizer: as for `load_tokenizer`; None takes the one the run was trained with, or that of the model folder.
      sampling: keywords of `Pretrained.stream`.

    Raises:
      ConfigError: no model there, or no tokenizer.
    """
    vocabulary = load_tokenizer(tokenizer or _tokenizer_of(checkpoint))
    model = from_pretrained(checkpoint)
    if vocabulary.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocabulary.vocab_size} ids, the model {model.config.vocab_size}; pass the one it was trained with."
        )
    # No bos: the prompt is continued as a passage from the middle of a document, which most of the training rows are.
    decoder = StreamDecoder(vocabulary, skip_special=True)
    for token_B in model.stream(np.array([vocabulary.encode(prompt)]), **sampling):
        yield decoder.push(int(token_B[0]))
    yield decoder.finish()


def _tokenizer_of(checkpoint: str | os.PathLike) -> str:
    if (Path(checkpoint) / "checkpoints").is_dir():
        from hunyuan_jax.checkpoint import store

        return store.read_config(checkpoint).data.tokenizer
    return str(checkpoint)
