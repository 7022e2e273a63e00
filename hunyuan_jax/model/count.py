"""Parameters, FLOPs and KV cache bytes of a model, from its config alone; imports no jax.

Letters: D model, N query heads, K kv heads, H head dim, F ffn, E experts, k top-k, V vocabulary, L
layers, P CLA groups.
"""

import dataclasses

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.model.layout import group_layout


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sizes of one model.  The fields from `embedding` to `norms` are parameters by part; `total`
    is their sum.

    embedding: the token table, which is the head too when tied; head: the output projection of an
    untied model, else 0.
    attention: query, key, value and output projections with their biases; a consumer layer of a
    CLA group has no key and value.
    mlp: the MLPs of a dense model; experts: the routed experts; shared: the shared ones; router:
    the router matrices.
    norms: norm scales, query and key norms included.
    mtp: parameters of multi-token prediction, which are not in `total` and `active`.
    active: parameters that a token meets: all but the E - k experts of each layer that do not
    serve it.  A tied table counts once.
    flops_per_token: training FLOPs of one token at the given sequence length, see `count`.
    kv_bytes_per_token: bytes of the KV cache per token: one (key, value) pair per CLA group, in
    the compute dtype.
    """

    total: int
    active: int
    embedding: int
    head: int
    attention: int
    mlp: int
    experts: int
    shared: int
    router: int
    norms: int
    mtp: int
    flops_per_token: int
    kv_bytes_per_token: int


def count(cfg: ModelConfig, seq_len: int = 4096) -> Counts:
    """Counts the model of `cfg`.

    flops_per_token = 6 * (weights of the matmuls a token goes through) + 6 * L * N * H * (seq_len
    + 1): each weight costs a multiplication and an addition in the forward pass and twice that in
    the backward pass; a query meets (seq_len + 1) / 2 keys on average (causal, one document), and
    a key costs 4 * N * H in the forward pass (scores, then values).  The head is a matmul, the
    embedding is a lookup.  Multi-token prediction counts where it is trained.  Not counted: norms,
    softmax, activations, padding of expert buffers, the work of rematerialisation.
    """
    D, V, L = cfg.hidden_size, cfg.vocab_size, cfg.num_layers
    mtp_layers, layers = [], []
    for name, stack in cfg.stacks.items():
        found = [part for layer in group_layout(stack) for part in layer.count(stack, seq_len)]
        (mtp_layers if name == "mtp_groups" else layers).extend(found * stack.num_groups)
    parts = dict.fromkeys(_PARTS, 0)
    parts |= {
        "embedding": V * D,
        "head": 0 if cfg.tie_embeddings else V * D,
        "norms": (2 * L + 1) * D,  # two a layer, and the final one
    }
    for layer in layers:
        for name, number in layer.parameters.items():
            parts[name] += number
    total, idle = sum(parts.values()), sum(layer.idle for layer in layers)
    mtp = 0
    if mtp_layers:
        # Two norms of the layer, three around it, and the projection of two inputs to one.
        mtp = 5 * D + 2 * D * D
        mtp += sum(number for layer in mtp_layers for number in layer.parameters.values())
    worked = layers + (mtp_layers if cfg.mtp_loss_weight else [])
    num_heads = 2 if cfg.mtp_loss_weight else 1
    matmul_weights = num_heads * V * D + sum(layer.matmul_weights for layer in worked)
    matmul_weights += 2 * D * D if cfg.mtp_loss_weight else 0
    return Counts(
        total=total,
        active=total - idle,
        **parts,
        mtp=mtp,
        flops_per_token=6 * matmul_weights + sum(layer.flops_per_token for layer in worked),
        kv_bytes_per_token=sum(layer.cache_bytes_per_token for layer in layers),
    )


_PARTS = ("embedding", "head", "attention", "mlp", "experts", "shared", "router", "norms")
