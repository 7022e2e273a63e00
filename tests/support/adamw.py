"""Reference AdamW in numpy, with the optimizer's parameter groups and clipping."""

import jax.numpy as jnp
import numpy as np

from hunyuan_jax.config import OptimizerConfig


def nest(flat):
    tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


CFG = OptimizerConfig(
    b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1, max_grad_norm=1.0, expert_lr_ratio=0.25
)


# path -> expected learning-rate ratio and weight decay under CFG
SETTINGS = {
    "embed/embedding_VD": (1.0, 0.0),
    "final_norm/scale_D": (1.0, 0.0),
    "lm_head/w_DV": (1.0, 0.1),
    "groups/layer_0/attn/wq_DNH": (1.0, 0.1),
    "groups/layer_0/attn/q_norm_H": (1.0, 0.0),
    "groups/layer_0/attn/bq_NH": (1.0, 0.0),
    "groups/layer_0/moe/router_DE": (1.0, 0.1),
    "groups/layer_0/moe/shared/w_up_DF": (1.0, 0.1),
    "groups/layer_0/moe/experts/w_up_EDF": (0.25, 0.1),
}


def on_device(flat):
    return nest({path: jnp.asarray(leaf) for path, leaf in flat.items()})


def numpy_adamw(cfg, lrs, params, grads_per_step):
    """Runs torch's AdamW in float64, after a global-norm clip."""
    params = {path: p.astype(np.float64) for path, p in params.items()}
    m, v = ({path: np.zeros_like(p) for path, p in params.items()} for _ in range(2))
    for t, (lr, grads) in enumerate(zip(lrs, grads_per_step, strict=True), start=1):
        norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in grads.values()))
        for path, (ratio, decay) in SETTINGS.items():
            grad = grads[path] * min(1.0, cfg.max_grad_norm / norm)
            m[path] = cfg.b1 * m[path] + (1 - cfg.b1) * grad
            v[path] = cfg.b2 * v[path] + (1 - cfg.b2) * grad**2
            m_hat, v_hat = m[path] / (1 - cfg.b1**t), v[path] / (1 - cfg.b2**t)
            params[path] *= 1 - lr * ratio * decay
            params[path] -= lr * ratio * m_hat / (np.sqrt(v_hat) + cfg.eps)
    return params
