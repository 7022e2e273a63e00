"""Limits and adjustments of logits against numpy; each row by its own settings."""

import jax
import numpy as np
import pytest

from hunyuan_jax.infer import sampling
from support.sampling import row_settings

RNG = np.random.default_rng(0)
V = 200
LOGITS = RNG.normal(0, 3, (8, V)).astype(np.float32)


def kept(x_V, top_k, top_p, min_p):
    """Which tokens numpy keeps, in float64."""
    order, x_V = np.argsort(-x_V, kind="stable"), x_V.astype(np.float64)
    num = top_k if 0 < top_k < V else V
    is_kept = x_V >= x_V[order[num - 1]]
    p_V = np.where(is_kept, np.exp(x_V - x_V.max()), 0)
    p_V /= p_V.sum()
    before = np.cumsum(p_V[order]) - p_V[order]
    last = order[np.flatnonzero((before < top_p) & is_kept[order])[-1]]
    is_kept &= x_V >= x_V[last]
    return is_kept & (np.exp(x_V - x_V.max()) >= min_p)


CASES = {
    "temperature": [0.5, 1.0, 1.0, 2.0, 1.0, 0.7, 1.0, 1.0],
    "top_k": [0, 5, 100, 0, 20, 300, 65, 1],
    "top_p": [1.0, 0.9, 0.8, 0.5, 1.0, 0.99, 1.0, 0.3],
    "min_p": [0.0, 0.0, 0.0, 0.05, 0.02, 0.0, 0.1, 0.0],
}


def test_top_k_top_p_and_min_p_keep_what_numpy_keeps():
    rows = row_settings(8, **{name: np.array(values) for name, values in CASES.items()})
    found_BV = np.asarray(jax.jit(sampling.truncated)(LOGITS, rows))
    for i in range(8):
        temperature, *limits = (CASES[name][i] for name in CASES)
        x_V = LOGITS[i] / np.float32(temperature)
        np.testing.assert_array_equal(np.isfinite(found_BV[i]), kept(x_V, *limits), str(i))
        is_kept_V = np.isfinite(found_BV[i])
        np.testing.assert_allclose(found_BV[i][is_kept_V], x_V[is_kept_V], rtol=1e-6)


@pytest.mark.parametrize("row", range(8))
def test_a_row_keeps_the_same_alone(row):
    together = row_settings(8, **{name: np.array(values) for name, values in CASES.items()})
    own = {name: np.array(values[row : row + 1]) for name, values in CASES.items()}
    alone = row_settings(1, **own)
    np.testing.assert_array_equal(
        jax.jit(sampling.truncated)(LOGITS, together)[row],
        jax.jit(sampling.truncated)(LOGITS[row : row + 1], alone)[0],
    )


def test_draws_have_the_distribution_of_the_kept_logits():
    num = 20_000
    rows = row_settings(num, seed=3, num_drawn=np.arange(num), top_k=4)
    drawn = np.asarray(sampling.draw(np.broadcast_to(LOGITS[:1], (num, V)), rows))
    best = np.argsort(-LOGITS[0])[:4]
    p = np.exp(LOGITS[0][best] - LOGITS[0].max())
    share = np.array([(drawn == token).mean() for token in best])
    np.testing.assert_allclose(share, p / p.sum(), atol=4 * 0.5 / num**0.5)
