"""AdamW with global-norm clipping.

Each parameter group has its own learning-rate ratio and weight decay.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hunyuan_jax.config import OptimizerConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.optim.groups import ParamGroup, assign_groups, default_groups
from hunyuan_jax.quant.scaled import Scaled, dequantize, is_scaled, quantize


class Optimizer(NamedTuple):
    """Pure functions of the parameters as `scaled.store_params` made them.

    init: params -> opt_state, all zeros.
    step: (grads, opt_state, params, accept) -> (new params, new opt_state, norm of the gradient
      before clipping, a float32 scalar).

    grads: one float32 or bfloat16 array per parameter, never Scaled.
    accept: norm -> bool [].  If False, params and opt_state are returned unchanged.  By default a
      step is accepted if its norm is finite.

    Call `step` under jit and donate opt_state and params.  The jitted function must return them in
    the order it takes them: a donated buffer goes to the first result of its shape and dtype.
    """

    init: Callable[[Any], Any]
    step: Callable[..., tuple[Any, Any, jax.Array]]


class QuantizedState(NamedTuple):
    """State of "fp8_lm".

    count: int32, number of steps done.
    mu: first moments, a tree like the parameters: Scaled float8_e4m3fn for a Scaled parameter,
      else float32.
    root_nu: square roots of the second moments, likewise: Scaled float16 or float32.
    """

    count: jax.Array
    mu: Any
    root_nu: Any


def build_optimizer(
    cfg: OptimizerConfig,
    schedule: optax.Schedule,
    specs: Any,
    *,
    is_moe: bool,
    is_lora: bool = False,
) -> Optimizer:
    """Returns AdamW over the parameter tree.

    One step for a parameter p of a group with ratio r and decay wd, where m and v are the
    bias-corrected moments of the clipped gradient and lr = schedule(number of steps done before):

        p -= lr * r * (m / (sqrt(v) + eps) + wd * p)

    For r = 1 this is torch.optim.AdamW, the optimizer of the official fine-tuning code
    (docs/model.md, Optimizer).  The ratio scales the decay too: AdamW with a smaller learning rate
    does the same, and the paper does not say otherwise.  Clipping omits the 1e-6 that torch adds
    to the norm.

    Arithmetic is float32 for every `cfg.state_dtype`.  It decides what is kept between steps:

    * "float32", 12 bytes a parameter: p, m and v in float32.
    * "bfloat16", 8 bytes: p in float32, m and v of every parameter in bfloat16.
    * "fp8_lm", 5 bytes for matrices (`_quantized`): p in float16, m in float8 and sqrt(v) in
      float16, with power-of-two scales.

    The state has only arrays: two trees of moments with the structure, shapes and sharding of the
    parameters, and int32 counts.  A moment's path ends in its parameter's path, followed by
    "/value" or "/inv_scale" if it is Scaled.  All groups share one tree of moments, so the state's
    layout does not depend on the groups.

    Args:
      cfg: config.optimizer.
      schedule: step -> learning rate, as `build_schedule` returns it.
      specs: nested dict of the parameters' `ParamSpec`s; only their roles are used.
      is_moe: whether the model has routed experts (`ModelConfig.is_moe`).
      is_lora: whether the parameters are LoRA adapters.

    Raises:
      ConfigError: a parameter without a group, a group without a parameter, or a moment that
        decays too slowly for its dtype.
    """
    by_name = {group.name: group for group in default_groups(cfg, is_moe=is_moe, is_lora=is_lora)}
    names = assign_groups(specs, tuple(by_name.values()))
    groups = jax.tree.map(lambda name: by_name[name], names)
    if cfg.state_dtype == "fp8_lm":
        return _quantized(cfg, schedule, groups)
    return _elementwise(cfg, schedule, groups)


def _elementwise(cfg: OptimizerConfig, schedule: optax.Schedule, groups: Any) -> Optimizer:
    """Returns the optimizer of the "float32" and "bfloat16" states.

    It is an optax chain, which XLA fuses into one pass over each parameter.
    """
    dtype = jnp.dtype(cfg.state_dtype)
    for name in ("b1", "b2"):
        _require_decay(cfg, name, getattr(cfg, name), dtype)
    chain = optax.chain(
        optax.stateless(
            lambda grads, params: optax.tree.scale(
                _clip_factor(cfg, optax.tree.norm(grads)), grads
            )
        ),
        _scale_by_adam(cfg, dtype),
        optax.stateless(
            lambda updates, params: jax.tree.map(_decay_and_scale, groups, updates, params)
        ),
        optax.scale_by_learning_rate(schedule),
    )

    def step(grads, state, params, accept=jnp.isfinite):
        grads = optax.tree.cast(grads, jnp.float32)
        grad_norm = optax.tree.norm(grads)
        updates, new_state = chain.update(grads, state, params)
        new = optax.apply_updates(params, updates), new_state
        return *_selected(accept(grad_norm), new, (params, state)), grad_norm

    return Optimizer(chain.init, step)


def _quantized(cfg: OptimizerConfig, schedule: optax.Schedule, groups: Any) -> Optimizer:
    """Returns the optimizer of the "fp8_lm" state: FP8-LM (arXiv 2310.18313), with differences.

    sqrt(v) is stored, not v.  Gradients that differ by 2**20 within a tensor have v that differ by
    2**40, the whole range of float16.  The small v would become 0 while its m does not, and the
    step m / (0 + eps) would be huge.  sqrt(v) has the range of the gradient.

    m is clipped to c * sqrt(v) when it is read.  Exact Adam never exceeds this bound
    (Cauchy-Schwarz on the two weighted sums; c is `_moment_ratio`).  The clip therefore acts on
    rounding errors only, and no step is longer than a step of exact Adam can be.

    m below float8's normal numbers is rounded towards zero (`quantize`).  Rounded to nearest, it
    would stay constant while sqrt(v) falls.

    The float16 master weight is rounded to nearest, as in the paper.  Changes below 2**-12 of a
    weight are lost.  Weight decay alone is such a change at any usual learning rate.

    Norms, biases and the router are float32 with float32 moments.  A parameter stacked as [P, ...]
    is updated in place, one slice after another, so only one slice exists in float32 at a time.
    """
    _require_decay(cfg, "b1", cfg.b1, jnp.float8_e4m3fn)
    _require_decay(cfg, "b2", math.sqrt(cfg.b2), jnp.float16)
    max_ratio = _moment_ratio(cfg)
    adam = _scale_by_adam(cfg, jnp.float32)

    def init(params):
        def zeros(dtype):
            def zeros_of(param):
                if not is_scaled(param):
                    return jnp.zeros_like(param)
                return Scaled(jnp.zeros_like(param.value, dtype), jnp.ones_like(param.inv_scale))

            return jax.tree.map(zeros_of, params, is_leaf=is_scaled)

        return QuantizedState(
            jnp.zeros((), jnp.int32), zeros(jnp.float8_e4m3fn), zeros(jnp.float16)
        )

    def step(grads, state, params, accept=jnp.isfinite):
        grad_norm = optax.tree.norm(optax.tree.cast(grads, jnp.float32))
        is_accepted, factor = accept(grad_norm), _clip_factor(cfg, grad_norm)
        lr = schedule(state.count)

        def update(group, grad, param, mu, root_nu):
            """Returns the new parameter, m and sqrt(v); all arrays are float32 of one shape."""
            mu = jnp.clip(mu, -max_ratio * root_nu, max_ratio * root_nu)
            direction, adam_state = adam.update(
                factor * grad, optax.ScaleByAdamState(state.count, mu, jnp.square(root_nu))
            )
            new_param = param - lr * _decay_and_scale(group, direction, param)
            return new_param, adam_state.mu, jnp.sqrt(adam_state.nu)

        treedef = jax.tree.structure(grads)
        columns = (
            treedef.flatten_up_to(tree)
            for tree in (groups, grads, params, state.mu, state.root_nu)
        )
        new_leaves = [
            _update_leaf(update, is_accepted, group, grad, *stored)
            for group, grad, *stored in zip(*columns, strict=True)
        ]
        params, mu, root_nu = (
            treedef.unflatten(column) for column in zip(*new_leaves, strict=True)
        )
        count = jnp.where(is_accepted, optax.safe_increment(state.count), state.count)
        return params, QuantizedState(count, mu, root_nu), grad_norm

    return Optimizer(init, step)


def _selected(is_new: jax.Array, new: Any, old: Any) -> Any:
    """Returns the tree `new` or `old`; XLA fuses the choice with the computation of `new`."""
    return jax.tree.map(functools.partial(jnp.where, is_new), new, old)


def _update_leaf(
    update: Callable, is_accepted: jax.Array, group: ParamGroup, grad: jax.Array, *stored: Any
) -> tuple[Any, ...]:
    """Applies `update` to the stored (parameter, m, sqrt(v)) of one leaf.

    A stacked parameter is updated slice by slice, in place if its buffers are donated.
    """
    if not is_scaled(stored[0]):
        return _selected(is_accepted, update(group, grad.astype(jnp.float32), *stored), stored)

    def update_scaled(grad, stored):
        new = update(group, grad.astype(jnp.float32), *map(dequantize, stored))
        return _selected(
            is_accepted,
            tuple(
                quantize(x, old.value.dtype, old.inv_scale)
                for x, old in zip(new, stored, strict=True)
            ),
            stored,
        )

    if stored[0].inv_scale.ndim == 0:
        return update_scaled(grad, stored)

    def update_slice(i, stored):
        old = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), (grad, stored)
        )
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0),
            stored,
            update_scaled(*old),
        )

    # Compiled for a v5p (16 slices of 2M entries), everything is in place, with temporaries of
    # 1 MiB.  XLA:CPU also copies one float16 array, and a bfloat16 gradient to float32.
    return jax.lax.fori_loop(0, grad.shape[0], update_slice, tuple(stored))


def _require_decay(
    cfg: OptimizerConfig, name: str, decay: float, dtype: jax.typing.DTypeLike
) -> None:
    """Raises ConfigError if a number times `decay` can round back to itself in `dtype`.

    Such a moment would never decay.
    """
    if 1 - decay <= 2.0 ** -(jnp.finfo(dtype).nmant + 1):
        raise ConfigError(
            f"config.optimizer.{name} = {getattr(cfg, name)} is too close to 1 for state_dtype = "
            f"'{cfg.state_dtype}': a moment kept in {jnp.dtype(dtype).name} would round back to "
            "what it was instead of decaying. Lower it, or use state_dtype = 'float32'."
        )


def _moment_ratio(cfg: OptimizerConfig) -> float:
    """Returns the largest |m| / sqrt(v) of exact Adam, before bias correction.

    m = (1 - b1) sum b1^k g_k and v = (1 - b2) sum b2^k g_k^2, so m^2 <= v (1 - b1)^2 / (1 - b2)
    sum (b1^2 / b2)^k.
    """
    if cfg.b1**2 >= cfg.b2:
        raise ConfigError(
            f"config.optimizer.b1 = {cfg.b1} and b2 = {cfg.b2}: state_dtype = 'fp8_lm' needs "
            "b1**2 < b2, or m / sqrt(v) has no bound. Lower b1 or raise b2."
        )
    return (1 - cfg.b1) / math.sqrt((1 - cfg.b2) * (1 - cfg.b1**2 / cfg.b2))


# optax.clip_by_global_norm divides each element by the norm, and XLA:CPU repeats the division in
# every pass that reads the gradient: the update took 28 ms, and 14 ms with this factor (best of
# 30; 15M parameters, 2 cores, jax 0.10.2).
def _clip_factor(cfg: OptimizerConfig, grad_norm: jax.Array) -> jax.Array:
    return jnp.minimum(1.0, cfg.max_grad_norm / grad_norm)


def _scale_by_adam(
    cfg: OptimizerConfig, dtype: jax.typing.DTypeLike
) -> optax.GradientTransformation:
    """Maps float32 gradients to m / (sqrt(v) + eps); stores the moments in `dtype`."""
    adam = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)

    def cast(state, dtype):
        return state._replace(
            mu=optax.tree.cast(state.mu, dtype), nu=optax.tree.cast(state.nu, dtype)
        )

    def update(updates, state, params=None):
        # The bias correction raises a float to the int32 count, which strict promotion refuses.
        # The moments stay float32 either way.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = adam.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(adam.init(params), dtype), update)


def _decay_and_scale(group: ParamGroup, update: jax.Array, param: jax.Array) -> jax.Array:
    return group.lr_ratio * (update + group.weight_decay * param)
