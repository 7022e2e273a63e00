"""Facts of `spark.SparkMlp`, see layers/facts.py.

Letters: D model, F neurons, p predictor entries, u = D - p.
"""

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.layers.facts import Activations, Count, Sizes, Tensor, linear_tensor
from hunyuan_jax.params.roles import Role


def count(cfg: ModelConfig, seq_len: int) -> Count:
    """Training multiplies with all neurons; only decoding on a CPU skips those that are idle."""
    weights = 2 * cfg.hidden_size * cfg.intermediate_size
    return Count({"mlp": weights}, matmul_weights=weights)


def activation_bytes(cfg: ModelConfig, sizes: Sizes) -> Activations:
    """Scores and values of the neurons; backward: the hidden activation, the float32 scores, and
    the gradients of both and of the values.
    """
    neurons = sizes.tokens * cfg.intermediate_size / sizes.tensor_ways
    weights = 2 * cfg.hidden_size * cfg.intermediate_size / sizes.tensor_ways
    return Activations(
        products=2 * neurons * sizes.element,
        weights=weights,
        elementwise=4 * neurons,
        backward=neurons * (3 * sizes.element + 4),
    )


def official_names(cfg: ModelConfig) -> list[Tensor]:
    """Names of this project's own folders; there is no official release of such a model."""
    D, F, p = cfg.hidden_size, cfg.intermediate_size, cfg.predictor_width
    up = ((F, D - p), "spark/w_up_Fu", (F, D - p), Role.MATRIX)
    return [
        linear_tensor("mlp.predictor_proj", F, p, "spark/w_predict_pF"),
        Tensor("mlp.up_proj.weight", *up),
        linear_tensor("mlp.down_proj", D, F, "spark/w_down_FD"),
    ]
