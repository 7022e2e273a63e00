"""How a model generates on one CPU: its layers unrolled, each with arrays of its own.

A loop over groups takes each group's parameters out of the stacked array before it multiplies
with them; XLA:CPU does that by a copy, which for a few tokens costs as much as the products.  So
here every layer and every expert is an array of its own, and a batch of small experts is generated
in slices, one a thread.  Tokens are those of the other layout.
Letters: P groups, B batch, T new tokens, E experts, D model, F ffn, M tokens.
"""

import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax import startup
from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.ffn.moe import dispatch, routing
from hunyuan_jax.layers.ffn.moe.layer import EXPERT_DIMS, Moe, Serve
from hunyuan_jax.layers.ffn.spark import SparkMlp, SparseSparkMlp
from hunyuan_jax.layers.linear import linear
from hunyuan_jax.layers.protocols import Sequence
from hunyuan_jax.model.layout import locations
from hunyuan_jax.model.pattern import pattern
from hunyuan_jax.model.stack import Entries, Layer, run_group, stack_figures
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel.mesh import device_kind
from hunyuan_jax.params import declare as params
from hunyuan_jax.quant.array import QuantArray

# Elements of an expert's matrix up to which a batch is generated in slices: 512 x 1024 gains, 1024
# x 2048 loses (docs/generation.md).
_SMALL_EXPERT = 1 << 19
# Tokens of a tile of `run_experts_one_by_one`, for up to _FEW tokens and for more.  With AVX-512
# an expert of 256 x 512 took 56 us for one token, 85 for four and 124 for eight; without it four
# and eight take the same time.
_TILE, _LARGER_TILE = 4, 8
_FEW = 16
_MANY = 32


def suits(cfg: ModelConfig, mesh: Mesh) -> bool:
    """Whether a model on this mesh generates in this layout."""
    has_adapted_experts = cfg.lora.rank and any(
        target.startswith("expert_") for target in cfg.lora.targets
    )
    return mesh.size == 1 and device_kind(mesh) == "cpu" and not has_adapted_experts


def unstacked(cfg: ModelConfig, tree: dict[str, Any], specs: dict[str, Any]) -> dict[str, Any]:
    """A model's parameters in this layout; on a CPU they share the memory of `tree`.

    Args:
      specs: their `ParamSpec`s.
    """
    stacks: dict[str, dict[str, Any]] = {}
    for at in locations(cfg):
        layers, place = stacks.setdefault(at.name, {}), f"layer_{at.place}"
        stacked, layer_specs = tree[at.name][place], specs[at.name][place]
        layers[f"layer_{len(layers)}"] = _of_group(stacked, layer_specs, at.group)
    return tree | stacks


def _of_group(tree: dict[str, Any], specs: dict[str, Any], group: int) -> dict[str, Any]:
    taken = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            taken[name] = _of_group(value, specs[name], group)
        elif specs[name].num_stacked == 2:
            for expert in range(specs[name].shape[1]):
                taken[f"{name}_{expert}"] = _shared(value, (group, expert))
        else:
            taken[name] = _shared(value, group)
    return taken


def _shared(value: jax.Array | QuantArray, index: Any) -> jax.Array | QuantArray:
    def part(array):
        return jax.device_put(np.asarray(array)[index], may_alias=True)

    return jax.tree.map(part, value)


class UnrolledStack(nnx.Module):
    """As `Stack`, with parameters for each layer of the model and no scan."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array):
        self.cfg = cfg
        ffn = self.ffn()
        for index, spec in enumerate(pattern(cfg) * cfg.num_groups):
            spec = spec._replace(ffn=ffn.get(spec.ffn, spec.ffn))
            setattr(self, f"layer_{index}", Layer(cfg, mesh, key, spec))

    @staticmethod
    def ffn() -> dict[type, type]:
        """What generates in the place of a feed-forward layer."""
        return FFN

    def __call__(
        self,
        x_BTD: jax.Array,
        sequence: Sequence,
        entries: Entries,
        key: jax.Array | None,
        is_training: bool,
    ) -> tuple[jax.Array, Entries, dict[str, jax.Array]]:
        """As `Stack`; for inference, so there is no remat."""
        num_places, stats = len(pattern(self.cfg)), []
        for group in range(self.cfg.num_groups):
            indices = range(group * num_places, (group + 1) * num_places)
            definition, layers = nnx.split([getattr(self, f"layer_{index}") for index in indices])
            group_key = None if key is None else jax.random.fold_in(key, group)
            x_BTD, entries, group_stats = _run_group(
                definition, is_training, layers, x_BTD, sequence, entries, group, group_key
            )
            stats += [group_stats] * bool(group_stats)
        return x_BTD, entries, stack_figures(stats)


# `jit` here and below: what groups, or experts, of equal shapes do is traced and lowered once.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_group(
    definition: nnx.GraphDef,
    is_training: bool,
    layers: nnx.State,
    x_BTD: jax.Array,
    sequence: Sequence,
    entries: Entries,
    group: jax.Array,
    key: jax.Array | None,
) -> tuple[jax.Array, Entries, dict[str, jax.Array]]:
    """As `run_group`."""
    layers = nnx.merge(definition, layers)
    return run_group(layers, x_BTD, sequence, entries, group, key, is_training)


class InvariantStack(UnrolledStack):
    """As `UnrolledStack`, with experts that multiply one token at a time."""

    @staticmethod
    def ffn() -> dict[type, type]:
        """See `UnrolledStack`."""
        return FFN | {Moe: InvariantMoe}


class PromptStack(UnrolledStack):
    """As `UnrolledStack`, for pieces of prompts."""

    @staticmethod
    def ffn() -> dict[type, type]:
        """See `UnrolledStack`."""
        return FFN | {Moe: PromptMoe}


def graph_def(
    cfg: ModelConfig, mesh: Mesh, stack: type[UnrolledStack] = UnrolledStack
) -> nnx.GraphDef:
    """The model whose parameters are those of `unstacked`, with one of the stacks above."""
    model = nnx.eval_shape(lambda: Transformer(cfg, mesh, jax.random.key(0), stack))
    return nnx.split(model)[0]


class UnrolledExperts(nnx.Module):
    """As `Experts`, with a matrix for each expert."""

    def __init__(self, cfg: ModelConfig, key: jax.Array):
        sizes = {"embed": cfg.hidden_size, "expert_ffn": cfg.expert_size}
        for name, (_, *dims) in EXPERT_DIMS.items():
            for expert in range(cfg.moe.num_experts):
                shape = tuple(sizes[dim] for dim in dims)
                init = params.normal(key, cfg.init_std)
                matrix = params.param(shape, tuple(dims), init, params.Role.EXPERT)
                setattr(self, f"{name}_{expert}", matrix)


class UnrolledMoe(Moe):
    """As `Moe`, looping over the experts."""

    @staticmethod
    def new_experts(cfg: ModelConfig, key: jax.Array) -> nnx.Module:
        """One matrix for each expert."""
        return UnrolledExperts(cfg, key)

    def server(self) -> Serve:
        """Dropless, on the one shard there is."""
        return run_experts_one_by_one


class InvariantMoe(UnrolledMoe):
    """As `UnrolledMoe`; the other tokens of an expert change no bit of a token's output."""

    def server(self) -> Serve:
        """See `UnrolledMoe`."""
        return functools.partial(run_experts_one_by_one, is_invariant=True)


class PromptMoe(UnrolledMoe):
    """As `UnrolledMoe`, in tiles however few tokens there are: that compiles in two thirds of the
    time.
    """

    def server(self) -> Serve:
        """See `UnrolledMoe`."""
        return run_experts_in_tiles


# What generates in the place of a feed-forward layer; the others are left as they are.
FFN = {Moe: UnrolledMoe, SparkMlp: SparseSparkMlp}


def run_experts_one_by_one(
    weights: dict[str, jax.Array],
    x_gTD: jax.Array,
    assignment: routing.Assignment,
    is_invariant: bool = False,
) -> jax.Array:
    """CPU decoding: loops over experts and skips idle ones; [g, T, D], as `serve` without a
    capacity.

    An expert of one token multiplies that token; one of several multiplies a few tiles of its
    tokens, filled up with weight zero.  An expert without tokens is not read.  If is_invariant,
    tokens are multiplied one by one: products of different shapes differ in the last bits.

    Args:
      weights: the parameters of `UnrolledExperts` by name.
    """
    gate_EDF, up_EDF, down_EFD = _matrices(weights)
    E = len(gate_EDF)
    x_MD = x_gTD.reshape(-1, x_gTD.shape[-1])
    M = len(x_MD)
    if M > _MANY and not is_invariant:
        return run_experts_in_tiles(weights, x_gTD, assignment)
    is_of_ETk = assignment.expert_Tk.reshape(M, -1) == jnp.arange(E)[:, None, None]
    weight_EM = jnp.sum(
        jnp.where(is_of_ETk, assignment.weight_Tk.reshape(M, -1), 0.0), axis=-1
    ).astype(x_MD.dtype)
    is_of_EM = is_of_ETk.any(-1)
    count_E = is_of_EM.sum(-1)
    # Each expert's own tokens first: the others, of weight zero, are the filling.
    order_EM = jnp.argsort(~is_of_EM, axis=-1, stable=True)
    y_MD = jnp.zeros_like(x_MD)
    for e, matrices in enumerate(zip(gate_EDF, up_EDF, down_EFD, strict=True)):
        y_MD = _add_expert(
            is_invariant, y_MD, x_MD, weight_EM[e], order_EM[e], count_E[e], matrices
        )
    return y_MD.reshape(x_gTD.shape)


@functools.partial(jax.jit, static_argnums=0)
def _add_expert(
    is_invariant: bool,
    y_MD: jax.Array,
    x_MD: jax.Array,
    weight_M: jax.Array,
    order_M: jax.Array,
    count: jax.Array,
    matrices: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
    """y_MD with the output of an expert for the first `count` tokens of order_M."""
    M = len(x_MD)

    def add(num_rows, i, y_MD):
        row_b = jax.lax.dynamic_slice_in_dim(order_M, i * num_rows, num_rows)
        h_bD = _expert(x_MD[row_b], weight_M[row_b], matrices)
        return y_MD.at[row_b].add(h_bD, unique_indices=True)

    def one(y_MD):
        return add(1, 0, y_MD)

    def several(y_MD):
        # Whole tiles: a slice beyond the end would take rows twice.
        tile = math.gcd(_TILE if M <= _FEW else _LARGER_TILE, M)
        return jax.lax.fori_loop(0, -(-count // tile), functools.partial(add, tile), y_MD)

    if is_invariant:
        return jax.lax.fori_loop(0, count, functools.partial(add, 1), y_MD)
    return jax.lax.switch(jnp.minimum(count, 2), (lambda y_MD: y_MD, one, several)[: M + 1], y_MD)


def _expert(
    x_bD: jax.Array, weight_b: jax.Array, matrices: tuple[jax.Array, jax.Array, jax.Array]
) -> jax.Array:
    """An expert's output for some tokens, each times its weight; [b, D]."""
    gate_DF, up_DF, down_FD = matrices
    gate_bF, up_bF = linear(x_bD, gate_DF), linear(x_bD, up_DF)
    return linear(weight_b[:, None] * jax.nn.silu(gate_bF) * up_bF, down_FD)


def run_experts_in_tiles(
    weights: dict[str, jax.Array], x_gTD: jax.Array, assignment: routing.Assignment
) -> jax.Array:
    """As `run_experts_one_by_one`, for many tokens: each expert multiplies tiles of its own."""
    gate_EDF, up_EDF, down_EFD = _matrices(weights)
    E = len(gate_EDF)

    def tiles(x_nbD, weight_nb, tile_expert_n, num_tiles):
        is_used_n = jnp.arange(len(tile_expert_n)) < num_tiles
        end_E = [jnp.sum(is_used_n & (tile_expert_n <= e), dtype=jnp.int32) for e in range(E)]
        num_threads = min(E, os.cpu_count() or 1)
        y_threads = [jnp.zeros_like(x_nbD)] * num_threads
        experts = zip([jnp.int32(0), *end_E[:-1]], end_E, gate_EDF, up_EDF, down_EFD, strict=True)
        for e, (start, end, *matrices) in enumerate(experts):
            y_threads[e % num_threads] = _set_tiles(
                y_threads[e % num_threads], x_nbD, weight_nb, start, end, tuple(matrices)
            )
        return sum(y_threads)

    return dispatch.dropless(x_gTD, assignment, E, tiles)


@jax.jit
def _set_tiles(
    y_nbD: jax.Array,
    x_nbD: jax.Array,
    weight_nb: jax.Array,
    start: jax.Array,
    end: jax.Array,
    matrices: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
    """y_nbD with the output of an expert in the tiles [start, end)."""

    def one_tile(i, y_nbD):
        return y_nbD.at[i].set(_expert(x_nbD[i], weight_nb[i].astype(x_nbD.dtype), matrices))

    return jax.lax.fori_loop(start, end, one_tile, y_nbD)


def _matrices(weights: dict[str, jax.Array]) -> tuple[list[jax.Array], ...]:
    """gate, up and down of each expert."""
    E = len(weights) // len(EXPERT_DIMS)
    return tuple([weights[f"{name}_{e}"] for e in range(E)] for name in EXPERT_DIMS)


def num_slices(cfg: ModelConfig, batch_size: int) -> int:
    """Number of slices of a batch that are generated in a thread each.

    XLA:CPU runs one expert after the other, and a small one on one core; slices keep every core
    busy.  Larger matrices are worth all cores, and are better read once for the whole batch.
    """
    if not cfg.is_moe or cfg.hidden_size * cfg.expert_size > _SMALL_EXPERT:
        return 1
    rows = math.ceil(batch_size / (os.cpu_count() or 1))
    return math.ceil(batch_size / rows)  # no slice of padding rows alone


def compiler_options(num_slices: int) -> dict[str, Any]:
    """How a program is compiled that draws tokens for one of so many slices.

    Each has a core, so its products use one.  Without AVX-512 YNNPACK is left out: it packs the
    matrix of every product, and for 4 to 32 rows of 256 x 512 took 1.5 to 2 times as long.
    """
    flags = startup.cpu_flags()
    if num_slices == 1 or "avx2" not in flags or "avx512f" in flags:
        return {}
    return {"xla_cpu_experimental_ynn_fusion_type": "", "xla_cpu_multi_thread_eigen": False}
