"""The statistical top-k: the normal quantile, how many entries it keeps, its invariance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.layers.statistical_top_k import quantile, soft_top_k


def test_quantile():
    np.testing.assert_allclose(float(quantile(0.08)), 1.40507, atol=1e-5)
    np.testing.assert_allclose(float(quantile(0.5)), 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("num_entries", "k", "deviation"), [(13_824, 1106, 21.0), (4096, 256, 10.0), (256, 20, 2.8)]
)
def test_how_many_entries_of_a_normal_distribution_are_kept(num_entries, k, deviation):
    """Mean over many draws within three standard errors of k, spread as computed for a normal
    distribution whose mean and deviation are estimated.
    """
    x_Mn = 0.3 + 1.7 * np.random.default_rng(0).normal(size=(400, num_entries))
    kept_M = np.asarray((soft_top_k(jnp.asarray(x_Mn, jnp.float32), k / num_entries) > 0).sum(-1))
    assert abs(kept_M.mean() - k) < 3 * deviation / np.sqrt(len(kept_M)) + 0.005 * k
    assert kept_M.std() == pytest.approx(deviation, rel=0.15)


def test_scale_and_shift():
    x_Mn = jnp.asarray(np.random.default_rng(1).normal(size=(4, 512)), jnp.float32)
    np.testing.assert_allclose(
        soft_top_k(2.5 * x_Mn + 3.0, 0.1), 2.5 * soft_top_k(x_Mn, 0.1), atol=1e-5
    )


def test_gradient_against_differences():
    rng = np.random.default_rng(2)
    x_n, weight_n, direction_n = (jnp.asarray(rng.normal(size=64), jnp.float32) for _ in range(3))

    def loss(x_n):
        return jnp.sum(weight_n * soft_top_k(x_n, 0.25))

    step = 1e-3
    difference = (loss(x_n + step * direction_n) - loss(x_n - step * direction_n)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(x_n) @ direction_n, difference, rtol=1e-2)


def test_equal_entries_have_a_gradient():
    gradient = jax.grad(lambda x_n: soft_top_k(x_n, 0.1).sum())(jnp.ones(16))
    assert np.isfinite(gradient).all()
