"""Statistical top-k (Spark Transformer, arXiv 2506.06644, section 3.1): the k largest of many
entries, up to chance, from their mean and standard deviation; no sort, and differentiable.

Of d entries of a normal distribution about k lie above mean + std * Q(1 - k / d), where Q is the
normal quantile: 1104 +- 21 of 13824 for k = 1106.
Letters: ... any leading dims, n entries.
"""

import jax
import jax.numpy as jnp


def quantile(share: jax.Array | float) -> jax.Array:
    """Q(1 - share), float32: 1.40507 for a share of 0.08; infinite for shares of 0 and 1."""
    return -jax.scipy.special.ndtri(jnp.asarray(share, jnp.float32))


def threshold(
    sum_: jax.Array, sum_of_squares: jax.Array, count: jax.Array | float, share: jax.Array | float
) -> jax.Array:
    """mean + std * Q(1 - share) of `count` entries with these sums; std divides by `count`.

    Args:
      sum_, sum_of_squares: float32, of one shape.
      count: entries that were summed, at least 1.
      share: of the entries to lie above the threshold, in (0, 1).
    """
    mean = sum_ / count
    # A difference of squares may come out just below 0; the square root of 0 has no gradient.
    variance = jnp.maximum(sum_of_squares / count - mean * mean, 1e-12)
    return mean + jnp.sqrt(variance) * quantile(share)


def soft_top_k(x_n: jax.Array, share: float) -> jax.Array:
    """max(x - threshold, 0) over the last dim, float32; about `share` of the entries are not 0.

    For a > 0, soft_top_k(a * x + b) is a * soft_top_k(x).
    """
    x_n = x_n.astype(jnp.float32)
    sums = (x_n.sum(-1, keepdims=True), (x_n * x_n).sum(-1, keepdims=True))
    return jnp.maximum(x_n - threshold(*sums, x_n.shape[-1], share), 0.0)
