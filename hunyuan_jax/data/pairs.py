"""Preferences: two answers to one prompt, and their log-probabilities under a reference model.

Letters: B rows, T positions, Q pairs of a row.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hunyuan_jax.config import DataConfig, TrainConfig
from hunyuan_jax.data import pack
from hunyuan_jax.data.chats import answered, tools_of
from hunyuan_jax.data.examples import Example, Examples, PackedExamples, Text, stack
from hunyuan_jax.data.stream import Batch
from hunyuan_jax.tokenizer import Tokenizer

_TOKENS_PER_PAIR = 32  # a row has no more pairs than one for so many positions


def pair_of(row: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[Text, Text]:
    """Returns the chosen and the rejected text of a row of preferences.

    A row has `prompt`, `chosen` and `rejected`, as `chats.answered` takes them; or `chosen` and
    `rejected` alone, two chats, which begin with the same messages: their prompt.

    Raises:
      ValueError: one line about what is wrong with the row.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None or rejected is None:
        raise ValueError(
            f"a row has 'prompt', 'chosen' and 'rejected'; this one has {list(row)[:5]}"
        )
    if chosen == rejected:
        raise ValueError("chosen and rejected are equal")
    prompt = row.get("prompt")
    if prompt is None:
        if not isinstance(chosen, Sequence) or isinstance(chosen, str):
            raise ValueError("there is no prompt, and chosen is no list of messages that has one")
        num_common = _num_common(chosen, rejected)
        if not num_common:
            raise ValueError("chosen and rejected begin with different messages: no prompt")
        prompt, chosen, rejected = (
            chosen[:num_common],
            chosen[num_common:],
            rejected[num_common:],
        )
    return tuple(
        answered(prompt, answer, tokenizer, tools_of(row)) for answer in (chosen, rejected)
    )


def max_pairs(seq_len: int) -> int:
    """Returns the most pairs that a row of seq_len positions has."""
    return max(1, seq_len // _TOKENS_PER_PAIR)


class PackedPairs(PackedExamples):
    """The DataStream of pairs: segments 2q + 1 and 2q + 2 of a row are chosen and rejected of its
    pair q.

    Fields beside those of PackedExamples: is_pair float32 [B, Q], 1 where there is a pair;
    reference float32 [B, T], the log-probabilities that `set_reference` was given, else 0.

    Rows are dealt into batches once, and the order of the batches is drawn anew in each epoch.
    The last bits of a log-probability depend on where in a batch its row is, and on what is
    beside it where experts are shared.  So policy and reference are equal at first.
    """

    def __init__(
        self,
        examples: Examples,
        data: DataConfig,
        train: TrainConfig,
        pad_id: int,
        pairs_per_row: int,
    ):
        super().__init__(examples, data, train, pad_id, pairs_per_row)
        self._pairs_per_row = pairs_per_row
        num_rows = len(self.training)
        order = [pack.shuffled(row, num_rows, train.seed, "rows") for row in range(num_rows)]
        self.training = self._whole_batches([self.training[row] for row in order])
        self.held_out = self._whole_batches(self.held_out)
        self._reference: dict[str, np.ndarray] = {}

    def _whole_batches(self, rows: list[list[Example]]) -> list[list[Example]]:
        return rows + [[]] * (-len(rows) % self._train.batch_size)

    @property
    def all_rows(self) -> list[list[Example]]:
        """The rows of all training batches and of the held-out ones; some are empty."""
        return [*self.training, *self.held_out]

    def set_reference(self, log_probs_RT: np.ndarray) -> None:
        """Takes log-probabilities of the targets in `all_rows`."""
        rows = self.all_rows
        assert log_probs_RT.shape == (len(rows), self._train.seq_len)
        self._reference = {
            row[0].name: log_probs_T
            for row, log_probs_T in zip(rows, log_probs_RT, strict=True)
            if row
        }

    def _place(self, number: int) -> tuple[int, int]:
        step, slot = divmod(number, self._train.batch_size)
        num_batches = len(self.training) // self._train.batch_size
        epoch, place = divmod(step, num_batches)
        batch = pack.shuffled(place, num_batches, self._train.seed, "batches", epoch)
        return epoch, batch * self._train.batch_size + slot

    def layout(self) -> str:
        """Returns a hash of what is where in `all_rows`."""
        names = [[example.name for example in row] for row in self.all_rows]
        digest = hashlib.blake2b(json.dumps([self.identity(), names]).encode(), digest_size=16)
        return digest.hexdigest()

    def stack(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """See `PackedExamples.stack`; the rows are some of `all_rows`, or empty."""
        batch = stack_pairs(rows, self._train.seq_len, self._pad_id, self._pairs_per_row)
        for r, row in enumerate(rows):
            if row and self._reference:
                batch["reference"][r] = self._reference[row[0].name]
        return batch


def stack_pairs(
    rows: Sequence[Sequence[Example]], seq_len: int, pad_id: int, pairs_per_row: int
) -> Batch:
    """Returns the batch of rows of pairs, with a reference of zeros: see `PackedPairs`."""
    is_pair = np.zeros((len(rows), pairs_per_row), np.float32)
    for r, row in enumerate(rows):
        is_pair[r, : len(row)] = 1
    reference = np.zeros((len(rows), seq_len), np.float32)
    return {**stack(rows, seq_len, pad_id), "is_pair": is_pair, "reference": reference}


def _num_common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Returns how many messages two chats begin with in common."""
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    return count
