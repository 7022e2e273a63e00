"""What a model says about given tokens: their log-probabilities, and how its routers spread them.

Letters: B batch, S tokens of a row, T = S - 1, L layers, E experts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.layers.ffn.moe.layer import router_metrics
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel import rules

# Row lengths are rounded up to a few multiples of this, so that there are few programs.
_LENGTH_BUCKET = 32
# Tokens of one call, padding included, unless a single row has more.
_MAX_TOKENS = 8192


class Scorer:
    """Runs rows of ids through a model, in batches of similar length."""

    def __init__(self, model: Pretrained):
        self._model = model
        graph_def = abstract_model(model.config, model.mesh)[0]
        self._logprobs = jax.jit(lambda *args: _logprobs(graph_def, *args))
        self._figures = jax.jit(lambda *args: _figures(graph_def, *args))

    def logprobs(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """log p of each token but the first, given those before it: float32 [len(row) - 1] in nats
        for each row.
        """
        found: dict[int, np.ndarray] = {}
        for indices, ids_BS, mask_BS in self._batches(rows):
            logprobs_BT = np.asarray(self._logprobs(self._model.params, ids_BS, mask_BS))
            for index, logprobs_T in zip(indices, logprobs_BT, strict=False):
                found[index] = logprobs_T[: len(rows[index]) - 1].copy()
        return [found[index] for index in range(len(rows))]

    def router_stats(self, rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """demand_LE, load_LE and entropy_L of `router_metrics`, float32, over all tokens of the
        rows.
        """
        batches = self._batches(rows)
        figures = [self._figures(self._model.params, *arrays) for _, *arrays in batches]
        # The figures of tokens are sums over tokens, so those of several calls add up.
        totals = jax.tree.map(lambda *parts: sum(parts[1:], start=parts[0]), *figures)
        metrics = router_metrics(totals)
        names = ("demand_LE", "load_LE", "entropy_L")
        return {name: np.asarray(metrics[name]) for name in names}

    def _batches(
        self, rows: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Yields (indices of B rows, ids int32 [B', S], mask int32 [B', S]); B' >= B."""
        num_shards = rules.num_shards(self._model.mesh, "batch")
        waiting = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        while waiting:
            S = bucket(len(rows[waiting[-1]]), _LENGTH_BUCKET)
            num_rows = max(1, _MAX_TOKENS // S)
            indices, waiting = waiting[-num_rows:], waiting[:-num_rows]
            B = bucket(len(indices), 1)
            B += -B % num_shards
            ids_BS, mask_BS = np.zeros((2, B, S), np.int32)
            for row, index in enumerate(indices):
                ids_BS[row, : len(rows[index])] = rows[index]
                mask_BS[row, : len(rows[index])] = 1
            yield indices, ids_BS, mask_BS


def bucket(length: int, multiple: int) -> int:
    """Rounds a length up to a multiple of `multiple` and of 1/8 of the next power of two."""
    step = max(multiple, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def _logprobs(
    graph_def: nnx.GraphDef, params: dict[str, Any], ids_BS: jax.Array, mask_BS: jax.Array
) -> jax.Array:
    model: Transformer = nnx.merge(graph_def, params)
    hidden_BSD = model(ids_BS, _positions(ids_BS), mask_BS).hidden_BTD
    return -model.token_losses(hidden_BSD[:, :-1], ids_BS[:, 1:])


def _figures(
    graph_def: nnx.GraphDef, params: dict[str, Any], ids_BS: jax.Array, mask_BS: jax.Array
) -> dict[str, jax.Array]:
    model: Transformer = nnx.merge(graph_def, params)
    return model(ids_BS, _positions(ids_BS), mask_BS).stats


def _positions(ids_BS: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(ids_BS.shape[1]), ids_BS.shape)
