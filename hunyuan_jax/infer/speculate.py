"""Speculative decoding: who drafts the tokens that a step of the engine verifies.

A step runs a row's newest token and K drafts through the model, and draws a token after each, by
the key that it would have anyway.  Those up to and including the first that is not the draft are
the answer's: what is drawn does not depend on the drafts.  Entries of rejected drafts are behind
the row's end, and the next step writes over them.
Letters: L rows of the device, B rows of a call, T tokens, K drafts, S positions, N pages of a row,
D model, V vocabulary.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer.request import Limits
from hunyuan_jax.model.cache import Cache, empty_cache
from hunyuan_jax.model.transformer import Transformer

# Drafts of a step, unless `Limits.speculate_tokens` says another number.
NUM_DRAFTS = {"mtp": 1, "ngram": 4}
_NUM_DRAFTS_OF_MODEL = 4
# Tokens before a row's newest that `Ngram` compares, the newest included.
_NGRAM = 3


class Memory(NamedTuple):
    """What a proposer keeps on the device between steps.

    entries: its own keys and values, in the pages of the model's; tokens_LS: int32, the tokens of
    each row, the newest included, or [L, 0].
    """

    entries: dict[str, Any]
    tokens_LS: jax.Array


class Step(NamedTuple):
    """What a call of the model has read and drawn.

    row_B: numbers of the rows; table_BN: their pages, 0 where nothing is to be kept; length_B:
    tokens in the cache before the call; token_B: the first token that it read, at that slot;
    drawn_BT: the token drawn after each that it read; num_new_B: how many of them are new tokens
    of the answer; hidden_BTD: the model's output.
    """

    row_B: jax.Array
    table_BN: jax.Array
    length_B: jax.Array
    token_B: jax.Array
    drawn_BT: jax.Array
    num_new_B: jax.Array
    hidden_BTD: jax.Array


class Proposer(Protocol):
    """Drafts tokens.

    num_tokens: K; params: what its model computes with, passed to every call; keeps_tokens:
    whether it reads `Memory.tokens_LS`.
    """

    num_tokens: int
    params: Any
    keeps_tokens: bool

    def new_entries(self, num_pages: int, page_size: int, cache_dtype: str | None) -> dict:
        """Its empty cache."""

    def read(
        self,
        model: Transformer,
        params: Any,
        memory: Memory,
        cache: Cache,
        tokens_BT: jax.Array,
        next_BT: jax.Array,
        hidden_BTD: jax.Array,
    ) -> Memory:
        """Takes in pieces of prompts, each from a page's beginning on.

        Args:
          cache: the model's before it read them; its entries are not used.
          next_BT: the token after each; that after a prompt's last is not known.
          hidden_BTD: the model's output.
        """

    def propose(
        self, model: Transformer, params: Any, memory: Memory, step: Step
    ) -> tuple[Memory, jax.Array]:
        """(memory, int32 drafts [B, K] of what follows the newest token of each row)."""


class Off:
    """Drafts nothing."""

    num_tokens = 0
    params: Any = None
    keeps_tokens = False

    def new_entries(self, num_pages: int, page_size: int, cache_dtype: str | None) -> dict:
        """None."""
        return {}

    def read(self, model, params, memory, cache, tokens_BT, next_BT, hidden_BTD) -> Memory:
        """Nothing to take in."""
        return memory

    def propose(self, model, params, memory, step) -> tuple[Memory, jax.Array]:
        """[B, 0]."""
        return memory, jnp.zeros((len(step.row_B), self.num_tokens), jnp.int32)


class Ngram(Off):
    """Drafts what followed the last place in a row's own text whose tokens are those at its end:
    of up to three, as many as there are.
    """

    keeps_tokens = True

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def propose(self, model, params, memory, step) -> tuple[Memory, jax.Array]:
        """See `Proposer`."""
        newest_B = step.length_B + step.num_new_B
        rows_BS = memory.tokens_LS[step.row_B]
        return memory, jax.vmap(_continued, (0, 0, None))(rows_BS, newest_B, self.num_tokens)


def _continued(tokens_S: jax.Array, newest: jax.Array, num: int) -> jax.Array:
    """The num tokens that followed the longest and then latest match of the tokens up to the
    place `newest`; where it reaches the end, from the match on again.
    """
    place_S = jnp.arange(len(tokens_S))
    length_S, is_equal_S = jnp.zeros_like(place_S), (place_S > 0) & (place_S <= newest)
    for back in range(_NGRAM):
        before_S = jnp.where(place_S > back, jnp.roll(tokens_S, back + 1), -1)
        is_equal_S &= before_S == tokens_S[jnp.maximum(newest - back, 0)]
        length_S += is_equal_S.astype(jnp.int32)
    # place_S: of the first token after a match.
    rank_S = length_S * len(tokens_S) + jnp.where(place_S <= newest, place_S, 0)
    first = jnp.argmax(rank_S).astype(jnp.int32)
    first = jnp.minimum(first, newest)
    return tokens_S[first + jnp.arange(num) % jnp.maximum(newest - first + 1, 1)]


class Mtp(Off):
    """The model's layer of multi-token prediction; for further drafts it reads its own output.

    Its entry of a token depends on the next one: of a page that two prompts share, the last entry
    is that of the prompt that filled it.  That costs a draft, and changes no token.
    """

    def __init__(self, cfg: ModelConfig, num_tokens: int):
        self._cfg, self.num_tokens = cfg, num_tokens

    def new_entries(self, num_pages: int, page_size: int, cache_dtype: str | None) -> dict:
        """Keys and values of the layer."""
        return empty_cache(self._cfg, num_pages, page_size, cache_dtype, of_mtp=True).entries

    def read(self, model, params, memory, cache, tokens_BT, next_BT, hidden_BTD) -> Memory:
        """See `Proposer`."""
        output = model.extend_mtp(hidden_BTD, next_BT, cache._replace(entries=memory.entries))
        return memory._replace(entries=output.cache.entries)

    def propose(self, model, params, memory, step) -> tuple[Memory, jax.Array]:
        """See `Proposer`."""
        cache, drafts = _cache(memory, step), []
        output = model.extend_mtp(step.hidden_BTD, step.drawn_BT, cache)
        hidden_B1D = _at(output.hidden_BTD, step.num_new_B - 1)
        length_B = step.length_B + step.num_new_B
        while True:
            drafts.append(_likeliest(model, hidden_B1D))
            if len(drafts) == self.num_tokens:
                break
            cache = output.cache.rollback(length_B)
            output = model.extend_mtp(hidden_B1D, drafts[-1][:, None], cache)
            hidden_B1D, length_B = output.hidden_BTD, length_B + 1
        return memory._replace(entries=output.cache.entries), jnp.stack(drafts, axis=1)


class Draft(Off):
    """A smaller model of the same vocabulary, greedy."""

    def __init__(self, graph_def: nnx.GraphDef, params: Any, cfg: ModelConfig, num_tokens: int):
        self._graph_def, self._cfg = graph_def, cfg
        self.params, self.num_tokens = params, num_tokens

    def new_entries(self, num_pages: int, page_size: int, cache_dtype: str | None) -> dict:
        """Keys and values of all its layers."""
        return empty_cache(self._cfg, num_pages, page_size, cache_dtype).entries

    def read(self, model, params, memory, cache, tokens_BT, next_BT, hidden_BTD) -> Memory:
        """See `Proposer`."""
        draft: Transformer = nnx.merge(self._graph_def, params)
        output = draft.extend(tokens_BT, cache._replace(entries=memory.entries))
        return memory._replace(entries=output.cache.entries)

    def propose(self, model, params, memory, step) -> tuple[Memory, jax.Array]:
        """See `Proposer`."""
        draft: Transformer = nnx.merge(self._graph_def, params)
        cache, drafts = _cache(memory, step), []
        # The first token again: when it was the newest, its row may not have had a page for it.
        tokens_BT = jnp.concatenate([step.token_B[:, None], step.drawn_BT], axis=1)
        output = draft.extend(tokens_BT, cache)
        hidden_B1D = _at(output.hidden_BTD, step.num_new_B)
        length_B = step.length_B + step.num_new_B + 1
        while True:
            drafts.append(_likeliest(draft, hidden_B1D))
            if len(drafts) == self.num_tokens:
                break
            output = draft.decode(drafts[-1], output.cache.rollback(length_B))
            hidden_B1D, length_B = output.hidden_BTD, length_B + 1
        return memory._replace(entries=output.cache.entries), jnp.stack(drafts, axis=1)


def _cache(memory: Memory, step: Step) -> Cache:
    return Cache(memory.entries, jnp.zeros_like(step.length_B), step.length_B, step.table_BN)


def _at(hidden_BTD: jax.Array, place_B: jax.Array) -> jax.Array:
    """[B, 1, D]."""
    return jnp.take_along_axis(hidden_BTD, jnp.maximum(place_B, 0)[:, None, None], axis=1)


def _likeliest(model: Transformer, hidden_B1D: jax.Array) -> jax.Array:
    """int32 [B]."""
    return jnp.argmax(model.logits(hidden_B1D)[:, 0], axis=-1).astype(jnp.int32)


def num_drafts(limits: Limits) -> int:
    """K of an engine within these limits."""
    if limits.speculate is None:
        return 0
    default = NUM_DRAFTS.get(limits.speculate, _NUM_DRAFTS_OF_MODEL)
    return limits.speculate_tokens or default


def without_model(limits: Limits, cfg: ModelConfig) -> Proposer:
    """The proposer that the limits name, if it is not a model of its own.

    Raises:
      ConfigError: the model has no layer of multi-token prediction.
    """
    if limits.speculate == "ngram":
        return Ngram(num_drafts(limits))
    if limits.speculate != "mtp":
        return Off()
    if not cfg.num_mtp_layers:
        raise ConfigError(
            "speculate = mtp: the model has no layer of multi-token prediction; use ngram, or the "
            "folder of a small model with the same vocabulary."
        )
    return Mtp(cfg, num_drafts(limits))
