"""Runs the production model on the golden cases, cached per case, for the parity tests.

Letters: B batch, S tokens of a row, T = B * S, D model, K kv heads, H head dim, E experts, V
vocabulary, P CLA groups, L layers.
"""

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.ffn.moe import routing
from hunyuan_jax.layers.ffn.moe.layer import Moe, router_logits
from hunyuan_jax.layers.ffn.swiglu import Mlp
from hunyuan_jax.layers.mixer.attention import Attention
from hunyuan_jax.model.cache import empty_cache
from hunyuan_jax.model.stack import Layer
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel.mesh import single_device_mesh
from support import goldens
from support.goldens import CAPACITY_CASES, Golden
from support.models import cross_entropy

# Absolute tolerance in float32.  The values are of order 1 to 10.  Measured differences are below
# 3e-5, as are those between the official attention implementations.
ATOL = 1e-4
# In these cases the kept tokens depend on the backend: on how its topk breaks ties, and on its
# random shuffle (docs/model.md, "Capacity").  The whole model is compared with the recorded
# assignment as an input.  Routing itself is compared without it.
RECORDED_ASSIGNMENT = ("capacity_drop", "capacity_recycle")


class Run(NamedTuple):
    """What the production model computes on a case.

    logits_BSV, final_norm_BSD: float32.
    key_value: keys and values of each layer in the official layout, [B, S, K, H] each.
    seen: outputs by golden name, a list over layers.
    stats: router metrics [L, ...].
    """

    logits_BSV: np.ndarray
    final_norm_BSD: np.ndarray
    key_value: list[tuple[np.ndarray, np.ndarray]]
    seen: dict[str, list[np.ndarray]]
    stats: dict[str, np.ndarray]


def graph_def(cfg: ModelConfig) -> nnx.GraphDef:
    return nnx.split(
        nnx.eval_shape(lambda: Transformer(cfg, single_device_mesh(), jax.random.key(0)))
    )[0]


@functools.cache
def read(case: str) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns the config and parameters of a case.

    All tokens of a batch are one routing group, as in the official code.  The capacity cases drop.
    """
    golden = goldens.load(case)
    cfg, params = goldens.read_model(golden.folder)
    moe = dataclasses.replace(
        cfg.moe,
        group_size=golden["input_ids"].size,
        dispatch="drop" if case in CAPACITY_CASES else "dropless",
    )
    return dataclasses.replace(cfg, moe=moe), params


def assign_as_recorded(golden: Golden):
    """Returns a replacement of `routing.assign` that uses the recorded assignment.

    It finds the layer by its choices.  The combine weights are computed, not recorded.
    """
    dispatched_LTE, slot_LTE = (
        np.stack(golden.per_layer("dispatched")) > 0,
        np.stack(golden.per_layer("slot")),
    )
    choice_LT = np.stack(golden.per_layer("topk_indices"))[..., 0].astype(np.int32)
    expert_LT = np.where(dispatched_LTE.any(-1), dispatched_LTE.argmax(-1), choice_LT).astype(
        np.int32
    )

    def assign(choice, is_valid_T, cfg, key):
        del is_valid_T, cfg, key
        # If a layer routes differently, no recorded layer matches.  argmax then gives layer 0, and
        # the comparison fails.
        layer = jnp.argmax((jnp.asarray(choice_LT) == choice.expert_Tk[None, :, 0]).all(-1))
        expert_Tk, is_kept_Tk = (
            jnp.asarray(expert_LT)[layer][:, None],
            jnp.asarray(dispatched_LTE.any(-1))[layer][:, None],
        )
        return routing.Assignment(
            expert_Tk=expert_Tk,
            slot_Tk=jnp.asarray(np.maximum(slot_LTE.max(-1), 0))[layer][:, None],
            weight_Tk=jnp.where(
                is_kept_Tk, jnp.take_along_axis(choice.probs_TE, expert_Tk, axis=-1), 0.0
            ),
            is_kept_Tk=is_kept_Tk,
            is_recycled_Tk=is_kept_Tk & (expert_Tk != choice.expert_Tk),
            count_E=jnp.asarray(dispatched_LTE.sum(1, dtype=np.int32))[layer],
        )

    return assign


@contextlib.contextmanager
def reporting(seen: dict[str, list[np.ndarray]]):
    """Makes model code that is traced in the block append each layer's outputs to `seen`."""
    watched = [(Layer, "__call__", "hidden_states"), (Attention, "__call__", "attn_out")]
    watched += [(Moe, "__call__", "moe_out"), (Mlp, "__call__", "dense_out")]

    def report(name, output):
        jax.debug.callback(
            lambda array: seen.setdefault(name, []).append(np.asarray(array)), output, ordered=True
        )

    def reported(method, name):
        def call(module, *args, **kwargs):
            result = method(module, *args, **kwargs)
            report(name, result[0] if isinstance(result, tuple) else result)
            # The router runs inside an island, where nothing can be reported.
            if isinstance(module, Moe):
                report("router_logits", router_logits(args[0], module.router_DE[...]))
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for cls, method, name in watched:
            patch.setattr(cls, method, reported(getattr(cls, method), name))
        yield


@functools.cache
def run(case: str) -> Run:
    """Runs the model on the case's inputs, as one jitted program with an empty cache."""
    golden = goldens.load(case)
    cfg, params = read(case)
    definition = graph_def(cfg)
    ids_BS, mask_BS, positions_BS = golden.inputs

    def forward(params):
        model = nnx.merge(definition, params)
        output = model.prefill(ids_BS, positions_BS, mask_BS, empty_cache(cfg, *ids_BS.shape))
        return model.logits(output.hidden_BTD), output

    seen = {}
    with reporting(seen), pytest.MonkeyPatch.context() as patch:
        if case in RECORDED_ASSIGNMENT:
            patch.setattr(routing, "assign", assign_as_recorded(golden))
        logits_BSV, output = jax.jit(forward)(params)
    jax.effects_barrier()
    seen["mlp_out"] = seen["moe_out" if cfg.is_moe else "dense_out"]
    seen["hidden_states"].insert(0, params["embed"]["embedding_VD"][ids_BS])
    stats = {
        name: np.asarray(a).reshape(cfg.num_layers, *a.shape[2:])
        for name, a in output.stats.items()
    }
    return Run(
        np.asarray(logits_BSV),
        np.asarray(output.hidden_BTD),
        official_cache(cfg, params, output.cache),
        seen,
        stats,
    )


def official_cache(cfg, params, cache) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (keys, values) per layer as the official code caches them.

    There every layer has its own keys, scaled by its key norm.
    """
    pairs, (k_PBSKH, v_PBSKH) = [], cache.entries["layer_0"][:2]
    for layer in range(cfg.num_layers):
        group, i = divmod(layer, cfg.cla_share_factor)
        scale_H = (
            params["groups"][f"layer_{i}"]["attn"]["k_norm_H"][group]
            if cfg.use_qk_norm
            else np.float32(1)
        )
        pairs.append((np.asarray(k_PBSKH[group]) * scale_H, np.asarray(v_PBSKH[group])))
    return pairs


def max_difference(ours_BSx: np.ndarray, golden_BSx: np.ndarray, mask_BS: np.ndarray) -> float:
    """Returns the largest absolute difference over the tokens that are not padding."""
    assert ours_BSx.shape == golden_BSx.shape
    return np.abs(ours_BSx - golden_BSx)[mask_BS > 0].max()


def mean_cross_entropy(logits_BSV, labels_BS) -> jax.Array:
    targets_BT = labels_BS[:, 1:]
    return cross_entropy(
        logits_BSV[:, :-1], jnp.maximum(targets_BT, 0), (targets_BT != -100).astype(np.float32)
    )


def loss_of(definition: nnx.GraphDef, params, ids_BS, labels_BS) -> jax.Array:
    model = nnx.merge(definition, params)
    positions_BS = jnp.broadcast_to(jnp.arange(ids_BS.shape[1]), ids_BS.shape)
    return mean_cross_entropy(
        model.logits(model(ids_BS, positions_BS, jnp.ones_like(ids_BS)).hidden_BTD), labels_BS
    )
