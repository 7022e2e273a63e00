"""Parameters, FLOPs and KV cache bytes of a model, from its config alone; imports no jax.

Letters: D model, N query heads, K kv heads, H head dim, F ffn, E experts, k top-k, V vocabulary, L
layers, P CLA groups.
"""

import dataclasses

from hunyuan_jax.config import ModelConfig

_BYTES = {"float32": 4, "bfloat16": 2}


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
    flops_per_token: int
    kv_bytes_per_token: int


def count(cfg: ModelConfig, seq_len: int = 4096) -> Counts:
    """Counts the model of `cfg`.

    flops_per_token = 6 * (weights of the matmuls a token goes through) + 6 * L * N * H * (seq_len
    + 1): each weight costs a multiplication and an addition in the forward pass and twice that in
    the backward pass; a query meets (seq_len + 1) / 2 keys on average (causal, one document), and
    a key costs 4 * N * H in the forward pass (scores, then values).  The head is a matmul, the
    embedding is a lookup.  Not counted: norms, softmax, activations, padding of expert buffers,
    the work of rematerialisation.
    """
    moe, D, V, L, P = cfg.moe, cfg.hidden_size, cfg.vocab_size, cfg.num_layers, cfg.num_groups
    q_width, kv_width = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    projections = 2 * L * D * q_width + 2 * P * D * kv_width
    biases = L * (q_width + D) + 2 * P * kv_width if cfg.attention_bias else 0
    expert = 3 * D * cfg.intermediate_size  # gate, up and down
    parts = {
        "embedding": V * D,
        "head": 0 if cfg.tie_embeddings else V * D,
        "attention": projections + biases,
        "mlp": 0 if cfg.is_moe else L * expert,
        "experts": L * moe.num_experts * expert if cfg.is_moe else 0,
        "shared": L * moe.num_shared_experts * expert,
        "router": L * D * moe.num_experts if cfg.is_moe else 0,
        "norms": L * (2 * D + (2 * cfg.head_dim if cfg.use_qk_norm else 0)) + D,
    }
    idle = L * (moe.num_experts - moe.top_k) * expert
    total = sum(parts.values())
    matmul_weights = (
        projections
        + parts["mlp"]
        + parts["experts"]
        - idle
        + parts["shared"]
        + parts["router"]
        + V * D
    )
    assert total - idle == matmul_weights + biases + parts["norms"] + parts["head"], (
        "a part is missing or counted twice"
    )
    return Counts(
        total=total,
        active=total - idle,
        **parts,
        flops_per_token=6 * matmul_weights + 6 * L * q_width * (seq_len + 1),
        kv_bytes_per_token=2 * P * kv_width * _BYTES[cfg.dtype],
    )
