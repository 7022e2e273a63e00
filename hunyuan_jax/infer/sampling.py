"""From logits to the next token: the official processors in the official order (docs/model.md,
Generation).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Processors(NamedTuple):
    """Values of the logits processors; None (top_k: 0) turns one off.

    Without a temperature the choice is greedy, and top_k and top_p have no effect.  All values but
    top_k may be traced.
    """

    temperature: float | jax.Array | None = None
    top_k: int = 0
    top_p: float | jax.Array | None = None
    repetition_penalty: float | jax.Array | None = None


def process(logits_BV: jax.Array, seen_BV: jax.Array | None, processors: Processors) -> jax.Array:
    """Repetition penalty, temperature, top-k, top-p, in this order; excluded tokens become -inf.
    float32 [B, V].

    Args:
      seen_BV: bool, whether the token occurs in the prompt or the text so far; None without a
        penalty.
    """
    if processors.repetition_penalty is not None:
        penalty = processors.repetition_penalty
        penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    if processors.temperature is None:
        return logits_BV
    logits_BV = logits_BV / processors.temperature
    sorted_BV = None
    if 0 < processors.top_k < logits_BV.shape[-1]:
        sorted_BV = jax.lax.top_k(logits_BV, processors.top_k)[0]
        logits_BV = jnp.where(logits_BV < sorted_BV[:, -1:], -jnp.inf, logits_BV)
    if processors.top_p is not None:
        # Keep the smallest set of most likely tokens whose probability reaches top_p; at least
        # one.  What top-k left is sorted already, but for tokens that tie with the last of them:
        # they have its logit, and share its fate.
        sorted_BV = jnp.sort(logits_BV, axis=-1)[:, ::-1] if sorted_BV is None else sorted_BV
        p_BV = jnp.exp(sorted_BV - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True))
        mass_before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
        threshold_B1 = jnp.min(
            jnp.where(mass_before_BV < processors.top_p, sorted_BV, jnp.inf),
            axis=-1,
            keepdims=True,
        )
        # A top_p that float32 rounds to 0 keeps the most likely one as well.
        threshold_B1 = jnp.minimum(threshold_B1, sorted_BV[:, :1])
        logits_BV = jnp.where(logits_BV < threshold_B1, -jnp.inf, logits_BV)
    return logits_BV


def next_token(
    logits_BV: jax.Array, seen_BV: jax.Array | None, processors: Processors, key_B: jax.Array
) -> jax.Array:
    """int32 [B]: the most likely token if greedy, else a draw, by a typed key for each row."""
    logits_BV = process(logits_BV, seen_BV, processors)
    if processors.temperature is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)
