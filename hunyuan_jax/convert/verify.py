"""Is a checkpoint the model of an official folder?  Tensor by tensor, then through both forward passes, one layer in memory at a time."""

import dataclasses
import functools
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.convert import chunks, hf_config, reference, table, weights
from hunyuan_jax.convert.place import Place
from hunyuan_jax.convert.progress import Meter, in_order
from hunyuan_jax.convert.scale import Converted, open_converted
from hunyuan_jax.model import embedding, rope
from hunyuan_jax.model.attention import Visibility
from hunyuan_jax.model.block import Layer, Sequence
from hunyuan_jax.model.norm import RmsNorm
from hunyuan_jax.parallel.mesh import single_device_mesh

_NUM_TOKENS = 24
# Both passes are float32; they add up in another order.  A fault in the weights is 1e-2 or more.
_TOLERANCE = 2e-4


def verify(source: str | os.PathLike, checkpoint: str | os.PathLike) -> list[str]:
    """Every difference between an official folder and a converted checkpoint, a line each; empty if they are the same model.

    Raises:
      ConfigError: one of the two cannot be opened.
    """
    opened, converted = weights.Weights(Place(source)), open_converted(checkpoint)
    found = compare_configs(opened, converted)
    # Sizes differ: tensors cannot be matched.
    return found or [*compare_tensors(opened, converted), *compare_layers(opened, converted)]


def compare_configs(opened: weights.Weights, converted: Converted) -> list[str]:
    """The fields of the two models that differ; the parameters' dtype is the converter's choice."""
    hf = hf_config.with_dtype(opened.config, converted.cfg.dtype)
    return [
        f"config: {name} = {theirs!r} in the source, {ours!r} in the checkpoint"
        for name, theirs, ours in _fields(hf_config.from_hf(hf), converted.cfg)
        if theirs != ours
    ]


def compare_tensors(opened: weights.Weights, converted: Converted) -> list[str]:
    """The tensors whose bits in the checkpoint are not those that an import of the source writes."""
    plan = weights.plan(opened, converted.cfg.dtype)
    place = Place(f"{converted.place}/params")

    def differences(entry: table.Entry) -> str | None:
        tensor, param = opened.read(entry.name), converted.params[entry.path]
        scale = weights.read_scale(opened, plan.scales[entry.name]) if entry.name in plan.scales else None
        num_different = 0
        for chunk in range(param.num_chunks):
            expected = chunks.encode(tensor, entry, param, chunk, scale)
            actual = chunks.read_chunk(place, param, entry.index, chunk)
            bits = np.dtype(f"u{param.dtype.itemsize}")
            actual = actual.reshape(len(actual), -1).view(bits)
            num_different += int(np.count_nonzero(expected[: len(actual)].view(bits) != actual))
        return f"{entry.name}: {num_different} of {tensor.size} values differ" if num_different else None

    found = []
    with Meter("compare tensors", sum(stored.num_bytes for stored in plan.tensors.values())) as meter:
        for entry, line in in_order(differences, plan.tensors):
            meter.add(plan.tensors[entry].num_bytes)
            found += [line] * (line is not None)
    return found


def compare_layers(opened: weights.Weights, converted: Converted) -> list[str]:
    """The parts of the model whose outputs differ between the plain official forward pass and ours.

    Each part gets the official pass's own input, so a fault is reported where it is.
    """
    plan = weights.plan(opened, converted.cfg.dtype)
    # What the source promises decides how the official pass runs, what the checkpoint says how ours does.
    hf, cfg = _defaults(opened.config), _float32(converted.cfg)
    entries = {entry.name: entry for entry in plan.tensors}

    def read(name: str) -> np.ndarray:
        entry = entries[name]
        scale = weights.read_scale(opened, plan.scales[name]) if name in plan.scales else None
        tensor = opened.read(name)
        if scale is not None:
            tensor = tensor.astype(np.float32) * np.float32(scale)
        # Rounded as the checkpoint is: what is compared is the function.
        return tensor.astype(converted.params[entry.path].dtype).astype(np.float32)

    ids_T = np.random.default_rng(0).integers(0, cfg.vocab_size, _NUM_TOKENS)
    ours = _Ours(converted, cfg)
    found = []

    def compare(what: str, expected: np.ndarray, actual: Any) -> None:
        error = np.linalg.norm(np.asarray(actual) - expected) / max(np.linalg.norm(expected), 1e-30)
        if not error <= _TOLERANCE:
            found.append(f"{what}: outputs differ by {error:.1e} of their norm, {_TOLERANCE:.0e} is rounding")

    with Meter("compare layers", sum(stored.num_bytes for stored in plan.tensors.values())) as meter:
        x_TD, kv = reference.embed(read, ids_T), None
        compare("embedding", x_TD, ours.embed(ids_T))
        for index in range(cfg.num_layers):
            before_TD = x_TD
            x_TD, kv = reference.layer(hf, read, index, before_TD, kv)
            # Relative to what the layer adds: a large residual stream would hide it.
            compare(f"layer {index}", x_TD - before_TD, ours.layer(index, before_TD) - before_TD)
            meter.add(sum(s.num_bytes for name, s in opened.tensors.items() if name.startswith(f"model.layers.{index}.")))
        compare("logits", reference.logits(hf, read, x_TD), ours.logits(x_TD))
    return found


class _Ours:
    """Our model's parts with the checkpoint's weights, read when they are needed."""

    def __init__(self, converted: Converted, cfg: ModelConfig):
        self._converted, self._cfg = converted, cfg
        self._place = Place(f"{converted.place}/params")
        self._mesh = single_device_mesh()
        self._kv: Any = None

    def embed(self, ids_T: np.ndarray) -> np.ndarray:
        module = self._filled(lambda: embedding.Embedding(self._cfg, self._mesh, jax.random.key(0)), "embed", ())
        return np.asarray(module(jnp.asarray(ids_T[None], jnp.int32), "float32"))[0]

    def layer(self, index: int, x_TD: np.ndarray) -> np.ndarray:
        """The layer's output; a producer's keys and values are kept for its group."""
        group, i = divmod(index, self._cfg.cla_share_factor)
        new = functools.partial(Layer, self._cfg, self._mesh, jax.random.key(0), is_producer=i == 0)
        graph_def, params = nnx.split(self._filled(new, f"groups/layer_{i}", (group,)))
        out_BTD, self._kv = _run_layer(self._cfg, graph_def, params, jnp.asarray(x_TD[None]), self._kv if i else None)
        return np.asarray(out_BTD)[0]

    def logits(self, x_TD: np.ndarray) -> np.ndarray:
        cfg = self._cfg
        hidden_BTD = self._filled(lambda: RmsNorm(cfg.hidden_size, cfg.rms_norm_eps), "final_norm", ())(jnp.asarray(x_TD[None]))
        if cfg.tie_embeddings:
            head = self._filled(lambda: embedding.Embedding(cfg, self._mesh, jax.random.key(0)), "embed", ()).embedding_VD
        else:
            head = self._filled(lambda: embedding.Head(cfg, self._mesh, jax.random.key(0)), "lm_head", ()).w_VD
        return np.asarray(embedding.logits(head, hidden_BTD, self._mesh))[0]

    def _filled(self, new: Any, prefix: str, index: tuple[int, ...]) -> Any:
        """The module with its parameters out of the checkpoint; `index` is that of its group."""
        graph_def, state = nnx.split(nnx.eval_shape(new))

        def read(path, leaf):
            param = self._converted.params[f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/').removesuffix('/value')}"]
            pieces = list(np.ndindex(param.stacked[len(index) :]))
            array = np.empty((*param.stacked[len(index) :], *param.piece), np.float32)
            for piece in pieces:
                array[piece] = chunks.read_piece(self._place, param, (*index, *piece))
            assert array.shape == leaf.shape, (path, array.shape, leaf.shape)
            return jnp.asarray(array)

        return nnx.merge(graph_def, jax.tree_util.tree_map_with_path(read, state))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_layer(cfg: ModelConfig, graph_def: Any, params: Any, x_BTD: jax.Array, kv: Any) -> tuple[jax.Array, Any]:
    layer = nnx.merge(graph_def, params)
    slot_T = jnp.arange(x_BTD.shape[1])
    ones_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
    sequence = Sequence(rope.cos_sin(slot_T[None], cfg), Visibility(slot_T, ones_BT, ones_BT), ones_BT > 0)
    y_BTD = layer.attn_norm(x_BTD)
    if kv is None:
        kv = layer.attn.keys_values(y_BTD, sequence.cos_sin_BTh)
    return layer(x_BTD, y_BTD, kv, sequence, None, False)[0], kv


def _float32(cfg: ModelConfig) -> ModelConfig:
    moe = dataclasses.replace(cfg.moe, dispatch="dropless", group_size=0)
    return dataclasses.replace(cfg, dtype="float32", remat="none", moe=moe)


def _defaults(hf: dict[str, Any]) -> dict[str, Any]:
    """A copy in one spelling, without what only says how the weights are stored."""
    hf = {name: value for name, value in hf.items() if name != "quantization_config"}
    return hf_config.one_spelling(json.loads(json.dumps(hf)))


def _fields(theirs: ModelConfig, ours: ModelConfig):
    """(name, theirs, ours) of every field."""
    for field in dataclasses.fields(theirs):
        a, b = getattr(theirs, field.name), getattr(ours, field.name)
        if dataclasses.is_dataclass(a):
            yield from ((f"{field.name}.{name}", x, y) for name, x, y in _fields(a, b))
        else:
            yield field.name, a, b
