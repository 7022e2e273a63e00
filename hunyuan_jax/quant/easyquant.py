"""EasyQuant (arXiv 2403.02775): four bits an entry without any data.

Outliers, entries further than n standard deviations from the mean of their matrix, are kept
exactly.  The range of each output's other entries is then optimised: gradient descent (Adam) on
the squared error, whose gradient treats the rounded codes as constants.

The error and its gradient for a range depend on how many entries lie beyond each of the seven
thresholds between codes, and on their sum.  So each row becomes a histogram once, of at most 1024
bins up to its range at the beginning, and a step looks up seven sums a row instead of passing over
the matrix.  An entry counts as the middle of its bin: to 1/290 of the distance of two codes, or
1/145 in rows of less than 1024 entries, which have 512 bins.
Letters: O outputs, I inputs, H bins, J = 7 thresholds.
"""

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
_MAX_BINS = 1024
# Rows that are worked on at a time: they stay in cache.
_BLOCK_BYTES = 1 << 19
# Rows whose ranges are searched for at a time.  They divide the usual widths; the CPU time of 256
# was higher.
_ROWS = 192


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
    num_bins = _MAX_BINS if num_in >= _MAX_BINS else _MAX_BINS // 2
    count_OH = np.empty((num_out, num_bins), np.int32)
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
            count_OH[part] = _histogram(size, range_O[part], num_bins)
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
      count_OH: int32, how many entries of a row lie in each bin of [0, range], the highest first.
      range_O: float32, where the search begins.
      num_steps: of Adam.
    """
    # A bin's middle in halves of a bin: the sums are exact, and integers add up faster.
    middle_H = np.arange(2 * count_OH.shape[1] - 1, 0, -2, dtype=np.int32)
    found = []
    for first in range(0, len(count_OH), _ROWS):
        count_oH = _of_rows(count_OH[first : first + _ROWS])
        range_o = np.maximum(_of_rows(range_O[first : first + _ROWS]), 1e-30)
        sums = (_sums_of_first(count_oH), _sums_of_first(count_oH * middle_H))
        found.append(_search(*sums, range_o, num_steps))
    return np.concatenate(found)[: len(count_OH)]


def _of_rows(a):
    """a with zeros behind, so that one program searches for matrices of all sizes."""
    return a if len(a) == _ROWS else np.pad(a, [(0, _ROWS - len(a))] + [(0, 0)] * (a.ndim - 1))


def _blocks(w_OI):
    size = max(1, _BLOCK_BYTES // max(1, w_OI[:1].nbytes))
    return [slice(i, min(i + size, len(w_OI))) for i in range(0, len(w_OI), size)]


def _histogram(size_oI, range_o, num_bins):
    """int [o, H] of some rows, the highest bin first."""
    factor_o = (num_bins - 1e-3) / np.maximum(range_o, 1e-30)
    bin_oI = (size_oI * factor_o[:, None]).astype(np.int32)
    num_all = len(size_oI) * num_bins
    last_o1 = np.arange(num_bins - 1, num_all, num_bins, dtype=np.int32)[:, None]
    place_oI = np.subtract(last_o1, bin_oI, out=bin_oI)
    return np.bincount(place_oI.reshape(-1), minlength=num_all).reshape(-1, num_bins)


def _sums_of_first(values_OH):
    """The sum of the first 0, 1, ... H values, int32 [O, H + 1]."""
    sums_OH1 = np.empty((len(values_OH), values_OH.shape[1] + 1), np.int32)
    sums_OH1[:, 0] = 0
    np.cumsum(values_OH, axis=1, out=sums_OH1[:, 1:])
    return sums_OH1


@jax.jit
def _search(count_OH1, sum_OH1, range_O, num_steps):
    """count_OH1, sum_OH1: entries in the highest bins, and their sum in halves of a bin."""
    num_bins = count_OH1.shape[1] - 1
    code_J1 = jnp.arange(_MOST, dtype=jnp.float32)[:, None]
    unit_O = range_O / num_bins
    # Flat, so that XLA:CPU looks up with one number; rows last, so that the rest is vectorised.
    last_O = jnp.arange(1, len(range_O) + 1) * (num_bins + 1) - 1
    flat_count, flat_sum = count_OH1.reshape(-1), sum_OH1.reshape(-1)

    def measure(now_O):
        """(squared error up to a constant, its gradient by the scale)."""
        scale_O = now_O / _MOST
        threshold_JO = (code_J1 + 0.5) * scale_O
        # The first bin whose middle is not below the threshold.
        bin_JO = jnp.clip(jnp.ceil(threshold_JO / unit_O - 0.5), 0, num_bins)
        place_JO = last_O - bin_JO.astype(jnp.int32)
        count_JO, sum_JO = (
            flat.at[place_JO].get(mode="promise_in_bounds").astype(jnp.float32)
            for flat in (flat_count, flat_sum)
        )
        # A code is the number of thresholds below; its square is a sum of odd numbers.
        of_squares_O = ((2 * code_J1 + 1) * count_JO).sum(0)
        of_products_O = sum_JO.sum(0) * unit_O / 2
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
    # One more, which measures where the last step has moved.
    return jax.lax.fori_loop(0, num_steps + 1, step, carry)[3]
