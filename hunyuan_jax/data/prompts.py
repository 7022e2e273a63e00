"""Prompts that a model answers while it trains, with the columns that rewards are computed from.

A run sees every prompt once in an epoch, in a new order: prompt i of the run depends on (data,
train.seed, i) alone.
"""

import dataclasses
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from hunyuan_jax.chat.render import render_chat
from hunyuan_jax.config import DataConfig
from hunyuan_jax.data import pack, source
from hunyuan_jax.data.chats import tools_of
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row of the data.

    name: of its row in the files; ids: its tokens; prompt: a text or messages, as in the file;
    columns: the row's other fields.
    """

    name: str
    ids: tuple[int, ...]
    prompt: str | Sequence[Mapping[str, Any]]
    columns: dict[str, Any]


class Prompts:
    """All prompts of config.data, and their order."""

    def __init__(self, data: DataConfig, seed: int, max_tokens: int, tokenizer: Tokenizer):
        """Reads them; those of more than max_tokens tokens are left out and counted.

        Raises:
          ConfigError: no such files, more bad rows than data.max_bad_fraction, or no prompt that
            can be used.
        """
        self._seed, self._max_tokens = seed, max_tokens
        self._tally = source.Tally(data.max_bad_fraction, "config.data.max_bad_fraction")
        self._num_long = 0
        self.all: list[Prompt] = []
        for span in source.find_files(data.source, "config.data.source"):
            for record in source.read_records(span):
                self._add(span.name, record, tokenizer)
        if not self.all:
            raise ConfigError(
                f"config.data.source = {data.source!r} holds no prompt that can be used"
                f"{self._left_out()}"
            )

    def _add(self, file: str, record: source.Record | source.Bad, tokenizer: Tokenizer) -> None:
        if isinstance(record, source.Bad):
            self._tally.add_bad(file, record)
            return
        try:
            ids = prompt_ids(record.fields, tokenizer)
        except ValueError as error:
            self._tally.add_bad(file, source.Bad(record.name, str(error)))
            return
        self._tally.add_document(file, 0)
        if len(ids) > self._max_tokens:
            self._num_long += 1
            return
        columns = {name: value for name, value in record.fields.items() if name != "prompt"}
        self.all.append(Prompt(record.name, tuple(ids), record.fields["prompt"], columns))

    def prompt(self, number: int) -> Prompt:
        """The 0-based prompt `number` of the run."""
        epoch, place = divmod(number, len(self.all))
        return self.all[pack.shuffled(place, len(self.all), self._seed, "prompts", epoch)]

    def identity(self) -> dict[str, Any]:
        """The number of prompts and the hash of their tokens."""
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self.all:
            digest.update(repr(prompt.ids).encode())
        return {"prompts": {"count": len(self.all), "hash": digest.hexdigest()}}

    def __str__(self) -> str:
        """The line of the log."""
        longest = max(len(prompt.ids) for prompt in self.all)
        return f"{len(self.all):,} prompts of at most {longest} tokens{self._left_out()}"

    def _left_out(self) -> str:
        long = f"; {self._num_long:,} of more than {self._max_tokens} tokens left out"
        return long * bool(self._num_long) + self._tally.skipped()


def prompt_ids(row: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The tokens of a row's `prompt`, a text or a list of messages that ends with the user's.

    Raises:
      ValueError: one line about what is wrong with the row.
    """
    prompt = row.get("prompt")
    if prompt is None:
        raise ValueError(f"a row has 'prompt'; this one has {list(row)[:5]}")
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        if not isinstance(prompt, list) or not prompt:
            raise ValueError("the prompt must be a text or a list of messages, and not be empty")
        if isinstance(prompt[-1], Mapping) and prompt[-1].get("role") == "assistant":
            raise ValueError("the prompt ends with the assistant; it must end with the user")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of a message that is left out
            try:
                ids = render_chat(prompt, tokenizer, **tools_of(row))
            except UserWarning as error:
                raise ValueError(str(error)) from error
    if not ids:
        raise ValueError("the prompt is empty")
    return ids
