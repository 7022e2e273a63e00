"""Checks a converted checkpoint against its source: tensor by tensor, then through both forward
passes, one expert in memory at a time.

Letters: T tokens of the one sequence, V vocabulary, D model, F ffn, E experts, g = B = 1.
"""

import dataclasses
import functools
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers import embedding, rope
from hunyuan_jax.layers.ffn.moe import layer as moe
from hunyuan_jax.layers.ffn.moe import routing
from hunyuan_jax.layers.kernels import kernel_options
from hunyuan_jax.layers.norm import RmsNorm
from hunyuan_jax.layers.protocols import LayerCache, Sequence
from hunyuan_jax.model.layout import locations
from hunyuan_jax.model.pattern import pattern
from hunyuan_jax.model.stack import Layer
from hunyuan_jax.parallel import island, settings
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.progress import Meter, in_order
from hunyuan_jax.storage import Place
from hunyuan_jax.weights import chunks, hf_config, hf_spelling, quantized, reference
from hunyuan_jax.weights import folder as official
from hunyuan_jax.weights import names as table
from hunyuan_jax.weights.gguf_file import model_place
from hunyuan_jax.weights.stream import Converted, open_converted

_NUM_TOKENS = 24
# Both passes are float32; they add up in another order.  A fault in the weights is 1e-2 or more.
_TOLERANCE = 2e-4
# Rows of the table that are multiplied at a time.
_VOCAB_BLOCK = 16_384


@settings.stated()
def verify(source: str | os.PathLike, checkpoint: str | os.PathLike) -> list[str]:
    """Every difference between an official folder and a converted checkpoint, a line each; empty
    if they are the same model.

    Raises:
      ConfigError: one of the two cannot be opened.
    """
    opened = official.OfficialFolder(model_place(source))
    converted = open_converted(Place(checkpoint))
    found = compare_configs(opened, converted)
    # Sizes differ: tensors cannot be matched.
    if found or opened.config.get("model_type") == hf_config.OWN:
        return found or compare_tensors(opened, converted)  # no official code computes such layers
    return [*compare_tensors(opened, converted), *compare_layers(opened, converted)]


def compare_configs(opened: official.OfficialFolder, converted: Converted) -> list[str]:
    """Returns the fields in which the two models differ, except the parameters' dtype."""
    hf = quantized.plain_config(hf_spelling.with_dtype(opened.config, converted.cfg.dtype))
    source = official.with_stored_layers(hf_config.from_hf(hf), opened)
    return [
        f"config: {name} = {theirs!r} in the source, {ours!r} in the checkpoint"
        for name, theirs, ours in _fields(source, converted.cfg)
        if theirs != ours
    ]


def compare_tensors(opened: official.OfficialFolder, converted: Converted) -> list[str]:
    """Returns the tensors whose bits differ from those that an import of the source writes."""
    plan = official.plan(opened, converted.cfg.dtype)
    place = converted.place.inside("params")

    def differences(entry: table.Entry) -> str | None:
        piece, param = plan.pieces[entry], converted.params[entry.path]
        tensor = opened.read(piece, param.dtype if piece.parts else None)
        num_different = 0
        for chunk in range(param.num_chunks):
            expected = chunks.encode(tensor, entry, param, chunk)
            actual = chunks.read_chunk(place, param, entry.index, chunk)
            bits = np.dtype(f"u{param.dtype.itemsize}")
            actual = actual.reshape(len(actual), -1).view(bits)
            num_different += int(np.count_nonzero(expected[: len(actual)].view(bits) != actual))
        return (
            f"{entry.name}: {num_different} of {tensor.size} values differ"
            if num_different
            else None
        )

    found = []
    with Meter("compare tensors", sum(piece.num_bytes for piece in plan.pieces.values())) as meter:
        for entry, line in in_order(differences, plan.pieces):
            meter.add(plan.pieces[entry].num_bytes)
            found += [line] * (line is not None)
    return found


def compare_layers(opened: official.OfficialFolder, converted: Converted) -> list[str]:
    """The parts of the model whose outputs differ between the plain official forward pass and
    ours.

    Each part gets the official pass's own input, so a fault is reported where it is.
    """
    plan = official.plan(opened, converted.cfg.dtype)
    # What the source promises decides how the official pass runs, what the checkpoint says how
    # ours does.
    hf, cfg = _defaults(opened.config), _float32(converted.cfg)
    entries = {entry.name: entry for entry in plan.pieces}

    def read(name: str) -> np.ndarray:
        entry = entries[name]
        # Rounded as the checkpoint is: what is compared is the function.
        tensor = opened.read(plan.pieces[entry], converted.params[entry.path].dtype)
        return tensor.astype(np.float32, copy=False)

    ids_T = np.random.default_rng(0).integers(0, cfg.vocab_size, _NUM_TOKENS)
    ours = _Ours(converted, cfg)
    found = []

    def compare(what: str, expected: np.ndarray, actual: Any) -> None:
        error = np.linalg.norm(np.asarray(actual) - expected) / max(
            np.linalg.norm(expected), 1e-30
        )
        if not error <= _TOLERANCE:
            found.append(
                f"{what}: outputs differ by {error:.1e} of their norm, {_TOLERANCE:.0e} is "
                "rounding"
            )

    with Meter("compare layers", sum(piece.num_bytes for piece in plan.pieces.values())) as meter:
        x_TD, kv = reference.embed(read, ids_T), None
        compare("embedding", x_TD, ours.embed(ids_T))
        for index in range(cfg.num_layers):
            before_TD = x_TD
            x_TD, kv = reference.layer(hf, read, index, before_TD, kv)
            # Relative to what the layer adds: a large residual stream would hide it.
            compare(f"layer {index}", x_TD - before_TD, ours.layer(index, before_TD) - before_TD)
            meter.add(
                sum(
                    piece.num_bytes
                    for entry, piece in plan.pieces.items()
                    if entry.name.startswith(f"model.layers.{index}.")
                )
            )
        compare("logits", reference.logits(hf, read, x_TD), ours.logits(x_TD))
        if cfg.num_mtp_layers:  # on any input
            added_TD = reference.layer(hf, read, cfg.num_layers, x_TD, None)[0] - x_TD
            ours_TD = ours.layer(cfg.num_layers, x_TD) - x_TD
            compare(f"layer {cfg.num_layers} (multi-token prediction)", added_TD, ours_TD)
    return found


class _Ours:
    """Our model's parts with the checkpoint's weights, read when they are needed, in the dtype
    that they are stored in.
    """

    def __init__(self, converted: Converted, cfg: ModelConfig):
        self._converted, self._cfg = converted, cfg
        self._place = converted.place.inside("params")
        self._mesh = single_device_mesh()
        self._kv: Any = None

    def embed(self, ids_T: np.ndarray) -> np.ndarray:
        module = nnx.eval_shape(
            lambda: embedding.Embedding(self._cfg, self._mesh, jax.random.key(0))
        )
        rows_TD = self._read("embed/embedding_VD", ())[ids_T]
        module.embedding_VD = nnx.Param(jnp.asarray(rows_TD), dims=embedding.TABLES[0])
        return np.asarray(_embed(*nnx.split(module), jnp.arange(len(ids_T))[None]))[0]

    def layer(self, index: int, x_TD: np.ndarray) -> np.ndarray:
        """The layer's output; a producer's keys and values are kept for its group."""
        at = locations(self._cfg)[index]
        cfg, group, i = at.stack, at.group, at.place
        module = nnx.eval_shape(lambda: Layer(cfg, self._mesh, jax.random.key(0), pattern(cfg)[i]))
        if cfg.is_moe:
            del module.moe.experts
        graph_def, arrays = nnx.split(self._filled(module, at.path, (group,)))
        out_BTD, self._kv, routed = _run_layer(
            cfg, graph_def, arrays, jnp.asarray(x_TD[None]), self._kv if i else None
        )
        del arrays
        if routed is not None:
            for expert in range(cfg.moe.num_experts):
                out_BTD += _run_expert(cfg, self._expert(at.path, group, expert), *routed, expert)
        return np.asarray(out_BTD)[0]

    def logits(self, x_TD: np.ndarray) -> np.ndarray:
        cfg = self._cfg
        norm = self._filled(
            nnx.eval_shape(lambda: RmsNorm(cfg.hidden_size, cfg.rms_norm_eps)), "final_norm", ()
        )
        hidden_BTD = norm(jnp.asarray(x_TD[None]))
        w_VD = self._read("embed/embedding_VD" if cfg.tie_embeddings else "lm_head/w_VD", ())
        blocks = (
            w_VD[start : start + _VOCAB_BLOCK] for start in range(0, len(w_VD), _VOCAB_BLOCK)
        )
        return np.concatenate(
            [_logits(jnp.asarray(block), hidden_BTD, self._mesh)[0] for block in blocks], axis=-1
        )

    def _filled(self, module: Any, prefix: str, index: tuple[int, ...]) -> Any:
        """The module with its parameters out of the checkpoint; `index` is that of its group."""
        graph_def, state = nnx.split(module)

        def read(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
            array = self._read(f"{prefix}/{name}", index)
            assert array.shape == leaf.shape, (path, array.shape, leaf.shape)
            # Scales of norms are multiplied with each other, which is to be in float32.
            return jnp.asarray(array if array.ndim > 1 else array.astype(np.float32))

        return nnx.merge(graph_def, jax.tree_util.tree_map_with_path(read, state))

    def _expert(self, prefix: str, group: int, expert: int) -> dict[str, jax.Array]:
        """The parameters of `Experts` of one of them, each with a leading dim of one."""
        return {
            name: jnp.asarray(self._read(f"{prefix}/moe/experts/{name}", (group, expert))[None])
            for name in moe.EXPERT_DIMS
        }

    def _read(self, path: str, index: tuple[int, ...]) -> np.ndarray:
        return chunks.read_piece(self._place, self._converted.params[path], index)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graph_def: Any, arrays: Any, ids_BT: jax.Array) -> jax.Array:
    return nnx.merge(graph_def, arrays)(ids_BT, "float32")


@functools.partial(jax.jit, static_argnums=2)
def _logits(w_VD: jax.Array, hidden_BTD: jax.Array, mesh: Mesh) -> jax.Array:
    return embedding.logits(nnx.Param(w_VD, dims=embedding.TABLES[0]), hidden_BTD, mesh)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_layer(
    cfg: ModelConfig, graph_def: Any, arrays: Any, x_BTD: jax.Array, kv: Any
) -> tuple[jax.Array, Any, Any]:
    """(the layer's output but for its routed experts, the keys and values of its group, None or
    what `_run_expert` is told).
    """
    layer = nnx.merge(graph_def, arrays)
    ones_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
    sequence = Sequence(rope.cos_sin(jnp.arange(x_BTD.shape[1])[None], cfg), ones_BT)
    out_BTD, cache = layer.attn(layer.attn_norm(x_BTD), sequence, LayerCache(None, 0, kv), None)
    kv = cache.seen
    x_BTD += out_BTD
    y_BTD = layer.mlp_norm(x_BTD)
    if not cfg.is_moe:
        return x_BTD + layer.mlp(y_BTD, ones_BT > 0, None)[0], kv, None
    if cfg.moe.num_shared_experts:
        x_BTD += layer.moe.shared(y_BTD, ones_BT > 0, None)[0]
    logits_BTE = moe.router_logits(y_BTD, layer.moe.router_DE[...])
    return (
        x_BTD,
        kv,
        (
            y_BTD,
            moe.route(
                logits_BTE,
                ones_BT > 0,
                cfg.moe,
                jax.random.split(jax.random.key(0), 1),
                layer.moe.bias_E[...] if cfg.moe.selection_bias else None,
            )[1],
        ),
    )


@functools.partial(jax.jit, static_argnums=0)
def _run_expert(
    cfg: ModelConfig,
    weights: dict[str, jax.Array],
    y_gTD: jax.Array,
    assignment: routing.Assignment,
    expert: int,
) -> jax.Array:
    """What one routed expert adds [1, T, D], computed as on a chip that holds no other."""
    here = assignment._replace(
        expert_Tk=assignment.expert_Tk - expert,
        count_E=jax.lax.dynamic_slice_in_dim(assignment.count_E, expert, 1, axis=-1),
    )
    mesh = single_device_mesh()
    fn = functools.partial(
        moe.serve,
        dims=moe.EXPERT_DIMS,
        cfg=cfg.moe,
        kernels=kernel_options(cfg, mesh),
        lora_cfg=cfg.lora,
    )
    return island.island(fn, mesh, moe.EXPERT_DIMS, ((), ()), ())(weights, y_gTD, here)


def _float32(cfg: ModelConfig) -> ModelConfig:
    moe = dataclasses.replace(cfg.moe, dispatch="dropless", group_size=0)
    return dataclasses.replace(cfg, dtype="float32", remat="none", moe=moe)


def _defaults(hf: dict[str, Any]) -> dict[str, Any]:
    """A copy in one spelling, without what only says how the weights are stored."""
    return hf_spelling.one_spelling(json.loads(json.dumps(quantized.plain_config(hf))))


def _fields(theirs: ModelConfig, ours: ModelConfig):
    """(name, theirs, ours) of every field."""
    for field in dataclasses.fields(theirs):
        a, b = getattr(theirs, field.name), getattr(ours, field.name)
        if dataclasses.is_dataclass(a):
            yield from ((f"{field.name}.{name}", x, y) for name, x, y in _fields(a, b))
        else:
            yield field.name, a, b
