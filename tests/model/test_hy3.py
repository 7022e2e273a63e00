"""Hy3 against recorded runs of transformers' class on small random models.

Letters: B batch, S tokens of a row, T = B * S, k choices, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from hunyuan_jax import from_pretrained
from hunyuan_jax.layers.ffn.moe import layer as moe
from hunyuan_jax.layers.ffn.moe import routing
from hunyuan_jax.model.cache import empty_cache
from hunyuan_jax.weights import reference
from support import goldens
from support.models import fast_jit
from support.parity import graph_def, max_difference

CASES = ("hy3_hub_bf16", "hy3_top2")


@functools.cache
def read(case):
    golden = goldens.load(case)
    return golden, from_pretrained(golden.folder, dtype="float32")


@pytest.mark.skipif(not goldens.COMPLETE_HY3.is_dir(), reason="../shared/golden is not there")
def test_copies_equal_the_originals():
    copies = [path for path in goldens.COPIED_HY3.rglob("*") if path.is_file()]
    assert len(copies) > 5
    for copy in copies:
        original = goldens.COMPLETE_HY3 / copy.relative_to(goldens.COPIED_HY3)
        assert copy.read_bytes() == original.read_bytes(), copy


@pytest.mark.parametrize("case", [CASES[0], pytest.param(CASES[1], marks=pytest.mark.slow)])
@pytest.mark.heavy
def test_logits_loss_and_greedy_tokens(case):
    golden, model = read(case)
    ids_BS, mask_BS, _ = golden.inputs
    assert max_difference(np.asarray(model.logits(ids_BS, mask_BS)), golden["logits"], mask_BS) < (
        1e-4
    )
    loss = model.loss(ids_BS, golden["labels"], mask_BS)
    assert loss == pytest.approx(golden["loss"].item(), abs=1e-5)
    tokens_BT = model.generate(
        golden["gen_prompt"], golden["gen_mask"], max_new_tokens=24, eos_token_id=()
    )
    np.testing.assert_array_equal(tokens_BT, golden["gen_tokens"])


@pytest.mark.parametrize("case", CASES)
def test_experts_and_keys(case, monkeypatch):
    """The same experts for every token, with the same weights; the same keys in the cache."""
    golden, model = read(case)
    ids_BS, mask_BS, positions_BS = golden.inputs
    seen = []
    choose = routing.choose

    def chosen(logits_TE, cfg, bias_E):
        choice = choose(logits_TE, cfg, bias_E)
        weight_Tk = routing.assign(choice, jnp.ones(len(logits_TE), bool), cfg, None).weight_Tk
        jax.debug.callback(lambda *a: seen.append(a), choice.expert_Tk, weight_Tk, ordered=True)
        return choice

    # Inside the island and a vmap nothing can be reported: one routing group, without both.
    monkeypatch.setattr(moe.Moe, "__call__", _moe_without_island(chosen))
    cfg = model.config
    definition = graph_def(cfg)

    def forward(params):
        transformer = nnx.merge(definition, params)
        cache = empty_cache(cfg, *ids_BS.shape)
        return transformer.prefill(ids_BS, positions_BS, mask_BS, cache).cache.entries

    entries = jax.jit(forward)(model.params)
    jax.effects_barrier()
    is_token_T = mask_BS.reshape(-1) > 0
    assert len(seen) == cfg.num_layers - 1
    for index, (expert_Tk, weight_Tk) in enumerate(seen, start=1):
        order_Tk = np.argsort(expert_Tk, axis=-1)
        expected_Tk = golden[f"topk_index.{index}"]
        ours_Tk = np.take_along_axis(expert_Tk, order_Tk, -1)
        np.testing.assert_array_equal(ours_Tk[is_token_T], expected_Tk[is_token_T])
        ours_Tk = np.take_along_axis(np.asarray(weight_Tk), order_Tk, -1)
        expected_Tk = golden[f"topk_weight.{index}"]
        np.testing.assert_allclose(ours_Tk[is_token_T], expected_Tk[is_token_T], atol=1e-4)
    k_PBSKH, v_PBSKH = entries["dense_layer_0"][:2]
    rows = golden["full_rows"]
    for ours, name in ((k_PBSKH, "key"), (v_PBSKH, "value")):
        expected = golden[f"layer0.cache_{name}"].swapaxes(1, 2)
        np.testing.assert_allclose(np.asarray(ours)[0, rows], expected, atol=1e-4)


def _moe_without_island(choose):
    def call(self, x_BTD, is_valid_BT, key):
        del is_valid_BT, key
        B, T, _ = x_BTD.shape
        logits_BTE = moe.router_logits(x_BTD, self.router_DE[...])
        choice = choose(logits_BTE.reshape(B * T, -1), self.cfg.moe, self.bias_E[...])
        weight_TE = jnp.zeros(choice.score_TE.shape).at[
            jnp.arange(B * T)[:, None], choice.expert_Tk
        ]
        assignment = routing.assign(choice, jnp.ones(B * T, bool), self.cfg.moe, None)
        weight_TE = weight_TE.set(assignment.weight_Tk)
        gate, up, down = (self.experts.w_gate_EDF, self.experts.w_up_EDF, self.experts.w_down_EFD)
        x_MD = x_BTD.reshape(B * T, -1)
        h_EMF = jax.nn.silu(jnp.einsum("MD,EDF->EMF", x_MD, gate[...]))
        h_EMF = h_EMF * jnp.einsum("MD,EDF->EMF", x_MD, up[...])
        y_MD = jnp.einsum("EMF,EFD,ME->MD", h_EMF, down[...], weight_TE)
        shared_BTD, _ = self.shared(x_BTD, None, None)
        return y_MD.reshape(x_BTD.shape) + shared_BTD, {}

    return call


def test_gradients():
    golden, model = read("hy3_top2")
    expected = safetensors.numpy.load_file(golden.folder / "golden_grads.safetensors")
    ids_BS, mask_BS, positions_BS = golden.inputs
    definition = graph_def(model.config)

    def loss(params):
        transformer = nnx.merge(definition, params)
        hidden_BSD = transformer(ids_BS, positions_BS, mask_BS).hidden_BTD
        losses_BT = transformer.token_losses(hidden_BSD[:, :-1], np.maximum(labels_BS[:, 1:], 0))
        is_label_BT = (labels_BS[:, 1:] != -100).astype(np.float32)
        return (losses_BT * is_label_BT).sum() / is_label_BT.sum()

    labels_BS = golden.int32("labels")
    ours = goldens.official_tensors(model.config, fast_jit(jax.grad(loss))(model.params))
    biases = {name for name in ours if name.endswith("expert_bias")}
    assert ours.keys() - biases == expected.keys()
    assert all(not ours[name].any() for name in biases)
    for name, array in expected.items():
        assert np.abs(ours[name] - array).max() <= 1e-4 * max(np.abs(array).max(), 1e-6), name


def test_bfloat16():
    """As transformers' own bfloat16 run, whose tokens and loss differ from its float32 run's."""
    golden = goldens.load("hy3_hub_bf16")
    ids_BS, mask_BS, _ = golden.inputs
    model = from_pretrained(golden.folder)
    assert (model.config.dtype, model.config.num_mtp_layers) == ("bfloat16", 1)
    logits_BSV = np.asarray(model.logits(ids_BS, mask_BS))
    is_token_BS = mask_BS > 0
    for name in ("logits", "logits_bf16_run", "logits_bf16_run_fp32_head"):
        agree_BS = logits_BSV.argmax(-1) == golden[name].argmax(-1)
        assert agree_BS[is_token_BS].mean() >= 0.9, name
    assert model.loss(ids_BS, golden["labels"], mask_BS) == pytest.approx(
        golden["loss"].item(), abs=0.03
    )


def test_a_head_that_is_not_float32_rounds_its_logits():
    golden, model = read("hy3_hub_bf16")
    ids_BS, labels_BS = golden.int32("input_ids")[:, :8], golden.int32("labels")[:, :8]
    outputs = []
    for fp32_head in (True, False):
        cfg = dataclasses.replace(model.config, dtype="bfloat16", fp32_head=fp32_head)
        run = fast_jit(lambda params, cfg=cfg: _logits_and_loss(cfg, params, ids_BS, labels_BS))
        outputs.append(jax.tree.map(np.asarray, run(model.params)))
    (exact_BSV, exact_loss), (rounded_BSV, rounded_loss) = outputs
    np.testing.assert_array_equal(
        rounded_BSV, np.asarray(exact_BSV.astype(jnp.bfloat16).astype(np.float32))
    )
    assert (exact_BSV != rounded_BSV).any()
    assert 0 < abs(exact_loss - rounded_loss) < 0.1


def _logits_and_loss(cfg, params, ids_BS, labels_BS):
    model = nnx.merge(graph_def(cfg), params)
    positions_BS = jnp.broadcast_to(jnp.arange(ids_BS.shape[1]), ids_BS.shape)
    hidden_BSD = model(ids_BS, positions_BS, jnp.ones_like(ids_BS)).hidden_BTD
    return model.logits(hidden_BSD), model.token_losses(
        hidden_BSD, jnp.maximum(labels_BS, 0)
    ).mean()


@pytest.mark.cases(1)
@pytest.mark.parametrize("dispatch", ["drop", "recycle"])
def test_a_roomy_capacity_equals_dropless(dispatch):
    golden, model = read("hy3_hub_bf16")
    settings = dataclasses.replace(model.config.moe, dispatch=dispatch, capacity_factor=8.0)
    cfg = dataclasses.replace(model.config, moe=settings)
    ids_BS = golden.int32("input_ids")[:, :8]

    def logits(params):
        transformer = nnx.merge(graph_def(cfg), params)
        positions_BS = jnp.broadcast_to(jnp.arange(8), ids_BS.shape)
        key = jax.random.key(0)
        output = transformer(ids_BS, positions_BS, jnp.ones_like(ids_BS), key=key)
        return transformer.logits(output.hidden_BTD)

    ours, expected = fast_jit(logits)(model.params), model.logits(ids_BS)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_multi_token_prediction():
    """Against the formula, from the layer's own parts."""
    golden, model = read("hy3_hub_bf16")
    cfg = model.config
    ids_BS = golden.int32("input_ids")[:, :8]
    next_BS = np.roll(ids_BS, -1, axis=1)
    positions_BS = np.broadcast_to(np.arange(8, dtype=np.int32), ids_BS.shape)
    ones_BS = np.ones_like(ids_BS)

    def run(params):
        transformer = nnx.merge(graph_def(cfg), params)
        hidden_BSD = transformer(ids_BS, positions_BS, ones_BS).hidden_BTD
        output = transformer.predict_next(hidden_BSD, next_BS, positions_BS, ones_BS)
        return hidden_BSD, output.hidden_BTD

    hidden_BSD, ours_BSD = map(np.asarray, fast_jit(run)(model.params))
    tensors = goldens.official_tensors(cfg, model.params)
    prefix = f"model.layers.{cfg.num_layers}."

    def norm(x, name):
        scale = tensors[f"{prefix}{name}.weight"]
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + cfg.rms_norm_eps) * scale

    embedded_BSD = tensors["model.embed_tokens.weight"][next_BS]
    embedded_BSD = np.where(positions_BS[..., None] == 0, 0, embedded_BSD)
    both = np.concatenate([norm(embedded_BSD, "enorm"), norm(hidden_BSD, "hnorm")], axis=-1)
    x_BSD = both @ tensors[f"{prefix}eh_proj.weight"].T
    hf = {
        "model_type": "hy_v3",
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "moe_topk": cfg.moe.top_k,
    }
    for x_SD, actual_SD in zip(x_BSD, ours_BSD, strict=True):
        y_SD, _ = reference.layer(hf, tensors.__getitem__, cfg.num_layers, x_SD, None)
        np.testing.assert_allclose(actual_SD, norm(y_SD, "final_layernorm"), atol=2e-4)
