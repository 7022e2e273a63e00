"""Latent attention: quantiser, cache and its bytes, absorbed products, gradients, a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hunyuan_jax import presets
from hunyuan_jax.config import LatentConfig, LoraConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.layers import rope
from hunyuan_jax.layers.mixer import latent
from hunyuan_jax.layers.protocols import Sequence
from hunyuan_jax.model.count import count
from support.layer_kinds import LATENT as MODEL
from support.models import assert_close, fast_jit, filled, mesh_of


def test_codes_are_packed_two_a_byte():
    code_TL = jnp.asarray(np.random.default_rng(0).integers(-7, 8, (3, 32)), jnp.int8)
    packed_Tl = latent.pack(code_TL)
    assert packed_Tl.shape == (3, 16) and packed_Tl.dtype == jnp.uint8
    np.testing.assert_array_equal(latent.unpack(packed_Tl), code_TL)


def test_quantiser_rounds_to_a_15th_of_the_largest_entry():
    x_BTL = jnp.asarray(np.random.default_rng(1).normal(size=(1, 64, 32)), jnp.float32)
    code_BTL, scale_BTG = latent.quantize(x_BTL, 16)
    assert scale_BTG.shape == (1, 64, 2) and scale_BTG.dtype == jnp.bfloat16
    error_BTGg = np.abs(latent.dequantize(code_BTL, scale_BTG) - x_BTL).reshape(1, 64, 2, 16)
    step_BTG1 = np.asarray(scale_BTG, np.float32)[..., None]
    # Half a step, and for the largest entry what bfloat16 has rounded off 7 scales.
    assert (error_BTGg <= 0.53 * step_BTG1).all()
    assert error_BTGg.max() > 0.4 * step_BTG1.min()


def test_zeros_stay_zeros():
    code_BTL, scale_BTG = latent.quantize(jnp.zeros((1, 2, 32)), 16)
    np.testing.assert_array_equal(latent.dequantize(code_BTL, scale_BTG), 0.0)


def test_a_layer_against_numpy():
    module = filled(
        lambda: latent.LatentAttention(MODEL, mesh_of(), jax.random.key(0), shares=False)
    )
    y_BTD = jnp.asarray(np.random.default_rng(2).normal(size=(1, 6, 32)), jnp.float32)
    cos_sin = rope.cos_sin(jnp.arange(6)[None], MODEL)
    sequence = Sequence(cos_sin, jnp.ones((1, 6), jnp.int32))
    definition, state = nnx.split(module)

    @fast_jit
    def layer(state, y_BTD):
        module = nnx.merge(definition, state)
        _, latents = module.latents(y_BTD, cos_sin)
        return module.attend(y_BTD, latents, sequence, None)

    out_TD = layer(state, y_BTD)[0]

    w = {
        name: np.asarray(getattr(module, name)[...], np.float64)
        for name in vars(module)
        if "_" in name and name[0] == "w"
    }
    y_TD = np.asarray(y_BTD[0], np.float64)
    c_TL = y_TD @ w["w_latent_DL"]
    c_TL = c_TL / np.sqrt((c_TL**2).mean(1, keepdims=True) + MODEL.rms_norm_eps)
    c_TL = c_TL * np.asarray(module.latent_norm_L[...])
    scale_TG1 = np.abs(c_TL.reshape(6, 2, 16)).max(-1, keepdims=True) / 7
    c_TL = (np.round(c_TL.reshape(6, 2, 16) / scale_TG1) * scale_TG1).reshape(6, 32)

    def rotated(x_TH):
        cos_Th, sin_Th = (np.asarray(a[0]) for a in cos_sin)
        first, second = np.split(x_TH, 2, axis=-1)
        return np.concatenate(
            [first * cos_Th - second * sin_Th, second * cos_Th + first * sin_Th], axis=-1
        )

    rotary_TR = rotated(y_TD @ w["w_rotary_DR"])
    expected_TD = np.zeros((6, 32))
    for n in range(4):
        q_TZ = y_TD @ w["wq_DNZ"][:, n]
        k_TH, v_TH = c_TL @ w["w_key_LNH"][:, n], c_TL @ w["w_value_LNH"][:, n]
        score_TS = (q_TZ[:, :8] @ k_TH.T + rotated(q_TZ[:, 8:]) @ rotary_TR.T) / 4
        weight_TS = np.exp(np.where(np.tri(6, dtype=bool), score_TS, -np.inf))
        weight_TS /= weight_TS.sum(1, keepdims=True)
        expected_TD += weight_TS @ v_TH @ w["wo_NHD"][n]
    # Scales are bfloat16 there, and exact here.
    assert_close(out_TD, expected_TD, 5e-3)


def test_bytes_at_the_size_of_a52b():
    """256 bytes of codes, 8 of scales and 128 of the rotary key a pair of layers: 0.77 % of what
    multi-head attention keeps; within the paper's "below 2 %".
    """
    a52b = presets.a52b()
    many_heads = dataclasses.replace(a52b, num_kv_heads=80, cla_share_factor=1)
    ours = dataclasses.replace(
        a52b, num_kv_heads=80, use_qk_norm=False, latent=LatentConfig(width=512)
    )
    assert count(ours).kv_bytes_per_token == 32 * (256 + 8 + 128) == 12_544
    assert count(many_heads).kv_bytes_per_token == 64 * 2 * 80 * 80 * 2 == 1_638_400
    entry = nnx.eval_shape(lambda: latent.LatentAttention.new_cache(ours, 1, 1024))
    allocated = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(entry))
    assert allocated == 1024 * count(ours).kv_bytes_per_token


def test_gradient_passes_the_quantiser():
    """It is that of the layer without rounding, taken where the rounding has led."""
    module = filled(
        lambda: latent.LatentAttention(MODEL, mesh_of(), jax.random.key(0), shares=False)
    )
    definition, params = nnx.split(module)
    y_BTD = jnp.asarray(np.random.default_rng(3).normal(size=(1, 6, 32)), jnp.float32)
    cos_sin = rope.cos_sin(jnp.arange(6)[None], MODEL)

    def summed(params):
        return nnx.merge(definition, params).latents(y_BTD, cos_sin)[1].latent_BSL.sum()

    gradient_DL = fast_jit(jax.grad(summed))(params)["w_latent_DL"][...]
    x_TL, vjp = jax.vjp(lambda w_DL: y_BTD[0] @ w_DL, module.w_latent_DL[...])

    def normed(x_TL):
        rms_T1 = jnp.sqrt((x_TL**2).mean(-1, keepdims=True) + MODEL.rms_norm_eps)
        return (x_TL / rms_T1 * module.latent_norm_L[...]).sum()

    assert_close(gradient_DL, vjp(jax.grad(normed)(x_TL))[0], 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_qk_norm": True}, r"use_qk_norm = True does not act on latent attention"),
        ({"attention_bias": True}, r"attention_bias = True does not act on latent attention"),
        ({"num_kv_heads": 2}, r"num_kv_heads = 2 must be num_heads = 4"),
        ({"lora": LoraConfig(rank=2)}, r"latent attention has no adapters"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(MODEL, **change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 100}, r"width = 100 must be a multiple of twice group_size = 128"),
        ({"rotary_dim": 7}, r"rotary_dim = 7 must be even"),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message):
        LatentConfig(**settings)
