"""Facts of `swiglu.Mlp` as the feed-forward network of a dense layer, see layers/facts.py; and
what every SwiGLU has in common.

Letters: D model, F ffn.
"""

from typing import Any

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.facts import Activations, Count, Sizes, Tensor, linear_tensor


def num_parameters(cfg: ModelConfig, width: int) -> int:
    """Of gate, up and down of one SwiGLU of `width` columns."""
    return 3 * cfg.hidden_size * width


def count(cfg: ModelConfig, seq_len: int) -> Count:
    """All its parameters are weights that every token meets."""
    weights = num_parameters(cfg, cfg.intermediate_size)
    return Count({"mlp": weights}, matmul_weights=weights)


def activation_bytes(cfg: ModelConfig, sizes: Sizes) -> Activations:
    """Results of gate and up; backward: the hidden activation and the gradients of that, of gate
    and of up.
    """
    width = sizes.tokens * cfg.intermediate_size / sizes.tensor_ways * sizes.element
    weights = num_parameters(cfg, cfg.intermediate_size) / sizes.tensor_ways
    return Activations(products=2 * width, weights=weights, backward=4 * width)


def official_names(cfg: ModelConfig) -> list[Tensor]:
    """In the order the official module declares them."""
    return projections(cfg, "mlp", "mlp/w_{}_{}", cfg.intermediate_size)


def projections(cfg: ModelConfig, name: str, path: str, width: int, **facts: Any) -> list[Tensor]:
    """gate, up and down of a SwiGLU of `width` columns.

    Args:
      cfg: the model.
      name: of the official module.
      path: our path, with {} for the projection and {} for the letters of its dims.
      width: F.
      facts: further fields of the `Tensor`s.
    """
    D = cfg.hidden_size
    return [
        linear_tensor(f"{name}.{kind}_proj", *shape, path.format(kind, letters), **facts)
        for kind, shape, letters in (
            ("gate", (width, D), "DF"),
            ("up", (width, D), "DF"),
            ("down", (D, width), "FD"),
        )
    ]
