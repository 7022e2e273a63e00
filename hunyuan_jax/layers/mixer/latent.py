"""CLLA-style latent attention: a group of layers shares one quantised latent per token.

    c = rms_norm(W_latent y)                           producer of the group, [L]
    k_n = W_key_n c,  v_n = W_value_n c                every layer and head n, [H] each
    score = (q_n . k_n + rope(q'_n) . rope(k')) / sqrt(H + R)

Cached are the latent in 4 bits and the rotary key k' [R], which all heads share.  Where the cache
is read, W_key is applied to the query and W_value to the mean of the latents, so that attention
runs over latents as if they were one key/value head ("absorbed").
Cross-Layer Latent Attention (arXiv 2410.15252) leaves open: the norm, the rotary key, the
quantiser's groups, and whether up-projections are per layer.  The choices here follow DeepSeek-V2
(arXiv 2405.04434, section 2.1) for the first two; docs/model.md lists all.
Letters: P groups of layers, B batch, T new tokens, S slots, D model, N heads, H head dim, L latent
entries, R rotary entries, g latent entries with a common scale, Z = L + R.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.layers import rope
from hunyuan_jax.layers.kernels import kernel_options
from hunyuan_jax.layers.linear import linear
from hunyuan_jax.layers.mixer.attention import attend
from hunyuan_jax.layers.mixer.kv_cache import write_new
from hunyuan_jax.layers.mixer.paged import attend_pages
from hunyuan_jax.layers.norm import rms_normalize
from hunyuan_jax.layers.protocols import LayerCache, Sequence
from hunyuan_jax.parallel import context, island, rules
from hunyuan_jax.parallel.xla_workarounds import fusion_barrier
from hunyuan_jax.params import declare as params
from pallas_kernels.flash_attention import head_seeds

_ROWS, _ANGLES = ("batch", "seq", "embed"), ("batch", "seq", "head_dim")
_SEQUENCE = Sequence(
    (_ANGLES, _ANGLES), ("batch", "seq"), ("batch",), ("batch",), ("batch", "row")
)
_CACHE, _NEW = ("layers", "batch", "slots", "latent"), ("batch", "seq", "latent")
_LARGEST = 7  # of a 4-bit integer, symmetric around 0


class Latents(NamedTuple):
    """What a group's layers attend to: latent_BSL (dequantised) and rotary_BSR."""

    latent_BSL: jax.Array
    rotary_BSR: jax.Array


class LatentCache(NamedTuple):
    """Latents in 4 bits and rotary keys; a token takes L / 2 + 2 L / g + 2 R bytes a group.

    packed_PBSl: uint8, two 4-bit integers a byte, l = L / 2; scale_PBSg: bfloat16, L / g of them;
    rotary_PBSR: in the compute dtype.
    """

    packed_PBSl: jax.Array
    scale_PBSg: jax.Array
    rotary_PBSR: jax.Array

    def append(
        self,
        group: jax.Array,
        new: tuple[jax.Array, jax.Array, jax.Array],
        sequence: Sequence,
        mesh: Mesh,
    ) -> Self:
        """The cache with (codes [B, T, L], scales [B, T, L / g], rotary keys [B, T, R]) of one
        group behind each row's tokens.
        """
        code_BTL, scale_BTg, rotary_BTR = new
        arrays = (pack(code_BTL), scale_BTg, rotary_BTR)
        if sequence.length_B is None:
            sequence = sequence._replace(length_B=jnp.zeros(code_BTL.shape[0], jnp.int32))
        logical = ((_CACHE,) * 3, (_NEW,) * 3)
        return type(self)(*write_new(tuple(self), arrays, group, sequence, mesh, *logical))

    def view(self, group: jax.Array) -> Latents:
        """The latents of one group."""
        packed, scale, rotary = (
            jax.lax.dynamic_index_in_dim(x, group, keepdims=False) for x in self
        )
        return Latents(dequantize(unpack(packed), scale).astype(rotary.dtype), rotary)

    def pinned(self, mesh: Mesh) -> Self:
        """The same, laid out over the mesh as every call expects it."""
        return type(self)(*(rules.constrain(x, mesh, _CACHE) for x in self))


class LatentAttention(nnx.Module):
    """One layer's queries, up-projections and output projection, and the projections to the latent
    and the rotary key unless it shares those of its group's producer.
    """

    attribute = "latent"

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array, *, shares: bool):
        D, N, H, std = cfg.hidden_size, cfg.num_heads, cfg.head_dim, cfg.init_std
        L, R = cfg.latent.width, cfg.latent.rotary_dim
        context.refuse(mesh, "latent attention (config.model.latent)")
        keys = jax.random.split(key, 6)
        self.cfg = cfg
        self.mesh = mesh
        self.is_producer = not shares

        def matrix(key, shape, *dims):
            return params.param(shape, dims, params.normal(key, std), params.Role.MATRIX)

        self.wq_DNZ = matrix(keys[0], (D, N, H + R), "embed", "heads", "head_dim")
        self.w_key_LNH = matrix(keys[1], (L, N, H), "latent", "heads", "head_dim")
        self.w_value_LNH = matrix(keys[2], (L, N, H), "latent", "heads", "head_dim")
        self.wo_NHD = matrix(keys[3], (N, H, D), "heads", "head_dim", "embed")
        if self.is_producer:
            self.w_latent_DL = matrix(keys[4], (D, L), "embed", "latent")
            self.w_rotary_DR = matrix(keys[5], (D, R), "embed", "latent")
            self.latent_norm_L = params.param((L,), ("norm",), params.ones, params.Role.NORM)

    @staticmethod
    def new_cache(
        cfg: ModelConfig, batch_size: int, num_slots: int, few_bits: str | None = None
    ) -> LatentCache:
        """An empty cache.

        Raises:
          ConfigError: other bits than its own are wanted.
        """
        if few_bits is not None:
            raise ConfigError(
                f"cache_dtype = {few_bits!r}: latent attention keeps four bits already; leave it "
                "out."
            )
        shape, latent = (cfg.num_groups, batch_size, num_slots), cfg.latent
        return LatentCache(
            jnp.zeros((*shape, latent.width // 2), jnp.uint8),
            jnp.zeros((*shape, latent.width // latent.group_size), jnp.bfloat16),
            jnp.zeros((*shape, latent.rotary_dim), cfg.dtype),
        )

    def __call__(
        self, y_BTD: jax.Array, sequence: Sequence, cache: LayerCache, key: jax.Array | None
    ) -> tuple[jax.Array, LayerCache]:
        """(attention's output [B, T, D], the cache with the tokens' latents)."""
        if self.is_producer:
            new, latents = self.latents(y_BTD, sequence.cos_sin_BTh)
            entry = cache.entry
            if entry is not None:
                entry = entry.append(cache.group, new, sequence, self.mesh)
            if sequence.table_BN is not None:
                seen = (*entry, jnp.asarray(cache.group))
            else:
                seen = latents if sequence.length_B is None else entry.view(cache.group)
            cache = LayerCache(entry, cache.group, seen)
        dropout_key = key if self.cfg.attention_dropout else None
        return self.attend(y_BTD, cache.seen, sequence, dropout_key), cache

    def latents(
        self, y_BTD: jax.Array, cos_sin_BTh: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Latents]:
        """(what the cache keeps, what the layers attend to) of the tokens.  Producer only.

        The gradient passes the quantiser as if it were not there (straight-through).
        """
        cfg = self.cfg
        weights, logical = params.declared(self)

        def fn(weights, y_BTD, cos_sin_BTh):
            latent_BTL, rotary_BTR = (
                linear(y_BTD, island.gather_param(weights[name], logical[name], y_BTD.dtype))
                for name in ("w_latent_DL", "w_rotary_DR")
            )
            scale_L = weights["latent_norm_L"].astype(y_BTD.dtype)
            latent_BTL = rms_normalize(latent_BTL, cfg.rms_norm_eps) * scale_L
            rotary_BTR = rope.rotate(rotary_BTR[:, :, None], cos_sin_BTh)[:, :, 0]
            code_BTL, scale_BTg = quantize(latent_BTL, cfg.latent.group_size)
            rounded_BTL = dequantize(code_BTL, scale_BTg).astype(y_BTD.dtype)
            straight_BTL = latent_BTL + jax.lax.stop_gradient(rounded_BTL - latent_BTL)
            return (code_BTL, scale_BTg, rotary_BTR), Latents(straight_BTL, rotary_BTR)

        out_logical = ((_NEW, _NEW, _NEW), Latents(_NEW, _NEW))
        run = island.island(fn, self.mesh, logical, (_ROWS, (_ANGLES, _ANGLES)), out_logical)
        return run(weights, y_BTD, cos_sin_BTh)

    def attend(
        self,
        y_BTD: jax.Array,
        latents: Latents | tuple[jax.Array, ...],
        sequence: Sequence,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Attends from y over the group's latents; returns [B, T, D].  dropout_key None: no
        attention dropout.

        Where the sequence has a table, `latents` are the cache's arrays and the group's index.
        """
        cfg = self.cfg
        weights, logical = params.declared(self)
        options = kernel_options(cfg, self.mesh) | {
            "scale": (cfg.head_dim + cfg.latent.rotary_dim) ** -0.5
        }
        seed_BN = None
        if dropout_key is not None:
            options["dropout_rate"] = cfg.attention_dropout
            # One for each sequence and head, drawn before they are split over the mesh.
            seed_BN = head_seeds(jax.random.key_data(dropout_key), y_BTD.shape[0], cfg.num_heads)

        def fn(weights, y_BTD, latents, sequence, seed_BN):
            w = {
                name: island.gather_param(weights[name], logical[name], y_BTD.dtype)
                for name in ("wq_DNZ", "w_key_LNH", "w_value_LNH", "wo_NHD")
            }
            q_BTNZ = jnp.einsum("BTD,DNZ->BTNZ", y_BTD, w["wq_DNZ"])
            q_BTNH, q_BTNR = jnp.split(q_BTNZ, [cfg.head_dim], axis=-1)
            q_BTNR = rope.rotate(q_BTNR, sequence.cos_sin_BTh)
            if sequence.table_BN is not None:
                scale = options["scale"]
                out_BTNH = absorbed_pages(w, q_BTNH, q_BTNR, latents, sequence, scale)
            else:
                over = up_projected if sequence.length_B is None else absorbed
                out_BTNH = over(w, q_BTNH, q_BTNR, latents, sequence, seed_BN, options)
            out_BTNH = checkpoint_name(out_BTNH, "attended")
            out_BTD = fusion_barrier(jnp.einsum("BTNH,NHD->BTD", out_BTNH, w["wo_NHD"]))
            return island.reduce_sum(out_BTD, "heads")

        latents_logical = Latents(_NEW, _NEW)
        if sequence.table_BN is not None:
            latents_logical = (_CACHE, _CACHE, _CACHE, ())
        in_logical = (_ROWS, latents_logical, _SEQUENCE, ("batch", "heads"))
        arrays = (y_BTD, latents, sequence, seed_BN)
        return island.island(fn, self.mesh, logical, in_logical, _ROWS)(weights, *arrays)


def up_projected(w, q_BTNH, q_BTNR, latents, sequence, seed_BN, options) -> jax.Array:
    """Attention [B, T, N, H] over keys and values of every head, made from the latents: many
    tokens, each of which all later ones read.
    """
    H = q_BTNH.shape[-1]
    latent_BSL, rotary_BSR = latents
    k_BSNH = jnp.einsum("BSL,LNH->BSNH", latent_BSL, w["w_key_LNH"])
    v_BSNH = jnp.einsum("BSL,LNH->BSNH", latent_BSL, w["w_value_LNH"])
    rotary_BSNR = jnp.broadcast_to(rotary_BSR[:, :, None], (*k_BSNH.shape[:3], q_BTNR.shape[-1]))
    q_BTNZ, k_BSNZ = _joined(q_BTNH, q_BTNR), _joined(k_BSNH, rotary_BSNR)
    # Kernels take values of the keys' width.
    v_BSNZ = _joined(v_BSNH, jnp.zeros_like(rotary_BSNR))
    return attend(q_BTNZ, k_BSNZ, v_BSNZ, sequence, seed_BN, **options)[..., :H]


def absorbed(w, q_BTNH, q_BTNR, latents, sequence, seed_BN, options) -> jax.Array:
    """As `up_projected`, over the cached latents as one key/value head: few tokens, whose keys and
    values are not worth making.
    """
    latent_BSL, rotary_BSR = latents
    q_BTNL = jnp.einsum("BTNH,LNH->BTNL", q_BTNH, w["w_key_LNH"])
    k_BS1Z = _joined(latent_BSL, rotary_BSR)[:, :, None]
    v_BS1Z = _joined(latent_BSL, jnp.zeros_like(rotary_BSR))[:, :, None]
    mean_BTNZ = attend(_joined(q_BTNL, q_BTNR), k_BS1Z, v_BS1Z, sequence, seed_BN, **options)
    mean_BTNL = mean_BTNZ[..., : latent_BSL.shape[-1]]
    return jnp.einsum("BTNL,LNH->BTNH", mean_BTNL, w["w_value_LNH"])


def absorbed_pages(w, q_BTNH, q_BTNR, pages, sequence, scale) -> jax.Array:
    """As `absorbed`, reading the cache page by page; pages: its arrays and the group's index."""
    packed_PRSl, scale_PRSg, rotary_PRSR, group = pages

    def read(page_B):
        packed, scale_BSg, rotary_BSR = (
            x[group, page_B] for x in (packed_PRSl, scale_PRSg, rotary_PRSR)
        )
        latent_BSL = dequantize(unpack(packed), scale_BSg).astype(rotary_BSR.dtype)
        k_BS1Z = _joined(latent_BSL, rotary_BSR)[:, :, None]
        return k_BS1Z, _joined(latent_BSL, jnp.zeros_like(rotary_BSR))[:, :, None]

    q_BTNL = jnp.einsum("BTNH,LNH->BTNL", q_BTNH, w["w_key_LNH"])
    end_BT = sequence.length_B[:, None] + 1 + jnp.arange(q_BTNH.shape[1])
    mean_BTNZ, _ = attend_pages(
        _joined(q_BTNL, q_BTNR), read, packed_PRSl.shape[2], sequence.table_BN, end_BT, scale
    )
    return jnp.einsum("BTNL,LNH->BTNH", mean_BTNZ[..., : q_BTNL.shape[-1]], w["w_value_LNH"])


def quantize(x_BTL: jax.Array, group_size: int) -> tuple[jax.Array, jax.Array]:
    """(int8 codes [B, T, L] from -7 to 7, bfloat16 scales [B, T, L / g]): the largest of g entries
    is 7 scales.
    """
    x_BTGg = x_BTL.astype(jnp.float32).reshape(*x_BTL.shape[:2], -1, group_size)
    scale_BTG = (jnp.abs(x_BTGg).max(-1) / _LARGEST).astype(jnp.bfloat16)
    step_BTG = jnp.maximum(scale_BTG.astype(jnp.float32), jnp.finfo(jnp.float32).tiny)
    # The scale is rounded, so that the largest entry may be a bit more than 7 of them.
    code = jnp.clip(jnp.round(x_BTGg / step_BTG[..., None]), -_LARGEST, _LARGEST)
    return code.astype(jnp.int8).reshape(x_BTL.shape), scale_BTG


def dequantize(code_BTL: jax.Array, scale_BTG: jax.Array) -> jax.Array:
    """float32 [B, T, L]."""
    code_BTGg = code_BTL.astype(jnp.float32).reshape(*scale_BTG.shape, -1)
    return (code_BTGg * scale_BTG.astype(jnp.float32)[..., None]).reshape(code_BTL.shape)


def pack(code_L: jax.Array) -> jax.Array:
    """uint8 [..., L / 2]: two codes a byte, the first in the lower half, each plus 8."""
    pairs = (code_L + 8).astype(jnp.uint8).reshape(*code_L.shape[:-1], -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(packed_l: jax.Array) -> jax.Array:
    """Inverse of `pack`: int8 [..., L]."""
    pairs = jnp.stack([packed_l & 15, packed_l >> 4], axis=-1).astype(jnp.int8) - 8
    return pairs.reshape(*packed_l.shape[:-1], -1)


def _joined(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.concatenate([first, second.astype(first.dtype)], axis=-1)
