"""The mixture-of-experts layer: a router, a shared expert and routed experts.

Routing, exchange and experts run inside one shard_map island.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.config import LoraConfig, ModelConfig, MoeConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.layers import lora
from hunyuan_jax.layers.ffn import swiglu as mlp
from hunyuan_jax.layers.ffn.moe import dispatch, experts, routing
from hunyuan_jax.layers.kernels import kernel_options
from hunyuan_jax.parallel import context, island, xla_cpu, xla_workarounds
from hunyuan_jax.params import declare as params
from hunyuan_jax.quant.array import is_quantized
from pallas_kernels import expert_matmul

_ROWS = ("batch", "seq", "embed")
_FEW_TOKENS = 64  # of a routing group
_TARGETS = ("expert_gate", "expert_up", "expert_down")
# The parameters of `Experts`, without adapters, and the names of their dims.
EXPERT_DIMS = {
    "w_gate_EDF": ("experts", "embed", "expert_ffn"),
    "w_up_EDF": ("experts", "embed", "expert_ffn"),
    "w_down_EFD": ("experts", "expert_ffn", "embed"),
}

# As `serve`: (parameters of `Experts` by name, x_gTD, assignment) -> y_gTD.
Serve = Callable[[dict[str, jax.Array], jax.Array, routing.Assignment], jax.Array]


class Experts(nnx.Module):
    """Weights of the E routed experts."""

    def __init__(self, cfg: ModelConfig, key: jax.Array):
        E, D, F = cfg.moe.num_experts, cfg.hidden_size, cfg.expert_size
        sizes = {"experts": E, "embed": D, "expert_ffn": F}
        for (name, dims), matrix_key in zip(
            EXPERT_DIMS.items(), jax.random.split(key, 3), strict=True
        ):
            shape = tuple(sizes[dim] for dim in dims)
            init = params.normal(matrix_key, cfg.init_std)
            setattr(self, name, params.param(shape, dims, init, params.Role.EXPERT))
        lora.declare(self, cfg, jax.random.fold_in(key, 3))


class Moe(nnx.Module):
    """shared(x) + sum of w_e * expert_e(x) over the token's experts (docs/model.md)."""

    attribute = "moe"

    def __init__(self, cfg: ModelConfig, mesh: Mesh, key: jax.Array):
        router_key, experts_key, shared_key = jax.random.split(key, 3)
        self.cfg = cfg
        self.mesh = mesh
        self.router_DE = params.param(
            (cfg.hidden_size, cfg.moe.num_experts),
            ("embed", "router_experts"),
            params.normal(router_key, cfg.init_std),
            params.Role.ROUTER,
        )
        if cfg.moe.selection_bias:
            shape, dims = (cfg.moe.num_experts,), ("norm",)
            self.bias_E = params.param(shape, dims, params.zeros, params.Role.BALANCE)
        self.experts = self.new_experts(cfg, experts_key)
        if num_shared := cfg.moe.num_shared_experts:
            self.shared = mlp.Mlp(cfg, mesh, shared_key, width=num_shared * cfg.expert_size)

    @staticmethod
    def new_experts(cfg: ModelConfig, key: jax.Array) -> nnx.Module:
        """Returns the module with the experts' parameters, in the layout that `server` reads."""
        return Experts(cfg, key)

    def server(self) -> Serve:
        """Returns the function that runs one shard's tokens through their experts."""
        kernels = kernel_options(self.cfg, self.mesh)
        return functools.partial(
            serve,
            dims=params.declared(self.experts).dims,
            cfg=self.cfg.moe,
            kernels=kernels,
            lora_cfg=self.cfg.lora,
        )

    @staticmethod
    def metrics(figures: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """See `router_metrics`."""
        return router_metrics(figures)

    def __call__(
        self, x_BTD: jax.Array, is_valid_BT: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns (output [B, T, D], router figures of the layer).

        The figures are those of `routing.health`, summed over the routing groups, and the means of
        the two router losses.

        Args:
          x_BTD: normalised activations.
          is_valid_BT: false for padding.  Padding takes no capacity; only the shared expert
            sees it.
          key: typed key of this (seed, step, layer); needed for dispatch "recycle" only.
        """
        moe = self.cfg.moe
        if moe.dispatch == "recycle" and key is None:
            raise ValueError(
                "dispatch = 'recycle' draws free slots at random and needs a key; pass one, or "
                "use 'dropless' for inference."
            )
        modules = {"router": self, "experts": self.experts} | (
            {"shared": self.shared} if moe.num_shared_experts else {}
        )
        weights, logical = zip(
            *(params.declared(module) for module in modules.values()), strict=True
        )
        kernels = kernel_options(self.cfg, self.mesh)
        group_size = routing.group_size(moe, *x_BTD.shape[:2])
        fn = functools.partial(
            route_and_serve,
            serve=self.server(),
            dims=dict(zip(modules, logical, strict=True)),
            cfg=moe,
            group_size=group_size,
            kernels=kernels,
            lora_cfg=self.cfg.lora,
        )
        key_data = jax.random.key_data(jax.random.key(0) if key is None else key)
        y_BTD, stats_g = island.island(
            fn,
            self.mesh,
            stored=dict(zip(modules, logical, strict=True)),
            in_logical=(_ROWS, ("batch", "seq"), ()),
            out_logical=(_ROWS, ("routing_groups",)),
        )(dict(zip(modules, weights, strict=True)), x_BTD, is_valid_BT, key_data)
        return y_BTD, {
            name: a.mean(0) if name in routing.LOSSES else a.sum(0) for name, a in stats_g.items()
        }


def router_metrics(stats: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns float32 health metrics of one step from the layers' figures [P, f, ...].

    demand_LE: an expert's share of the layer's choices, before any capacity.
    load_LE: an expert's share of the choices that are served.
    recycled_L, dropped_L: shares of the choices.
    entropy_L: mean entropy of the router, in nats.
    aux_loss, z_loss: means over layers.
    """
    layers = {name: a.reshape(-1, *a.shape[2:]) for name, a in stats.items()}
    choices_L, served_L = layers["wished_E"].sum(-1), layers["served_E"].sum(-1)

    def share(part, whole):
        return part / jnp.maximum(whole, 1.0)

    return {
        "demand_LE": share(layers["wished_E"], choices_L[:, None]),
        "load_LE": share(layers["served_E"], served_L[:, None]),
        "recycled_L": share(layers["recycled"], choices_L),
        "dropped_L": share(choices_L - served_L, choices_L),
        "entropy_L": share(layers["entropy"], layers["tokens"]),
        **{name: layers[name].mean() for name in routing.LOSSES},
    }


def router_logits(x_BTD: jax.Array, router_DE: jax.Array) -> jax.Array:
    """float32 [B, T, E], whatever the activations' dtype."""
    # HIGHEST: by default a TPU multiplies float32 in bfloat16 passes, and near ties would route
    # differently there.
    return jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), router_DE, precision="highest")


def route(
    logits_gTE: jax.Array,
    is_valid_gT: jax.Array,
    cfg: MoeConfig,
    key_g: jax.Array,
    bias_E: jax.Array | None = None,
) -> tuple[routing.Choice, routing.Assignment]:
    """Returns choice and assignment of each routing group: `routing.choose`, `routing.assign`."""
    choice = jax.vmap(lambda logits_TE: routing.choose(logits_TE, cfg, bias_E))(logits_gTE)
    return choice, jax.vmap(lambda c, valid_T, key: routing.assign(c, valid_T, cfg, key))(
        choice, is_valid_gT, key_g
    )


def route_and_serve(
    weights: dict[str, dict[str, jax.Array]],
    x_BTD: jax.Array,
    is_valid_BT: jax.Array,
    key_data: jax.Array,
    *,
    serve: Serve,
    dims: dict[str, dict[str, tuple[str, ...]]],
    cfg: MoeConfig,
    group_size: int,
    kernels: dict[str, Any],
    lora_cfg: LoraConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Routes one shard's groups, exchanges tokens, runs the experts and combines their outputs.
    Runs inside the island.

    Returns (output [B, T, D], figures [g, ...] of each routing group: those of `routing.health`
    and the two router losses).

    Args:
      weights: stored parameters: "router" of `Moe`, "experts" of `Experts`, and "shared" of the
        shared `Mlp` if there is one.
      x_BTD, is_valid_BT, key_data: as for `Moe`.
      serve: runs the tokens through their experts.
      dims: the names of the parameters' dims, a tree like `weights`.
      cfg: settings of the mixture.
      group_size: tokens of a routing group.
      kernels: of `kernel_options`.
      lora_cfg: settings of the adapters.
    """
    B, T, D = x_BTD.shape
    num_chips = island.num_shards("seq")
    if num_chips > 1 and T > 1 and cfg.dispatch == "dropless" and not cfg.group_size:
        group_size = T // 2  # a chunk: without a capacity the groups change no token
    _check_groups_of_chips(T, group_size)
    if B * T % group_size:
        shards = island.num_shards("batch")
        raise ValueError(
            f"A routing group of {group_size} tokens would be split over chips: each of the "
            f"{shards} batch shards holds {B} sequences of "
            f"{T}. Use a config.model.moe.group_size that divides {B * T}, or fewer batch shards."
        )
    num_groups = B * T // group_size
    router_DE = island.gather_param(
        weights["router"]["router_DE"], dims["router"]["router_DE"], jnp.float32
    )
    logits_BTE = router_logits(x_BTD, router_DE)
    x_gTD, logits_gTE, is_valid_gT = (
        a.reshape(num_groups, group_size, *a.shape[2:]) for a in (x_BTD, logits_BTE, is_valid_BT)
    )

    # The key depends on the global index of the group, so a run routes the same on every mesh.
    group_g = _group_numbers(B, T, group_size)
    key_g = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        jax.random.wrap_key_data(key_data), group_g
    )
    bias_E = weights["router"].get("bias_E")
    choice, assignment = route(logits_gTE, is_valid_gT, cfg, key_g, bias_E)

    y_BTD = serve(weights["experts"], x_gTD, assignment).reshape(B, T, D)
    if "shared" in weights:
        # It needs only weights of other shards, so it can overlap with both exchanges of tokens.
        y_BTD = y_BTD + mlp.serve(weights["shared"], dims["shared"], x_BTD, kernels, lora_cfg)
    # Each tensor shard holds the sum over its own slice of F.
    y_BTD = island.reduce_sum(y_BTD, "expert_ffn")
    stats_g = jax.vmap(routing.health)(choice, assignment, is_valid_gT)
    stats_g["aux_loss"] = jax.vmap(routing.balance_loss)(choice, is_valid_gT)
    stats_g["z_loss"] = jax.vmap(routing.z_loss)(logits_gTE, is_valid_gT)
    return y_BTD, stats_g


def _check_groups_of_chips(num_tokens: int, group_size: int) -> None:
    """Raises ConfigError if a group of consecutive tokens lies on several chips of a row, of which
    this one has num_tokens.
    """
    num_chips = island.num_shards("seq")
    if num_chips > 1 and num_tokens // 2 % group_size:
        chunk = num_tokens // 2
        raise ConfigError(
            f"routing groups of {group_size} tokens (config.model.moe.group_size; 0 is a whole "
            f"row) would lie on several chips: config.mesh.context = {num_chips} cuts a row of "
            f"{num_chips * num_tokens} tokens into chunks of {chunk}. Use a group_size that "
            f"divides {chunk}, such as {chunk}; it changes the capacity, so give it to every run "
            "that is compared."
        )


def _group_numbers(num_rows: int, num_tokens: int, group_size: int) -> jax.Array:
    """Returns the numbers that this shard's routing groups have in the whole batch, int32 [g]."""
    num_chips = island.num_shards("seq")
    if num_chips == 1 or num_tokens == 1:  # a group may be several rows
        num_groups = num_rows * num_tokens // group_size
        return island.shard_index("batch") * num_groups + jnp.arange(num_groups)
    per_row = num_tokens // group_size
    row_B1 = island.shard_index("batch") * num_rows + jnp.arange(num_rows)[:, None]
    return (row_B1 * num_chips * per_row + context.parts_here(per_row)).reshape(-1)


def serve(
    weights: dict[str, jax.Array],
    x_gTD: jax.Array,
    assignment: routing.Assignment,
    *,
    dims: dict[str, tuple[str, ...]],
    cfg: MoeConfig,
    kernels: dict[str, Any],
    lora_cfg: LoraConfig,
) -> jax.Array:
    """Returns the weighted outputs [g, T, D] of the assigned experts, summed over this shard's
    slice of F.  Runs inside the island.

    `dims`: the names of the weights' dims.
    """

    def whole(name):
        w = weights[name]
        if is_quantized(w):
            return island.gather_padded(w, dims[name], x_gTD.dtype, tiled="expert_ffn")
        if "expert_ffn" not in dims[name]:  # of an adapter
            return island.gather_param(w, dims[name], x_gTD.dtype)
        if w.shape[0] == 1:
            w_IO = xla_workarounds.one_expert_as_matrix(w)
            w_IO = island.gather_padded(w_IO, dims[name][1:], x_gTD.dtype, tiled="expert_ffn")
            return w_IO[None]
        return island.gather_padded(w, dims[name], x_gTD.dtype, tiled="expert_ffn")

    projections = tuple(lora.adapted(weights, target, lora_cfg, whole) for target in _TARGETS)
    is_adapted = any(projection.a is not None for projection in projections)
    gate_eDF, up_eDF, down_eFD = (projection.w for projection in projections)
    # A few tokens with quantised experts fit a buffer that has room for all at each expert, and
    # run through the kernels, which skip experts without rows.
    is_for_kernels = experts.suits_kernels((gate_eDF, up_eDF, down_eFD))
    if cfg.dispatch == "dropless" and not (is_for_kernels and x_gTD.shape[1] <= _FEW_TOKENS):

        def tiles(x_nbD, weight_nb, tile_expert_n, num_tiles):
            if is_adapted:
                product = functools.partial(
                    experts.tile_matmul, tile_expert_n=tile_expert_n, num_tiles=num_tiles
                )
                return experts.swiglu_adapted(product, x_nbD, weight_nb, projections, kernels)
            return experts.swiglu_tiles(
                x_nbD, weight_nb, tile_expert_n, num_tiles, gate_eDF, up_eDF, down_eFD
            )

        return dispatch.dropless(x_gTD, assignment, gate_eDF.shape[0], tiles)

    def buffers(x_eRD, weight_eR, count_es):
        if is_adapted:
            return experts.swiglu_adapted(
                experts.row_product, x_eRD, weight_eR, projections, kernels
            )
        return expert_matmul.swiglu(
            x_eRD,
            weight_eR,
            count_es if xla_cpu.takes_counts(kernels["device_kind"]) else None,
            *map(experts.for_kernels, (gate_eDF, up_eDF, down_eFD)),
            **kernels,
        )

    return dispatch.by_capacity(x_gTD, assignment, routing.capacity(cfg, x_gTD.shape[1]), buffers)
