"""The documents of a source that are of some length, as a source of their own.

Shapes: P pieces of the source, p pieces that are kept, N documents.
"""

from typing import Any

import numpy as np

from hunyuan_jax.data.tokens import Tokens
from hunyuan_jax.errors import ConfigError


class TokensOfLength:
    """`Tokens` of the documents with min_tokens to max_tokens tokens, bos and eos included."""

    def __init__(self, tokens: Tokens, min_tokens: int, max_tokens: int, option: str):
        """Reads the index of the source; max_tokens = 0 is no limit.

        Raises:
          ConfigError: no document is of that length; names `option`.
        """
        self._tokens, self._limits = tokens, (min_tokens, max_tokens)
        pairs_P = np.diff(tokens.ends, prepend=np.uint64(0)).astype(np.int64)
        document_P = np.cumsum(np.asarray(tokens.numbers) == 0) - 1
        length_N = np.bincount(document_P, weights=pairs_P).astype(np.int64) + 1
        is_kept_N = (length_N >= min_tokens) & ((length_N <= max_tokens) | (max_tokens == 0))
        if not is_kept_N.any():
            raise ConfigError(
                f"{option} has no document of {self._range()}; its documents have "
                f"{length_N.min()} to {length_N.max()}. Change min_tokens or max_tokens."
            )
        self._piece_p = np.flatnonzero(is_kept_N[document_P])
        self.ends = np.cumsum(pairs_P[self._piece_p], dtype=np.uint64)
        self.hashes = np.asarray(tokens.hashes)[self._piece_p]
        self.numbers = np.asarray(tokens.numbers)[self._piece_p]
        # Without the shards that have none of these documents.
        self.shard_pieces = np.unique(np.searchsorted(self._piece_p, tokens.shard_pieces))
        self.num_documents = int(is_kept_N.sum())

    def read(self, piece: int) -> np.ndarray:
        """See `Tokens`."""
        return self._tokens.read(int(self._piece_p[piece]))

    def document(self, piece: int) -> str:
        """See `Tokens`."""
        return self._tokens.document(int(self._piece_p[piece]))

    def identity(self) -> dict[str, Any]:
        """See `Tokens`."""
        min_tokens, max_tokens = self._limits
        return self._tokens.identity() | {
            "num_documents": self.num_documents,
            "num_pairs": int(self.ends[-1]),
            "min_tokens": min_tokens,
            "max_tokens": max_tokens,
        }

    def __str__(self) -> str:
        first, *rest = str(self._tokens).splitlines()
        kept = f"{self.num_documents:,} documents of {self._range()}, of {first}"
        return "\n".join([kept, *rest])

    def _range(self) -> str:
        min_tokens, max_tokens = self._limits
        return (
            f"{min_tokens} tokens and more"
            if not max_tokens
            else f"{min_tokens} to {max_tokens} tokens"
        )
