"""What a model says about given tokens: their log-probabilities, and how its routers spread them.

Letters: B batch, S tokens of a row, L layers, E experts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hunyuan_jax.infer.engine import Engine
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.infer.request import Request, TokenLogprobs
from hunyuan_jax.infer.settings import Sampling
from hunyuan_jax.layers.ffn.moe.layer import router_metrics
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel import rules, settings

# Row lengths are rounded up to a few multiples of this, so that there are few programs.
_LENGTH_BUCKET = 32
# Tokens of one call, padding included, unless a single row has more.
_MAX_TOKENS = 8192


def logprobs(model: Pretrained, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """log p of each token but the first, given those before it: float32 [len(row) - 1] in nats for
    each row.
    """
    found = of_ends(model.engine, rows, [1] * len(rows))
    return [np.array([entry.logprob for entry in row], np.float32) for row in found]


def of_ends(
    engine: Engine, rows: Sequence[Sequence[int]], starts: Sequence[int], num_top: int = 0
) -> list[tuple[TokenLogprobs, ...]]:
    """Scores the end of each row, given its beginning: one entry for each token from starts[i] on,
    with num_top of the most likely ids.

    Beginnings that rows share are computed once, up to their last full page.  A start is at least
    1; one that is the length of its row asks for nothing.
    """
    sampling = Sampling(temperature=0, prompt_logprobs=num_top, stop_ids=()).resolved({})
    found: list[tuple[TokenLogprobs, ...]] = [()] * len(rows)
    asked = [place for place, start in enumerate(starts) if start < len(rows[place])]
    requests = [
        Request("", tuple(rows[i]), sampling, only_score=True, score_from=starts[i]) for i in asked
    ]
    for output in engine.run(requests):
        found[asked[int(output.id)]] = output.prompt_logprobs
    return found


class RouterStats:
    """Runs rows of ids through a model without a cache, in batches of similar length."""

    @settings.stated()
    def __init__(self, model: Pretrained):
        self._model = model
        graph_def = abstract_model(model.config, model.mesh)[0]
        self._figures = jax.jit(lambda *args: _figures(graph_def, *args))

    @settings.stated()
    def __call__(self, rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """demand_LE, load_LE and entropy_L of `router_metrics`, float32, over all tokens of the
        rows.
        """
        batches = self._batches(rows)
        figures = [self._figures(self._model.params, *arrays) for arrays in batches]
        # The figures of tokens are sums over tokens, so those of several calls add up.
        totals = jax.tree.map(lambda *parts: sum(parts[1:], start=parts[0]), *figures)
        metrics = router_metrics(totals)
        names = ("demand_LE", "load_LE", "entropy_L")
        return {name: np.asarray(metrics[name]) for name in names}

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (ids int32 [B, S], mask int32 [B, S]), with padding rows."""
        num_shards = rules.num_shards(self._model.mesh, "batch")
        waiting = sorted(rows, key=len)
        while waiting:
            S = bucket(len(waiting[-1]), _LENGTH_BUCKET)
            num_rows = max(1, _MAX_TOKENS // S)
            batch, waiting = waiting[-num_rows:], waiting[:-num_rows]
            B = bucket(len(batch), 1)
            B += -B % num_shards
            ids_BS, mask_BS = np.zeros((2, B, S), np.int32)
            for row, ids in enumerate(batch):
                ids_BS[row, : len(ids)] = ids
                mask_BS[row, : len(ids)] = 1
            yield ids_BS, mask_BS


def bucket(length: int, multiple: int) -> int:
    """Rounds a length up to a multiple of `multiple` and of 1/8 of the next power of two."""
    step = max(multiple, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def _figures(
    graph_def: nnx.GraphDef, params: dict[str, Any], ids_BS: jax.Array, mask_BS: jax.Array
) -> dict[str, jax.Array]:
    model: Transformer = nnx.merge(graph_def, params)
    return model(ids_BS, _positions(ids_BS), mask_BS).stats


def _positions(ids_BS: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(ids_BS.shape[1]), ids_BS.shape)
