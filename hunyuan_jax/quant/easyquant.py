"""EasyQuant (arXiv 2403.02775): four bits an entry without any data.

Outliers, entries further than n standard deviations from the mean of their matrix, are kept
exactly.  The range of each output's other entries is then optimised: gradient descent (Adam) on
the squared error, whose gradient treats the rounded codes as constants.

The error and its gradient for a range depend on how many entries lie beyond each of the seven
thresholds between codes, and on their sum.  So each row becomes a histogram once, of 1024 bins up
to its range at the beginning, and a step looks up seven sums a row instead of passing over the
matrix.  An entry counts as the middle of its bin: to 1/290 of the distance of two codes.
Letters: O outputs, I inputs, H bins, J = 7 thresholds.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

_MOST = 7  # of a code's size; 8 would fit on one side only
NUM_SIGMA = 3.0
NUM_STEPS = 50  # the range moves no more after them (docs/results/quantization.md)
# Of the range at the beginning: the paper's 1e-3, for a range of 0.078 (its table 9).
_RATE = 1 / 64
_BETA_1, _BETA_2, _EPS = 0.9, 0.999, 1e-12
_BINS = 1024
# Rows that are worked on at a time: they stay in cache.
_BLOCK_BYTES = 1 << 19


def easyquant_int4(
    w_OI: np.ndarray, num_sigma: float = NUM_SIGMA, num_steps: int = NUM_STEPS
) -> tuple[np.ndarray, np.ndarray, int, np.ndarray | None, np.ndarray | None]:
    """(codes int8 [O, I], scale float32 [O, 1], 4, positions and values of the outliers).

    Args:
      w_OI: float32.
      num_sigma: an entry so many standard deviations from the mean is an outlier; infinity keeps
        none exactly.
      num_steps: of the optimisation; 0 takes the largest entry as the range.
    """
    bound, is_isolating = np.inf, np.isfinite(num_sigma)
    if is_isolating:
        flat = w_OI.reshape(-1)
        mean = flat.mean()
        std = np.sqrt(max(np.dot(flat, flat) / flat.size - float(mean) ** 2, 0.0))
        bound = max(num_sigma * std, 1e-30)  # an entry equal to the mean is none
    num_out, num_in = w_OI.shape
    normal_OI, range_O = np.empty_like(w_OI), np.empty(num_out, np.float32)
    count_OH = np.empty((num_out, _BINS), np.float32)
    positions = []
    for part in _blocks(w_OI):
        normal = normal_OI[part]
        normal[...] = w_OI[part]
        if is_isolating:
            found = np.flatnonzero(np.abs(normal - mean) >= bound)
            positions.append(found + part.start * num_in)
            normal.reshape(-1)[found] = 0
        size = np.abs(normal)
        range_O[part] = size.max(axis=1)
        if num_steps:
            count_OH[part] = _histogram(size, range_O[part])
    if num_steps:
        range_O = optimized_range(count_OH, range_O, num_steps)
    scale_O1 = np.where(range_O > 0, range_O / _MOST, 1.0).astype(np.float32)[:, None]
    codes_OI = np.empty(w_OI.shape, np.int8)
    for part in _blocks(w_OI):
        normal = normal_OI[part]
        normal /= scale_O1[part]
        np.rint(normal, out=normal)
        np.clip(normal, -_MOST, _MOST, out=normal)
        codes_OI[part] = normal
    if not is_isolating:
        return codes_OI, scale_O1, 4, None, None
    position = np.concatenate(positions).astype(np.int32)
    value = w_OI.reshape(-1)[position].astype(ml_dtypes.bfloat16)
    return codes_OI, scale_O1, 4, position, value


def optimized_range(count_OH: np.ndarray, range_O: np.ndarray, num_steps: int) -> np.ndarray:
    """The range of each row that has shown the least squared error, float32 [O].

    Args:
      count_OH: float32, how many entries of a row lie in each bin of [0, range].
      range_O: float32, where the search begins.
      num_steps: of Adam.
    """
    return np.asarray(_search(count_OH, np.maximum(range_O, 1e-30), num_steps))


def _blocks(w_OI):
    size = max(1, _BLOCK_BYTES // max(1, w_OI[:1].nbytes))
    return [slice(i, min(i + size, len(w_OI))) for i in range(0, len(w_OI), size)]


def _histogram(size_oI, range_o):
    """float32 [o, H] of some rows."""
    factor_o = (_BINS - 1e-3) / np.maximum(range_o, 1e-30)
    bin_oI = (size_oI * factor_o[:, None]).astype(np.int32)
    bin_oI += np.arange(0, len(size_oI) * _BINS, _BINS, dtype=np.int32)[:, None]
    return np.bincount(bin_oI.reshape(-1), minlength=len(size_oI) * _BINS).reshape(-1, _BINS)


@functools.partial(jax.jit, static_argnames="num_steps")
def _search(count_OH, range_O, num_steps):
    middle_H = (jnp.arange(_BINS, dtype=jnp.float32) + 0.5) / _BINS
    # From bin h on: how many entries, and their sum in units of the range.
    sums_OHs = jnp.stack([count_OH, count_OH * middle_H], axis=-1)
    zeros_O1s = jnp.zeros((len(range_O), 1, 2))
    total_OHs = jnp.cumsum(sums_OHs[:, ::-1], axis=1)[:, ::-1]
    total_OHs = jnp.concatenate([total_OHs, zeros_O1s], axis=1)
    code_J = jnp.arange(_MOST, dtype=jnp.float32)
    unit_O = range_O / _BINS

    def measure(now_O):
        """(squared error up to a constant, its gradient by the scale)."""
        scale_O = now_O / _MOST
        threshold_OJ = (code_J + 0.5) * scale_O[:, None]
        # The first bin whose middle is not below the threshold.
        bin_OJ = jnp.clip(jnp.ceil(threshold_OJ / unit_O[:, None] - 0.5), 0, _BINS)
        beyond_OJs = jnp.take_along_axis(total_OHs, bin_OJ.astype(jnp.int32)[..., None], axis=1)
        # A code is the number of thresholds below; its square is a sum of odd numbers.
        of_squares_O = ((2 * code_J + 1) * beyond_OJs[..., 0]).sum(1)
        of_products_O = beyond_OJs[..., 1].sum(1) * range_O
        error_O = scale_O * (scale_O * of_squares_O - 2 * of_products_O)
        return error_O, 2 * (scale_O * of_squares_O - of_products_O)

    rate_O = _RATE * range_O

    def step(i, carry):
        now_O, m_O, v_O, best_O, least_O = carry
        error_O, g_O = measure(now_O)
        num_done = i.astype(jnp.float32) + 1
        is_better_O = error_O < least_O
        best_O, least_O = (
            jnp.where(is_better_O, new, old) for new, old in ((now_O, best_O), (error_O, least_O))
        )
        m_O, v_O = _BETA_1 * m_O + (1 - _BETA_1) * g_O, _BETA_2 * v_O + (1 - _BETA_2) * g_O * g_O
        m_hat_O, v_hat_O = m_O / (1 - _BETA_1**num_done), v_O / (1 - _BETA_2**num_done)
        moved_O = now_O - rate_O * m_hat_O / (jnp.sqrt(v_hat_O) + _EPS)
        return jnp.maximum(moved_O, rate_O), m_O, v_O, best_O, least_O

    zeros_O = jnp.zeros_like(range_O)
    carry = (range_O, zeros_O, zeros_O, range_O, zeros_O + jnp.inf)
    now_O, *_, best_O, least_O = jax.lax.fori_loop(0, num_steps, step, carry)
    return jnp.where(measure(now_O)[0] < least_O, now_O, best_O)
