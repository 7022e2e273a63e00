"""Decodes with a Spark model on the CPU, reading active neurons only or all of them:

    python benchmarks/sparse_decode.py [--width=1024] [--neurons=6144] [--layers=8]

Both generate from the same random weights at batch 1 through the same engine and differ in the
feed-forward layer alone.  Rounds alternate.  Prints tokens a second and the ratio.
"""

import argparse
import statistics
import time
from unittest import mock

import jax
import numpy as np
from flax import nnx

from hunyuan_jax.config import ModelConfig, SparkConfig
from hunyuan_jax.infer import cpu_layout
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.layers.ffn.spark import SparkMlp
from hunyuan_jax.model.transformer import Transformer
from hunyuan_jax.parallel.mesh import single_device_mesh

NUM_TOKENS, NUM_ROUNDS = 64, 5


def main() -> None:
    """Prints one line a round, then the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--neurons", type=int, default=6144)
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    cfg = ModelConfig(
        vocab_size=1024,
        hidden_size=arguments.width,
        intermediate_size=arguments.neurons,
        num_layers=arguments.layers,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        max_position=1024,
        spark=SparkConfig(neuron_share=0.08),
    )
    params = nnx.to_pure_dict(
        nnx.split(Transformer(cfg, single_device_mesh(), jax.random.key(0)))[1]
    )
    dense_layout = {kind: other for kind, other in cpu_layout.FFN.items() if kind is not SparkMlp}
    prompt = np.arange(16)[None]

    def model(layout):
        with mock.patch.object(cpu_layout, "FFN", layout):
            built = Pretrained(cfg, params)
            built.generate(prompt, max_new_tokens=NUM_TOKENS, eos_token_id=())
        return built

    models = {"dense": model(dense_layout), "sparse": model(cpu_layout.FFN)}
    seconds = {name: [] for name in models}
    for _ in range(NUM_ROUNDS):
        for name, built in models.items():
            start = time.perf_counter()
            built.generate(prompt, max_new_tokens=NUM_TOKENS, eos_token_id=())
            seconds[name].append(time.perf_counter() - start)
    for name, all_seconds in seconds.items():
        print(f"{name}: {NUM_TOKENS / statistics.median(all_seconds):.1f} tokens/s")
    ratios = [a / b for a, b in zip(seconds["dense"], seconds["sparse"], strict=True)]
    print(
        f"sparse / dense: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
