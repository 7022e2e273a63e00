"""What holds for every kind of layer: the cache, generation, a folder, a mesh, the count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.infer.pretrained import Pretrained, from_pretrained
from hunyuan_jax.model.cache import empty_cache
from hunyuan_jax.model.count import count
from hunyuan_jax.model.transformer import Transformer
from support.layer_kinds import LATENT, SPARK
from support.models import assert_close, fast_jit, filled, mesh_of

KINDS = {"latent": LATENT, "spark": SPARK}
# Of the weights: latent attention is flat with smaller ones.
STD = {"latent": 0.2, "spark": 0.1}

each_kind = pytest.mark.parametrize("kind", KINDS)


def model_of(cfg: ModelConfig, std: float = 0.3) -> Transformer:
    return filled(lambda: Transformer(cfg, mesh_of(), jax.random.key(0)), std=std)


def arguments(num_rows: int, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens_BT = np.random.default_rng(0).integers(0, 64, (num_rows, length))
    positions_BT = jnp.broadcast_to(jnp.arange(length), (num_rows, length))
    return (
        jnp.asarray(tokens_BT, jnp.int32),
        positions_BT,
        jnp.ones((num_rows, length), jnp.int32),
    )


@pytest.mark.parametrize("kind", ["latent", pytest.param("spark", marks=pytest.mark.slow)])
@pytest.mark.heavy
def test_cache_continues_what_a_whole_pass_computes(kind):
    """In a prompt, in runs of several tokens, and token by token."""
    definition, params = nnx.split(model_of(KINDS[kind], STD[kind]))
    tokens_BT, positions_BT, mask_BT = arguments(2, 37)

    @fast_jit
    def whole(params, *inputs):
        model = nnx.merge(definition, params)
        return model.logits(model(*inputs).hidden_BTD)

    @fast_jit
    def prefill(params, *inputs):
        model = nnx.merge(definition, params)
        output = model.prefill(*inputs, empty_cache(KINDS[kind], 2, 48))
        return model.logits(output.hidden_BTD), output.cache

    @fast_jit
    def extend(params, tokens_BT, cache):
        model = nnx.merge(definition, params)
        output = model.extend(tokens_BT, cache)
        return model.logits(output.hidden_BTD), output.cache

    expected_BTV = whole(params, tokens_BT, positions_BT, mask_BT)
    prompt = (x[:, :9] for x in (tokens_BT, positions_BT, mask_BT))
    logits_BTV, cache = prefill(params, *prompt)
    parts = [logits_BTV]
    for first, last in ((9, 34), *((t, t + 1) for t in range(34, 37))):
        logits_BTV, cache = extend(params, tokens_BT[:, first:last], cache)
        parts.append(logits_BTV)
    assert_close(np.concatenate(parts, axis=1), expected_BTV, 1e-5)
    assert list(cache.entries) == ["layer_0"]  # one for a pair of layers


@each_kind
@pytest.mark.slow
def test_generation_and_its_own_folder(kind, tmp_path):
    """Greedy tokens by the cache are those of whole passes; the folder holds the same model."""
    params = nnx.to_pure_dict(nnx.split(model_of(KINDS[kind], STD[kind]))[1])
    model = Pretrained(KINDS[kind], params)
    ids_BS = np.asarray(arguments(2, 6)[0])
    generated_BT = model.generate(ids_BS, max_new_tokens=6, eos_token_id=())
    by_passes_BT = ids_BS
    for _ in range(6):
        next_B = np.asarray(model.logits(by_passes_BT))[:, -1].argmax(-1)
        by_passes_BT = np.concatenate([by_passes_BT, next_B[:, None]], axis=1)
    np.testing.assert_array_equal(generated_BT, by_passes_BT)

    model.save_pretrained(tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved")
    assert loaded.config == model.config
    np.testing.assert_array_equal(loaded.logits(ids_BS), model.logits(ids_BS))


@pytest.mark.parametrize(
    ("kind", "loss_error", "gradient_error"),
    # A latent that lies between two codes may be rounded the other way on another mesh.
    [("latent", 1e-3, 5e-2), ("spark", 1e-5, 1e-4)],
)
@pytest.mark.parametrize("mesh", [{"tensor": 2, "data": 2}, {"expert": 2, "tensor": 2}])
@pytest.mark.slow
def test_loss_and_gradients_on_a_mesh(kind, loss_error, gradient_error, mesh):
    definition, params = nnx.split(model_of(KINDS[kind]))
    meshed = nnx.split(
        nnx.eval_shape(lambda: Transformer(KINDS[kind], mesh_of(**mesh), jax.random.key(0)))
    )
    tokens_BT, positions_BT, mask_BT = arguments(4, 16)

    def loss(definition, params):
        model = nnx.merge(definition, params)
        hidden_BTD = model(tokens_BT, positions_BT, mask_BT).hidden_BTD
        return model.token_losses(hidden_BTD, tokens_BT).mean()

    expected, actual = (
        fast_jit(jax.value_and_grad(lambda p, d=d: loss(d, p)))(params)
        for d in (definition, meshed[0])
    )
    np.testing.assert_allclose(actual[0], expected[0], rtol=loss_error)
    for one, other in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        assert_close(one, other, gradient_error)


@each_kind
def test_count_is_what_is_built(kind):
    shapes = nnx.split(
        nnx.eval_shape(lambda: Transformer(KINDS[kind], mesh_of(), jax.random.key(0)))
    )[1]
    assert count(KINDS[kind]).total == sum(leaf.size for leaf in jax.tree.leaves(shapes))
