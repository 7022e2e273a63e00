"""Products with a `QuantArray`, on one device and on a mesh, are those of its numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.parallel import island, rules
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.params.abstract import ParamSpec
from hunyuan_jax.params.quantized import assembled
from hunyuan_jax.params.roles import Role
from hunyuan_jax.quant import codes
from hunyuan_jax.quant.array import dequantized, product
from support.models import assert_close, fast_jit, mesh_of

# (shape, dims, number of input dims)
PARAMS = [
    ((2, 64, 4, 16), ("layers", "embed", "heads", "head_dim"), 1),
    ((2, 4, 16, 64), ("layers", "heads", "head_dim", "embed"), 2),
    ((2, 64, 96), ("layers", "embed", "ffn"), 1),
    ((2, 96, 64), ("layers", "ffn", "embed"), 1),
]


def quantized(mesh, shape, dims, num_in, method, group=32):
    """(a parameter of two layers, the numbers it stands for [2, I, O])."""
    spec = ParamSpec(
        shape, np.float32, dims, Role.MATRIX, rules.stored_sharding(mesh, dims, shape)
    )
    rng = np.random.default_rng(0)
    num_inputs = int(np.prod(shape[1 : 1 + num_in]))
    matrices = {
        (i,): codes.quantize(
            "w", rng.standard_t(4, (int(np.prod(shape[1:])) // num_inputs, num_inputs)), method,
            group,
        )
        for i in range(2)
    }  # fmt: skip
    dense = np.stack([codes.dequantized(matrix).T for matrix in matrices.values()])
    return assembled("w", spec, matrices, is_transposed=True), dense


def product_on(mesh, place):
    """((w, x_MI) -> y_MO on a mesh, whether its shards split I)."""
    _, dims, num_in = PARAMS[place]
    names = dims[1:]
    split = next(name for name in names if rules.RULES[name].compute)
    is_split_in = names.index(split) < num_in
    sides = (("seq", split), ("seq", "norm"))
    x_dims, y_dims = sides if is_split_in else sides[::-1]

    def fn(w, x_MI):
        y_MO = product(x_MI, island.gather_matrix(w, names, jnp.float32, num_in))
        return island.reduce_sum(y_MO, split) if is_split_in else y_MO

    return island.island(fn, mesh, names, (x_dims,), y_dims), is_split_in


def both_meshes():
    return single_device_mesh(), mesh_of(data=2, expert=2, tensor=2)


def rows_for(dense):
    return np.random.default_rng(1).normal(size=(9, dense.shape[1])).astype(np.float32)


@pytest.mark.cases(6)
@pytest.mark.parametrize("method", codes.METHODS)
@pytest.mark.parametrize("place", range(len(PARAMS)))
def test_products_on_a_mesh_and_on_one_device(method, place):
    for mesh in both_meshes():
        w, dense = quantized(mesh, *PARAMS[place], method)
        x_MI = rows_for(dense)
        multiply = fast_jit(product_on(mesh, place)[0])
        for num_rows in (3, 9) if mesh.size == 1 else (9,):
            assert_close(multiply(w[1], x_MI[:num_rows]), x_MI[:num_rows] @ dense[1], 2e-6)


@pytest.mark.parametrize("method", ["int4", "int8", "easyquant"])
def test_products_in_the_layouts_of_accelerators(method):
    """One row, few and many, whose groups are multiplied in other ways."""
    w, dense = quantized(single_device_mesh(), *PARAMS[2], method)
    first = w[1].replace(by_rows=False)
    layouts = [first]
    if method != "easyquant":
        layouts.append(
            first.replace(values=first.values.T, scale=first.scale.T, is_out_first=False)
        )
    x_MI = np.random.default_rng(1).normal(size=(33, 64)).astype(np.float32)
    for layout in layouts:
        for num_rows in (1, 2, 33):
            assert_close(product(x_MI[:num_rows], layout), x_MI[:num_rows] @ dense[1], 2e-6)


def test_an_array_is_as_small_as_its_bits_and_gives_its_numbers():
    for method, most in (("int8", 1.1), ("fp8", 1.1)):
        w, dense = quantized(single_device_mesh(), *PARAMS[2], method)
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(w))
        assert num_bytes < most * dense.size
        np.testing.assert_allclose(
            np.asarray(dequantized(w, jnp.float32)).swapaxes(1, 2), dense, rtol=1e-6
        )


def test_layers_of_different_methods_are_refused():
    shape, dims, _ = PARAMS[2]
    mesh = single_device_mesh()
    spec = ParamSpec(
        shape, np.float32, dims, Role.MATRIX, rules.stored_sharding(mesh, dims, shape)
    )
    w_OI = np.ones((96, 64), np.float32)
    mixed = {(0,): codes.quantize("w", w_OI, "int8"), (1,): codes.quantize("w", w_OI, "int4", 32)}
    with pytest.raises(ConfigError, match=r"several ways: int8 .* and int4 in 2 groups .*\(1,\)"):
        assembled("w", spec, mixed, is_transposed=True)


@pytest.mark.parametrize("place", range(len(PARAMS)))
def test_activations_in_eight_bits(place):
    """s8 x s8 -> s32 in the program, on one device and on a mesh, and the numbers of a product
    with rounded rows.
    """
    for mesh in both_meshes():
        w, dense = quantized(mesh, *PARAMS[place], "int8")
        w = w.replace(rounds_inputs=True)
        x_MI = rows_for(dense)
        fn, is_split_in = product_on(mesh, place)
        multiply = jax.jit(fn)
        num_shards = mesh.shape["tensor"] if is_split_in and mesh.size > 1 else 1
        rows = x_MI.reshape(9, num_shards, -1)
        scale = np.abs(rows).max(-1, keepdims=True) / 127
        rounded = (np.rint(rows / scale) * scale).reshape(x_MI.shape)
        assert_close(multiply(w[1], x_MI), rounded @ dense[1], 2e-6)
        # The rounding of nine bits' steps, of which 64 to 96 are added up.
        assert_close(multiply(w[1], x_MI), x_MI @ dense[1], 0.01)
        text = multiply.lower(w[1], x_MI).as_text()
        assert re.search(r"dot_general.*xi8>, tensor<.*xi8>\) -> tensor<.*xi32>", text)
