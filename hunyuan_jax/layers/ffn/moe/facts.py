"""Facts of `layer.Moe`, see layers/facts.py.

Letters: D model, F ffn, E experts, k top-k.
"""

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.facts import Activations, Count, Sizes, Tensor, linear_tensor
from hunyuan_jax.layers.ffn.swiglu_facts import num_parameters, projections
from hunyuan_jax.params.roles import Role


def count(cfg: ModelConfig, seq_len: int) -> Count:
    """A token uses k of the E routed experts, the shared experts and the router."""
    moe, expert = cfg.moe, num_parameters(cfg, cfg.expert_size)
    parts = {
        "experts": moe.num_experts * expert,
        "shared": moe.num_shared_experts * expert,
        "router": cfg.hidden_size * moe.num_experts,
    }
    idle = (moe.num_experts - moe.top_k) * expert
    matmul_weights = sum(parts.values()) - idle
    if moe.selection_bias:
        parts["router"] += moe.num_experts
    return Count(parts, matmul_weights=matmul_weights, idle=idle)


def activation_bytes(cfg: ModelConfig, sizes: Sizes) -> Activations:
    """products: the dispatched rows, and gate and up of the routed and shared experts.
    elementwise: rows before, after and on the way back from the experts.
    backward: of one SwiGLU, that of the routed or that of the shared experts, the larger one.
    """
    moe, D = cfg.moe, cfg.hidden_size
    width = cfg.expert_size / sizes.tensor_ways
    shared_width = width * max(1, moe.num_shared_experts)
    per_token = 2 * shared_width if moe.num_shared_experts else 0
    per_row = D + 2 * width
    num_experts = moe.num_experts / sizes.expert_ways + moe.num_shared_experts
    return Activations(
        products=(sizes.tokens * per_token + sizes.rows * per_row) * sizes.element,
        weights=num_experts * num_parameters(cfg, cfg.expert_size) / sizes.tensor_ways,
        elementwise=3 * sizes.rows * D * sizes.element,
        backward=4 * max(sizes.rows * width, sizes.tokens * shared_width) * sizes.element,
    )


def official_names(cfg: ModelConfig) -> list[Tensor]:
    """In the order the official module declares them.  Hy3's routers, which have scores of their
    own, have other names than those of its predecessors.
    """
    moe, D, F = cfg.moe, cfg.hidden_size, cfg.expert_size
    router = "mlp.router.gate" if moe.scoring == "sigmoid" else "mlp.gate.wg"
    table = []
    if moe.num_shared_experts:
        width = F * moe.num_shared_experts
        table += projections(cfg, "mlp.shared_mlp", "moe/shared/w_{}_{}", width)
    table.append(linear_tensor(router, moe.num_experts, D, "moe/router_DE", role=Role.ROUTER))
    if moe.selection_bias:
        shape = (moe.num_experts,)
        table.append(Tensor("mlp.expert_bias", shape, "moe/bias_E", shape, Role.BALANCE))
    for expert in range(moe.num_experts):
        name, path = f"mlp.experts.{expert}", "moe/experts/w_{}_E{}"
        table += projections(cfg, name, path, F, role=Role.EXPERT, expert=expert)
    return table
