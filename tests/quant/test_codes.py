"""Methods of quantisation: what they store, and EasyQuant's rule step by step."""

import numpy as np
import pytest

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.quant import codes, easyquant


def heavy_tailed(shape, seed=0):
    """Like a layer's weights: most small, a few large."""
    return (np.random.default_rng(seed).standard_t(5, shape) * 0.02).astype(np.float32)


def error(w_OI, found):
    return float(((codes.dequantized(found) - w_OI) ** 2).sum())


def test_a_row_of_zeros_and_a_constant_matrix():
    w_OI = np.zeros((4, 16), np.float32)
    w_OI[1] = 0.5
    for method in codes.METHODS:
        for matrix in (w_OI, np.zeros_like(w_OI), np.full_like(w_OI, -0.25)):
            found = codes.quantize("w", matrix, method, 8)
            assert (found.scale > 0).all()
            np.testing.assert_allclose(codes.dequantized(found), matrix, rtol=0.01, atol=1e-7)


@pytest.mark.parametrize("method", codes.METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(method, bad):
    w_OI = np.ones((4, 16), np.float32)
    w_OI[2, 3] = bad
    with pytest.raises(ConfigError, match="layers.3.up_proj holds NaN or infinity"):
        codes.quantize("layers.3.up_proj", w_OI, method)


def test_a_rounded_entry_is_within_half_a_step():
    w_OI = heavy_tailed((8, 256))
    for method, group in (("int8", 256), ("int4", 128), ("int4", 32)):
        found = codes.quantize("w", w_OI, method, group)
        step_OI = np.repeat(found.scale, 256 // found.scale.shape[1], axis=1)
        assert (np.abs(codes.dequantized(found) - w_OI) <= 0.5001 * step_OI).all()
    assert codes.quantize("w", w_OI, "int4", 128).scale.shape == (8, 2)


def test_outliers_are_exact_and_few():
    w_OI = heavy_tailed((64, 256)).astype(np.float32)
    found = codes.quantize("w", w_OI, "easyquant")
    is_outlier = np.abs(w_OI - w_OI.mean()) >= 3 * w_OI.std()
    np.testing.assert_array_equal(found.position, np.flatnonzero(is_outlier))
    assert 0 < len(found.position) < 0.03 * w_OI.size
    kept = codes.dequantized(found)[is_outlier]
    np.testing.assert_array_equal(kept, found.value.astype(np.float32))
    assert (found.values[is_outlier] == 0).all()


def test_both_steps_are_better_than_one():
    """The paper's order: round to nearest, one of the steps, both."""
    w_OI = heavy_tailed((64, 512))
    of = {
        (n, steps): error(w_OI, codes.Codes(*easyquant.easyquant_int4(w_OI, n, steps)))
        for n in (np.inf, 3.0)
        for steps in (0, 100)
    }
    assert of[3.0, 100] < of[3.0, 0] < of[np.inf, 0]
    assert of[3.0, 100] < of[np.inf, 100] < of[np.inf, 0]
    nearest = codes.Codes(*easyquant.easyquant_int4(w_OI, np.inf, 0))
    grouped = codes.int4(w_OI, 512)
    np.testing.assert_array_equal(nearest.values, grouped.values)


def test_the_range_is_that_of_the_paper_s_rule():
    """Adam on the error of every entry finds the same range as our sums over bins."""
    w_OI = heavy_tailed((12, 384))
    range_O = np.abs(w_OI).max(axis=1)
    most = 7
    at, m, v, best_O, least_O = range_O.copy(), 0.0, 0.0, range_O, np.full(12, np.inf)

    def measured(at):
        scale_O1 = at[:, None] / most
        q_OI = np.clip(np.rint(w_OI / scale_O1), -most, most)
        difference = scale_O1 * q_OI - w_OI
        return (difference**2).sum(1), 2 * (difference * q_OI).sum(1)

    for step in range(1, 102):
        error_O, g = measured(at)
        best_O = np.where(error_O < least_O, at, best_O)
        least_O = np.minimum(error_O, least_O)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        at = at - range_O / 64 * (m / (1 - 0.9**step)) / np.sqrt(v / (1 - 0.999**step))
    found = easyquant.easyquant_int4(w_OI, np.inf, 100)[1][:, 0] * most
    np.testing.assert_allclose(measured(found)[0], least_O, rtol=2e-3)
    assert least_O.sum() < 0.75 * measured(range_O)[0].sum()
