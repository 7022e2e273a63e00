"""From logits to the next token, with the official processors in the official order (specification section 6)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How the next token is drawn; hashable, so that each setting is compiled once.

    temperature 0 is greedy (top_k and top_p then have no effect); top_k 0 and top_p 1.0 are off; repetition_penalty 1.0 is off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


def process(logits_BV: jax.Array, seen_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Repetition penalty, temperature, top-k, top-p, in this order; excluded tokens become -inf.  float32 [B, V].

    Args:
      seen_BV: bool, whether the token occurs in the prompt or the text so far.
    """
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    if sampling.temperature == 0.0:
        return logits_BV
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1.0:
        # Keep the smallest set of most likely tokens whose probability reaches top_p; at least one.
        sorted_BV = jnp.sort(logits_BV, axis=-1)[:, ::-1]
        mass_before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BV, axis=-1)
        threshold_B1 = jnp.min(jnp.where(mass_before_BV < sampling.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < threshold_B1, -jnp.inf, logits_BV)
    return logits_BV


def next_token(logits_BV: jax.Array, seen_BV: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """int32 [B]: the most likely token if greedy, else a draw."""
    logits_BV = process(logits_BV, seen_BV, sampling)
    if sampling.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)
