"""Expert matmuls on Hopper (Mosaic GPU): numbers and races in the interpreter, lowering at the
real sizes; nothing runs on a GPU.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import testing
from pallas_kernels.expert_matmul import gpu

BF16 = jnp.bfloat16
NUM_EXPERTS, NUM_ROWS, DIM, FFN = (
    3,
    256,
    256,
    320,
)  # 320 columns: the last tile overlaps its neighbour
# Two sources of 128 rows: a full tile, a tile with a few rows, an empty one before one that ends
# inside a block of 64, and no rows at all.
COUNTS = [[128, 5], [0, 77], [0, 0]]


def simulation(monkeypatch, cluster=2):
    """Settings that simulate a GPU on the CPU, look for races, and fill shared memory with NaN."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("the GPU interpreter of jax 0.10 cannot run these kernels")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(gpu, "HOPPER", gpu.Config(cluster=cluster, clusters=3))
    return {"device_kind": "NVIDIA H200", "interpret": plgpu.InterpretGPUParams(detect_races=True)}


@pytest.fixture
def simulated(monkeypatch):
    return simulation(monkeypatch)


class Example:
    """Random operands with NaN in the rows that are not valid, and the same in float32 with zeros
    there.
    """

    def __init__(self):
        self.rng = np.random.default_rng()
        self.count = jnp.asarray(COUNTS, jnp.int32)
        self.is_valid = (np.arange(NUM_ROWS // 2) < np.asarray(COUNTS)[..., None]).reshape(
            NUM_EXPERTS, NUM_ROWS
        )
        row_weight = self.rng.normal(size=(NUM_EXPERTS, NUM_ROWS))
        self.row_weight = jnp.asarray(np.where(self.is_valid, row_weight, np.nan), jnp.float32)
        self.row_weight32 = np.where(self.is_valid, row_weight, 0)[..., None].astype(np.float32)

    def rows(self, width):
        values = self.rng.normal(size=(NUM_EXPERTS, NUM_ROWS, width))
        return self._pair(np.where(self.is_valid[..., None], values, np.nan))

    def weight(self, left, right):
        return self._pair(self.rng.normal(size=(NUM_EXPERTS, left, right)) * left**-0.5)

    @staticmethod
    def _pair(values):
        values = jnp.asarray(values, BF16)
        return values, np.nan_to_num(np.asarray(values, np.float32))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("save", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gate_up(simulated, save):
    example = Example()
    (x, x32), (gate, gate32), (up, up32) = (
        example.rows(DIM),
        example.weight(DIM, FFN),
        example.weight(DIM, FFN),
    )
    actual = gpu.gate_up(x, gate, up, example.row_weight, example.count, save=save, **simulated)
    gate32, up32 = x32 @ gate32, x32 @ up32
    expected = example.row_weight32 * gate32 * sigmoid(gate32) * up32, gate32, up32
    assert (actual[1] is None) == (actual[2] is None) == (not save)
    assert all(y.dtype == BF16 for y in actual if y is not None)
    testing.assert_close(actual[: 3 if save else 1], expected[: 3 if save else 1], BF16)
    assert not np.asarray(actual[0], np.float32)[~example.is_valid].any()


@pytest.mark.parametrize("cluster", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_matmul(monkeypatch, cluster):
    example = Example()
    (x, x32), (w, w32) = example.rows(DIM), example.weight(DIM, FFN)
    actual = gpu.matmul(x, w, example.count, **simulation(monkeypatch, cluster))
    testing.assert_close(actual, x32 @ w32, BF16)
    assert not np.asarray(actual, np.float32)[~example.is_valid].any()


def test_gated_gradient(simulated):
    example = Example()
    (dy, dy32), (down, down32) = example.rows(DIM), example.weight(FFN, DIM)
    (gate, gate32), (up, up32) = example.rows(FFN), example.rows(FFN)
    actual = gpu.gated_gradient(dy, down, gate, up, example.row_weight, example.count, **simulated)

    def hidden(gate_eCF, up_eCF, row_weight_eC):
        return row_weight_eC * jax.nn.silu(gate_eCF) * up_eCF

    h, pullback = jax.vjp(hidden, gate32, up32, example.row_weight32)
    dgate, dup, drow_weight = pullback(jnp.asarray(dy32 @ down32.swapaxes(1, 2)))
    testing.assert_close(actual, (h, dgate, dup, drow_weight[..., 0]), BF16)
    assert actual[3].dtype == jnp.float32
    assert not any(np.asarray(y, np.float32)[~example.is_valid].any() for y in actual)


@pytest.mark.slow  # the same structure as test_matmul
def test_input_gradient(simulated):
    example = Example()
    (dgate, dgate32), (dup, dup32) = example.rows(FFN), example.rows(FFN)
    (gate, gate32), (up, up32) = example.weight(DIM, FFN), example.weight(DIM, FFN)
    actual = gpu.input_gradient(dgate, gate, dup, up, example.count, **simulated)
    testing.assert_close(
        actual, dgate32 @ gate32.swapaxes(1, 2) + dup32 @ up32.swapaxes(1, 2), BF16
    )
    assert not np.asarray(actual, np.float32)[~example.is_valid].any()


@pytest.mark.parametrize(
    ("left", "right", "dtype"),
    [pytest.param(DIM, FFN, jnp.float32, marks=pytest.mark.slow), (FFN, DIM, BF16)],
)
def test_weight_gradient(simulated, left, right, dtype):
    example = Example()
    (x, x32), (dy, dy32) = example.rows(left), example.rows(right)
    actual = gpu.weight_gradient(x, dy, example.count, dtype, **simulated)
    assert actual.dtype == dtype
    testing.assert_close(actual, x32.swapaxes(1, 2) @ dy32, dtype)


@pytest.mark.slow
def test_no_rows_at_all(simulated):
    example = Example()
    (x, _), (w, _) = example.rows(DIM), example.weight(DIM, DIM)
    none = jnp.zeros_like(example.count)
    nan = jnp.full_like(x, jnp.nan)
    assert not np.asarray(gpu.matmul(nan, w, none, **simulated), np.float32).any()
    assert not np.asarray(gpu.weight_gradient(nan, nan, none, jnp.float32, **simulated)).any()


def test_tiles_with_rows_come_first():
    rng = np.random.default_rng()
    is_valid = rng.random((3, 1024)) < 0.002
    is_valid[1] = False
    tiles, num_groups = gpu._row_tiles(jnp.asarray(is_valid, jnp.float32), 2)
    has_rows = is_valid.reshape(-1, 128).any(1)[np.asarray(tiles)].reshape(-1, 2)
    assert sorted(np.asarray(tiles)) == list(range(24))
    assert has_rows.any(1).tolist() == [i < num_groups[0] for i in range(12)]
    experts = np.asarray(tiles).reshape(-1, 2) // 8
    assert (experts[:, 0] == experts[:, 1]).all()
    # No more clusters than the rows of each expert need.
    assert num_groups[0] == sum(
        -(-is_valid[e].reshape(-1, 128).any(1).sum() // 2) for e in range(3)
    )


def test_blocks_full_then_partial_then_empty():
    valid_en = [[0, 64, 5, 64], [0, 0, 0, 1]]
    is_valid = np.stack([np.concatenate([np.arange(64) < n for n in row]) for row in valid_en])
    blocks, full, some = gpu._row_blocks(jnp.asarray(is_valid, jnp.float32))
    assert np.take_along_axis(np.asarray(valid_en), np.asarray(blocks), 1).tolist() == [
        [64, 64, 5, 0],
        [1, 0, 0, 0],
    ]
    assert full.tolist() == [2, 0]
    assert some.tolist() == [3, 1]


@pytest.mark.parametrize("num_rows", [1, 7, 8, 16, 19])
def test_tile_order_visits_every_tile_once(num_rows):
    row, column = jax.vmap(lambda i: gpu._grouped(i, jnp.int32(num_rows), 5, 8))(
        jnp.arange(num_rows * 5, dtype=jnp.int32)
    )
    assert sorted(zip(row.tolist(), column.tolist(), strict=True)) == list(
        itertools.product(range(num_rows), range(5))
    )


def shapes(experts, rows, dim, ffn, sources):
    return {
        "x": jax.ShapeDtypeStruct((experts, rows, dim), BF16),
        "h": jax.ShapeDtypeStruct((experts, rows, ffn), BF16),
        "w_in": jax.ShapeDtypeStruct((experts, dim, ffn), BF16),
        "w_out": jax.ShapeDtypeStruct((experts, ffn, dim), BF16),
        "row_weight": jax.ShapeDtypeStruct((experts, rows), jnp.float32),
        "count": jax.ShapeDtypeStruct((experts, sources), jnp.int32),
    }


OPERATIONS = {
    "gate_up": (
        lambda *args, **options: gpu.gate_up(*args, save=False, **options)[0],
        ["x", "w_in", "w_in", "row_weight", "count"],
    ),
    "gate_up_save": (
        lambda *args, **options: gpu.gate_up(*args, save=True, **options),
        ["x", "w_in", "w_in", "row_weight", "count"],
    ),
    "matmul": (gpu.matmul, ["h", "w_out", "count"]),
    "gated_gradient": (gpu.gated_gradient, ["x", "w_out", "h", "h", "row_weight", "count"]),
    "input_gradient": (gpu.input_gradient, ["h", "w_in", "h", "w_in", "count"]),
    "weight_gradient": (
        lambda *args, **options: gpu.weight_gradient(*args, BF16, **options),
        ["x", "h", "count"],
    ),
    "weight_gradient_float32": (
        lambda *args, **options: gpu.weight_gradient(*args, jnp.float32, **options),
        ["h", "x", "count"],
    ),
}


@pytest.mark.cases(6)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("size", [(1, 4096, 6400, 18304, 16), (4, 256, 256, 320, 2)], ids=str)
def test_lowers_for_h200(operation, size):
    function, operands = OPERATIONS[operation]
    function = functools.partial(function, device_kind="NVIDIA H200")
    text = testing.lower_for_gpu(function, *(shapes(*size)[name] for name in operands))
    assert text.count("custom_call @mosaic_gpu") == 1  # one kernel


def test_refusals():
    good = ("NVIDIA H200", (1, 4096, 6400), (1, 6400, 18304), BF16, False)
    assert gpu.refuse(*good) is None
    assert "family NVIDIA" in gpu.refuse("TPU v5", *good[1:])
    assert "Hopper" in gpu.refuse("NVIDIA A100-SXM4-40GB", *good[1:])
    assert "bfloat16" in gpu.refuse(*good[:3], jnp.float32, False)
    assert "quantised" in gpu.refuse(*good[:4], True)
    assert "256, not 4000" in gpu.refuse(good[0], (1, 4000, 6400), *good[2:])
    assert "not 6432" in gpu.refuse(good[0], (1, 4096, 6432), (1, 6432, 18304), BF16, False)
    assert "not 192" in gpu.refuse(good[0], (1, 4096, 6400), (1, 6400, 192), BF16, False)
