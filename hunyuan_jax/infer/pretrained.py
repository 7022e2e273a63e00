"""`from_pretrained`: a model folder or a training checkpoint as one object for notebooks."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer import cpu_layout
from hunyuan_jax.infer import speculate as proposers
from hunyuan_jax.infer.engine import Engine
from hunyuan_jax.infer.request import Limits, Request
from hunyuan_jax.infer.settings import Sampling, checked_ids
from hunyuan_jax.layers import loss as loss_lib
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.parallel import rules, settings
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.params import abstract
from hunyuan_jax.quant.array import is_quantized
from hunyuan_jax.storage import Place
from hunyuan_jax.weights import names, write
from hunyuan_jax.weights.load import load_params
from hunyuan_jax.weights.open import Model, open_model


class Pretrained:
    """A model with its weights.  `input_ids` and friends are anything numpy accepts, [B, S]
    integers.

    config: ModelConfig, whose routing is dropless; mesh: where the arrays lie; params: nested dict
    of arrays and QuantArrays, on the mesh as the rules table says.
    """

    @settings.stated()
    def __init__(
        self,
        config: ModelConfig,
        params: dict[str, Any],
        layout: write.Layout | None = None,
        mesh: Mesh | None = None,
        texts: dict[str, bytes] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ):
        """layout: in which it is saved; None is a new one with the files `texts`, by name;
        defaults: fields of `Limits`, for engines that leave them out.
        """
        self._defaults = dict(defaults or {})
        self._drafts: dict[str, Pretrained] = {}
        self.config = dropless(config)
        self._layout, self._texts = layout, texts or {}
        self.mesh = single_device_mesh() if mesh is None else mesh
        graph_def, specs = abstract_model(self.config, self.mesh)

        def placed(leaf, spec):
            leaf = leaf if is_quantized(leaf) else jax.device_put(leaf, spec.sharding)
            return abstract.row_major(leaf, spec)

        self.params = jax.tree.map(placed, params, specs, is_leaf=is_quantized)
        self._graph_def = graph_def
        self._logits = jax.jit(lambda *args: _logits(graph_def, *args))
        self._loss = jax.jit(
            lambda params, ids, labels, mask: _loss(graph_def, params, ids, mask, labels)
        )

    @settings.stated()
    def logits(
        self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None
    ) -> jax.Array:
        """float32 [B, S, V].  Positions default to 0 ..

        S-1 whatever the mask, as the official forward does.
        """
        ids = self._ids("input_ids", input_ids)
        mask = _mask(attention_mask, ids)
        positions = _arange(ids)
        if position_ids is not None:
            positions = _like("position_ids", position_ids, ids)
            wrong = positions[(mask == 1) & ((positions < 0) | (positions >= 2**31))]
            if wrong.size:
                raise ValueError(
                    f"position_ids holds {wrong[0]} for a token; positions count from 0."
                )
        arrays = (ids, mask, positions.astype(np.int32))
        return self._logits(self.params, *map(self._filled_up, arrays))[: len(ids)]

    @settings.stated()
    def loss(self, input_ids: Any, labels: Any, attention_mask: Any = None) -> float:
        """Returns the mean cross entropy of labels[:, 1:] under logits[:, :-1] in nats.

        Label -100 is ignored.
        """
        ids = self._ids("input_ids", input_ids)
        mask = _mask(attention_mask, ids)
        labels = _like("labels", labels, ids)
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= self.config.vocab_size))]
        if wrong.size:
            raise ValueError(
                f"labels holds {wrong[0]}; a label is an id from 0 to "
                f"{self.config.vocab_size - 1}, or -100 to ignore it."
            )
        return float(
            self._loss(
                self.params,
                self._filled_up(ids),
                self._filled_up(labels.astype(np.int32), -100),
                self._filled_up(mask),
            )
        )

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """int32 [B, S + max_new_tokens]: the prompts and what follows; temperature 0 is greedy.

        The settings are those of the call alone; `hunyuan_jax.load` takes what is not given from
        the folder's generation_config.json.
        Prompts of unequal length are padded on the left and masked.  A row ends with its first
        eos_token_id (default: the config's) and is filled with the padding id.
        """
        ids = self._ids("input_ids", input_ids)
        steps = list(
            self.stream(
                ids,
                attention_mask,
                max_new_tokens,
                temperature,
                top_k,
                top_p,
                repetition_penalty,
                eos_token_id,
                seed,
            )
        )
        new = np.full((ids.shape[0], max_new_tokens), self._fill_id(), np.int32)
        if steps:
            new[:, : len(steps)] = np.stack(steps, axis=1)
        return np.concatenate([ids, new], axis=1)

    def stream(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int = 0,
    ) -> Iterator[np.ndarray]:
        """As `generate`, yielding int32 [B] tokens as they come; ends when every row has ended."""
        ids = self._ids("input_ids", input_ids)
        mask = _mask(attention_mask, ids)
        if not mask[:, -1].all() or (np.diff(mask, axis=1) < 0).any():
            raise ValueError(
                "attention_mask has a 0 after a 1: generation continues the last token of a row, "
                "so pad prompts on the left only."
            )
        given = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        if None in given.values():
            name = next(name for name, value in given.items() if value is None)
            raise ConfigError(
                f"{name} = None must be a number; leave it out for the default, or use "
                "hunyuan_jax.load for what the folder recommends."
            )
        sampling = Sampling(**given).resolved({})
        eos_ids = self.config.eos_token_ids
        if eos_token_id is not None:
            eos_ids = checked_ids("eos_token_id", np.atleast_1d(eos_token_id).tolist())
        if ids.shape[1] + max_new_tokens > self.config.max_position:
            raise ValueError(
                f"{ids.shape[1]} prompt tokens + max_new_tokens = {max_new_tokens} exceed the "
                f"{self.config.max_position} positions of the "
                "model; shorten the prompt or ask for fewer tokens."
            )
        length_B = mask.sum(axis=1)
        rows = [row[-length:] for row, length in zip(ids, length_B, strict=True)]
        return self.stream_rows(rows, sampling, eos_ids)

    def stream_rows(
        self, rows: Sequence[Sequence[int]], sampling: Sampling, stop_ids: tuple[int, ...]
    ) -> Iterator[np.ndarray]:
        """Yields int32 [B] tokens that continue rows of ids, until every row has ended.

        Args:
          rows: each at least one id, in any lengths.
          sampling: resolved; its stop_ids are not read.
          stop_ids: a row ends with the first of these, and is filled with the padding id.
        """
        sampling = dataclasses.replace(sampling, stop_ids=stop_ids)
        requests = [
            Request(str(place), tuple(row), sampling, first_choice=place)
            for place, row in enumerate(rows)
        ]
        return self._in_step(requests)

    def _in_step(self, requests: Sequence[Request]) -> Iterator[np.ndarray]:
        """Yields the i-th token of all requests, for i from 0 on."""
        tokens: list[list[int]] = [[] for _ in requests]
        is_done, num_yielded = [False] * len(requests), 0
        for output in self.engine.run(requests):
            place = int(output.id)
            tokens[place] += output.tokens
            is_done[place] = output.finish_reason is not None
            lengths = [
                len(row) for row, done in zip(tokens, is_done, strict=True) if not done
            ] or [max(map(len, tokens))]
            while num_yielded < min(lengths):
                yield np.array(
                    [
                        row[num_yielded] if num_yielded < len(row) else self._fill_id()
                        for row in tokens
                    ],
                    np.int32,
                )
                num_yielded += 1

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine under `generate`, made when it is first needed."""
        return self.new_engine(Limits())

    def new_engine(self, limits: Limits) -> Engine:
        """An engine of its own, with a cache and programs within these limits.

        Raises:
          ConfigError: limits that the model cannot keep.
        """
        own = {name: getattr(limits, name) or value for name, value in self._defaults.items()}
        limits = dataclasses.replace(limits, **own)
        return Engine(self._graph_def, self.params, limits, self._proposer(limits))

    def _proposer(self, limits: Limits) -> proposers.Proposer:
        if limits.speculate in (None, *proposers.NUM_DRAFTS):
            return proposers.without_model(limits, self.config)
        path = limits.speculate
        if path not in self._drafts:
            self._drafts[path] = load(_open_draft(path, self.config), self.mesh)
        draft = self._drafts[path]
        graph_def, params = draft._graph_def, draft.params
        if cpu_layout.suits(draft.config, draft.mesh):
            graph_def = cpu_layout.graph_def(draft.config, draft.mesh)
            specs = abstract_model(draft.config, draft.mesh)[1]
            params = cpu_layout.unstacked(draft.config, params, specs)
        num = proposers.num_drafts(limits)
        return proposers.Draft(graph_def, params, draft.config, num)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes a model folder with the official names; one that was loaded unchanged comes out
        byte for byte the same.
        """
        layout = self._layout or write.new_layout(self.config, self._texts)
        target = Place(folder)
        read = functools.partial(names.read_tensor, self.params)
        write.write_folder(target, layout, self.config, read)
        write.remove_stale(target, layout)

    def _filled_up(self, array_BS: np.ndarray, value: int = 0) -> np.ndarray:
        """With rows of `value` that make the batch divide over the mesh."""
        num_idle = -len(array_BS) % rules.num_shards(self.mesh, "batch")
        return np.pad(array_BS, ((0, num_idle), (0, 0)), constant_values=value)

    def _fill_id(self) -> int:
        return max(self.config.pad_token_id, 0)

    def _ids(self, name: str, value: Any) -> np.ndarray:
        ids = np.asarray(value)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
            raise ValueError(
                f"{name} has shape {ids.shape} and dtype {ids.dtype}; it must be a non-empty "
                "[batch, length] of integers."
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(
                f"{name} holds the id {ids.min() if ids.min() < 0 else ids.max()}; ids are 0 to "
                f"{self.config.vocab_size - 1}."
            )
        return ids.astype(np.int32)


def from_pretrained(
    path: str | os.PathLike,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    adapter: str | os.PathLike | None = None,
    quantize: str | None = None,
    cache_dtype: str | None = None,
    speculate: str | None = None,
    speculate_tokens: int | None = None,
) -> Pretrained:
    """Loads a model folder with the official names, a checkpoint of `convert_torch.py import`, or
    the newest one of a training run.

    Args:
      path: a folder with config.json and *.safetensors or pytorch_model*.bin, or a GGUF file; the
        id of one on the Hugging Face hub (ORG/NAME or ORG/NAME@REVISION); the --output of an
        import, or the --workdir of a run.
      dtype: "float32" or "bfloat16" for parameters and activations; None keeps what the folder
        says.
      mesh: over which the weights and the work are spread (`parallel.mesh.make_mesh`); the first
        device if None.
      adapter: a folder with a LoRA adapter in PEFT's format, or its hub id; it is merged into the
        weights.
      quantize: "int8", "int4", "fp8" or "easyquant" holds projections and experts in few bits;
        "int8+head" and "fp8+head" embedding and head too; "w8a8" (int8) and "w8a8-fp8" round
        activations too, a scale a token, where the device has such a product;
        "none" turns those of a quantised folder into numbers; None keeps the int8 and int4 of a
        folder, and turns its FP8 into numbers.
      cache_dtype: "int8" or "fp8" keeps keys and values in eight bits while generating; None in
        the model's dtype.
      speculate: "mtp", "ngram" or the folder of a small model with the same vocabulary drafts
        tokens that the model verifies while generating; speculate_tokens: of a draft.

    Raises:
      ConfigError: not such a folder, or tensors that do not fit its config.json.
    """
    limits = {"speculate": speculate, "speculate_tokens": speculate_tokens}
    return load(open_model(path, dtype), mesh, adapter, quantize, cache_dtype, **limits)


@settings.stated()
def load(
    opened: Model,
    mesh: Mesh | None = None,
    adapter: str | os.PathLike | None = None,
    quantize: str | None = None,
    cache_dtype: str | None = None,
    **limits: Any,
) -> Pretrained:
    """As `from_pretrained`, of a model that is open already; limits: further fields of `Limits`
    for engines that leave them out.
    """
    defaults = {"cache_dtype": cache_dtype} | limits
    checked = Limits(**defaults)  # refused before the weights are read
    if checked.speculate in (None, *proposers.NUM_DRAFTS):
        proposers.without_model(checked, opened.cfg)
    else:
        _open_draft(checked.speculate, opened.cfg)
    mesh = single_device_mesh() if mesh is None else mesh
    params = load_params(opened, mesh, quantize, "quantize", adapter)
    texts = None if opened.layout else {n: opened.place.read(n) for n in opened.others}
    return Pretrained(opened.cfg, params, opened.layout, mesh, texts, defaults)


def _open_draft(path: str, cfg: ModelConfig) -> Model:
    """The small model that drafts for one of this config."""
    try:
        opened = open_model(path, cfg.dtype)
    except ConfigError as error:
        raise ConfigError(
            f"speculate = {path} is neither mtp nor ngram, and no model: {error}"
        ) from error
    if opened.cfg.vocab_size != cfg.vocab_size:
        raise ConfigError(
            f"speculate = {path}: its vocabulary has {opened.cfg.vocab_size} tokens, the "
            f"model's {cfg.vocab_size}; they must be the same."
        )
    return opened


def dropless(cfg: ModelConfig) -> ModelConfig:
    """The same model as inference runs it: every token reaches its first choice, and nothing is
    kept for a backward pass.
    """
    # group_size 0: a training run's groups need not fit a prompt, and without a capacity they
    # change nothing but the router figures.
    return dataclasses.replace(
        cfg, remat="none", moe=dataclasses.replace(cfg.moe, dispatch="dropless", group_size=0)
    )


def _logits(graph_def, params, ids_BS, mask_BS, positions_BS):
    model = nnx.merge(graph_def, params)
    return model.logits(model(ids_BS, positions_BS, mask_BS).hidden_BTD)


def _loss(graph_def, params, ids_BS, mask_BS, labels_BS):
    model = nnx.merge(graph_def, params)
    hidden_BSD = model(ids_BS, _arange(ids_BS), mask_BS).hidden_BTD
    targets_BT = labels_BS[:, 1:]
    losses_BT = model.token_losses(hidden_BSD[:, :-1], jnp.maximum(targets_BT, 0))
    return loss_lib.mean_loss(losses_BT, (targets_BT != -100).astype(jnp.float32))


def _arange(ids_BS):
    return np.broadcast_to(np.arange(ids_BS.shape[1], dtype=np.int32), ids_BS.shape)


def _like(name: str, value: Any, ids_BS: np.ndarray) -> np.ndarray:
    """The integers [B, S] of an argument, checked before they are cast."""
    array = np.asarray(value)
    if array.shape != ids_BS.shape:
        raise ValueError(
            f"{name} has shape {array.shape}; it must match input_ids, {ids_BS.shape}."
        )
    if array.dtype.kind not in "biufV":  # bfloat16 is of kind V
        raise ValueError(f"{name} has dtype {array.dtype}; it must hold integers.")
    if array.dtype.kind in "fV":
        array = array.astype(np.float64)
        wrong = array[~(np.abs(array) < 2**31) | (array != np.trunc(array))]
        if wrong.size:
            raise ValueError(f"{name} holds {wrong[0]}; it must hold integers.")
    return array.astype(np.int64)


def _mask(attention_mask: Any, ids_BS: np.ndarray) -> np.ndarray:
    """int32 [B, S], 1 where a token is real; all of them by default."""
    if attention_mask is None:
        return np.ones_like(ids_BS)
    mask_BS = _like("attention_mask", attention_mask, ids_BS)
    wrong = mask_BS[(mask_BS != 0) & (mask_BS != 1)]
    if wrong.size:
        raise ValueError(
            f"attention_mask holds {wrong[0]}; it must be 1 for tokens and 0 for padding. For "
            "several documents in a row, pass them as rows of their own."
        )
    return mask_BS.astype(np.int32)
