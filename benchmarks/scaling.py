"""Measures what must not grow: compile time with depth, and the cost of dropless routing with the
number of experts.

JAX_PLATFORMS=cpu python benchmarks/scaling.py
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from hunyuan_jax import presets
from hunyuan_jax.config import Config, MoeConfig
from hunyuan_jax.layers.ffn.moe.layer import Moe
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.train.state import build_program
from hunyuan_jax.train.step import abstract_batch, make_train_step

NUM_TOKENS, WIDTH = 2048, 256


def main() -> None:
    """Prints both tables."""
    print("| layers | compile of the train step, s |\n|---|---|")
    for num_layers in (4, 32, 4, 32):
        print(f"| {num_layers} | {compile_seconds(num_layers):.1f} |")
    print(
        "\n| experts | dropless layer, forward and backward, ms | the same by lax.ragged_dot, ms "
        "|\n|---|---|---|"
    )
    for num_experts in (8, 32):
        layer, ragged = layer_milliseconds(num_experts)
        print(f"| {num_experts} | {layer:.1f} | {ragged:.1f} |")


def compile_seconds(num_layers: int) -> float:
    """Lowering and compiling the tiny preset at another depth."""
    program = build_program(
        Config(model=dataclasses.replace(presets.tiny(), num_layers=num_layers)),
        single_device_mesh(),
    )
    jax.clear_caches()
    start = time.perf_counter()
    make_train_step(program).lower(program.state, abstract_batch(program)).compile()
    return time.perf_counter() - start


def layer_milliseconds(num_experts: int) -> tuple[float, float]:
    """One top-1 layer without a shared expert, and the same layer with rows sorted for
    lax.ragged_dot.
    """
    cfg = dataclasses.replace(
        presets.bench(), moe=MoeConfig(num_experts=num_experts, dispatch="dropless")
    )
    graph_def, state = nnx.split(Moe(cfg, single_device_mesh(), jax.random.key(0)))
    weights = nnx.to_pure_dict(state)
    x_BTD = jax.random.normal(jax.random.key(1), (8, NUM_TOKENS // 8, WIDTH))

    def layer(weights, x_BTD):
        return nnx.merge(graph_def, weights)(x_BTD, jnp.ones(x_BTD.shape[:2], bool), None)[0]

    def ragged(weights, x_BTD):
        x_MD = x_BTD.reshape(-1, WIDTH)
        probs_ME = jax.nn.softmax(x_MD @ weights["router_DE"])
        expert_M = jnp.argmax(probs_ME, -1)
        order_M = jnp.argsort(expert_M)
        sizes_E = jnp.bincount(expert_M, length=num_experts).astype(jnp.int32)
        w = weights["experts"]
        gate, up = (
            jax.lax.ragged_dot(x_MD[order_M], w[name], sizes_E)
            for name in ("w_gate_EDF", "w_up_EDF")
        )
        y_MD = jax.lax.ragged_dot(jax.nn.silu(gate) * up, w["w_down_EFD"], sizes_E)
        return jnp.zeros_like(x_MD).at[order_M].set(y_MD) * probs_ME.max(-1, keepdims=True)

    return tuple(
        median_ms(
            jax.jit(jax.grad(lambda w, x, f=fn: (f(w, x) ** 2).sum(), (0, 1))), weights, x_BTD
        )
        for fn in (layer, ragged)
    )


def median_ms(fn, *args) -> float:
    """Median of 20 calls after two."""
    seconds = []
    for _ in range(22):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:]) * 1e3


if __name__ == "__main__":
    main()
