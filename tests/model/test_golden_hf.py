"""Parity with transformers' Hunyuan classes (A13B's and the dense models') on recorded runs of
small random models.

What is compared with transformers itself, which few environments have, is in test_family.py.
Letters: B batch, S tokens of a row, T = B * S, K kv heads, H head dim, E experts, V vocabulary.
"""

import functools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from hunyuan_jax import from_pretrained
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.layers import rope
from support import goldens
from support.folders import tensors_of
from support.goldens import HF_CASES
from support.models import fast_jit
from support.parity import (
    ATOL,
    graph_def,
    loss_of,
    max_difference,
    mean_cross_entropy,
    read,
    run,
)

FLOAT32 = tuple(case for case in HF_CASES if case != "hub_moe_bf16")
MOE = tuple(case for case in FLOAT32 if case.startswith("moe"))


@pytest.mark.skipif(not goldens.COMPLETE_HF.is_dir(), reason="../shared/golden is not there")
def test_copies_equal_the_originals():
    copies = [path for path in goldens.COPIED_HF.rglob("*") if path.is_file()]
    assert len(copies) > 10
    for copy in copies:
        assert (
            copy.read_bytes()
            == (goldens.COMPLETE_HF / copy.relative_to(goldens.COPIED_HF)).read_bytes()
        ), copy


@pytest.mark.parametrize("case", FLOAT32)
def test_logits_and_loss(case):
    golden = goldens.load(case)
    logits_BSV = run(case).logits_BSV
    assert max_difference(logits_BSV, golden["logits"], golden.inputs[1]) < ATOL
    expected = golden["loss"].item()
    if (
        case == "moe_alpha_tied_lists"
    ):  # padded on the left, which asks a row of padding for one target (see Golden.labels)
        assert float(
            mean_cross_entropy(golden["logits"], golden.int32("labels"))
        ) == pytest.approx(expected, abs=1e-5)
        expected = float(mean_cross_entropy(golden["logits"], golden.labels))
    assert float(mean_cross_entropy(logits_BSV, golden.labels)) == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize("case", FLOAT32)
def test_every_layer(case):
    golden, ours = goldens.load(case), run(case)
    mask_BS = golden.inputs[1]
    *hidden, final_norm_BSD = golden.per_layer(
        "hidden_states"
    )  # the last one is after the final norm
    assert max_difference(ours.final_norm_BSD, final_norm_BSD, mask_BS) < ATOL
    expected = {
        "hidden_states": hidden,
        **{name: golden.per_layer(name) for name in ("attn_out", "mlp_out")},
    }
    for name, arrays in expected.items():
        assert len(arrays) >= 2
        for layer, (array, golden_BSD) in enumerate(
            zip(ours.seen[name], arrays, strict=name != "hidden_states")
        ):
            assert max_difference(array, golden_BSD, mask_BS) < ATOL, (name, layer)
    k_BSKH = ours.key_value[0][0]
    assert (
        max_difference(k_BSKH, golden["layer0.key_layernorm.out"].swapaxes(1, 2), mask_BS) < ATOL
    )


@pytest.mark.parametrize("case", MOE)
def test_router_logits(case):
    golden, ours = goldens.load(case), run(case)
    is_token_T = golden.inputs[1].reshape(-1) > 0
    for layer, expected_TE in enumerate(golden.per_layer("router_logits")):
        logits_TE = ours.seen["router_logits"][layer].reshape(expected_TE.shape)
        np.testing.assert_allclose(
            logits_TE[is_token_T], expected_TE[is_token_T], atol=ATOL, rtol=0
        )


@pytest.mark.parametrize("case", FLOAT32)
def test_frequencies(case):
    np.testing.assert_allclose(
        rope.inverse_frequencies(read(case)[0]), goldens.load(case)["inv_freq"], rtol=1e-6
    )


# The others have a dense model and a mixture, tied and untied, with lists and in bfloat16.
SLOW_TOKENS = ("moe_top2_shared", "moe_top1", "dense_alpha_tied")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] if case in SLOW_TOKENS else [])
        for case in HF_CASES
    ],
)
@pytest.mark.heavy
def test_greedy_tokens(case):
    golden = goldens.load(case)
    model = from_pretrained(golden.folder, dtype="float32")
    tokens_BT = model.generate(
        golden["gen_prompt"], golden["gen_mask"], max_new_tokens=24, eos_token_id=()
    )
    np.testing.assert_array_equal(tokens_BT, golden["gen_tokens"])


@pytest.mark.parametrize("case", ["moe_top2_shared", "dense_alpha_tied"])
def test_gradients(case):
    golden = goldens.load(case)
    cfg, params = read(case)
    expected = safetensors.numpy.load_file(golden.folder / "golden_grads.safetensors")
    ids_BS, mask_BS, _ = golden.inputs
    step = fast_jit(jax.grad(functools.partial(loss_of, graph_def(cfg))))
    # Of rows that are padded on the right, the tokens do not see the padding.
    assert (np.diff(mask_BS, axis=1) <= 0).all()
    ours = goldens.official_tensors(cfg, step(params, ids_BS, golden.int32("labels")))
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert np.abs(ours[name] - array).max() <= 1e-4 * np.abs(array).max(), name


def test_top_1_has_weight_one_and_gives_its_router_no_gradient():
    golden = goldens.load("moe_top1")
    cfg, params = read("moe_top1")
    step = fast_jit(jax.grad(functools.partial(loss_of, graph_def(cfg))))
    gradient = step(params, golden.int32("input_ids"), golden.int32("labels"))["groups"][
        "layer_0"
    ]["moe"]
    assert (
        np.abs(gradient["router_DE"]).max()
        < 1e-6
        < 1e-2
        < np.abs(gradient["shared"]["w_up_DF"]).max()
    )


def test_bfloat16():
    """As transformers' own bfloat16 run: the router flips for some tokens, so whole logits are not
    comparable.
    """
    golden = goldens.load("hub_moe_bf16")
    ids_BS, mask_BS, _ = golden.inputs
    model = from_pretrained(golden.folder)
    assert model.config.dtype == "bfloat16"
    logits_BSV, is_token_BS = np.asarray(model.logits(ids_BS, mask_BS)), mask_BS > 0
    for expected_BSV in (golden["logits"], golden["logits_bf16_run"]):
        assert (logits_BSV.argmax(-1) == expected_BSV.argmax(-1))[is_token_BS].mean() >= 0.9
    assert model.loss(ids_BS, golden["labels"], mask_BS) == pytest.approx(
        golden["loss"].item(), rel=0.02
    )


def test_bfloat16_weights_in_float32():
    golden = goldens.load("hub_moe_bf16")
    model = from_pretrained(golden.folder, dtype="float32")
    logits_BSV = np.asarray(model.logits(*golden.inputs))
    assert max_difference(logits_BSV, golden["logits"], golden.inputs[1]) < ATOL


def test_a_base_that_depends_on_the_length_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"rope_scaling.*dynamic without alpha changes its base .* no release uses it",
    ):
        from_pretrained(goldens.folder_of("dense_dynamic_ntk"))


@pytest.mark.parametrize("case", HF_CASES)
def test_folders_are_written_as_they_were_read(case, tmp_path):
    source = goldens.folder_of(case)
    model = from_pretrained(source)
    assert model.config.eos_token_ids == tuple(
        json.loads((source / "generation_config.json").read_text())["eos_token_id"]
    )
    model.save_pretrained(tmp_path / "saved")
    expected = {
        path.name: path.read_bytes()
        for path in source.iterdir()
        if not path.name.startswith("golden")
    }
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == expected


def test_fused_experts_are_read(tmp_path):
    source = goldens.folder_of("moe_top1")
    tensors = tensors_of(source)
    cfg = read("moe_top1")[0]
    for layer in range(cfg.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            np.stack(
                [
                    tensors.pop(f"{prefix}{e}.{kind}_proj.weight")
                    for e in range(cfg.moe.num_experts)
                ]
            )
            for kind in ("gate", "up", "down")
        )
        tensors |= {
            prefix + "gate_up_proj": np.concatenate([gate, up], axis=1),
            prefix + "down_proj": down,
        }
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused/config.json").write_bytes((source / "config.json").read_bytes())
    safetensors.numpy.save_file(tensors, tmp_path / "fused/model.safetensors")
    model = from_pretrained(tmp_path / "fused")
    jax.tree.map(np.testing.assert_array_equal, model.params, from_pretrained(source).params)
    model.save_pretrained(tmp_path / "saved")  # under the names of the hub
    saved = safetensors.numpy.load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == tensors_of(source).keys()

    tensors["model.layers.0.mlp.experts.down_proj"] = tensors[
        "model.layers.0.mlp.experts.down_proj"
    ][:-1]
    safetensors.numpy.save_file(tensors, tmp_path / "fused/model.safetensors")
    with pytest.raises(
        ConfigError,
        match=r"such a model does not have: model\.layers\.0\.mlp\.experts\.down_proj",
    ):
        from_pretrained(tmp_path / "fused")
