"""Compares the all-in estimate of `plan` with published steps of MaxText on TPUs:

    python benchmarks/calibration.py [NAME ...]

Writes each published model as a config of ours, compiles it for its slice (some minutes each;
needs libtpu, no TPU), and prints a row of a Markdown table.  docs/results/calibration.md has them.
"""

import dataclasses
import sys

from hunyuan_jax import presets
from hunyuan_jax.config import Config, MeshConfig, ModelConfig, MoeConfig, TrainConfig
from hunyuan_jax.plan import aot, topology


@dataclasses.dataclass(frozen=True)
class Published:
    """A published step: weights split over all devices, float32 weights and moments.

    batch: sequences per device, in this many micro-batches.
    seconds: of a step.
    """

    slice_name: str
    model: ModelConfig
    batch: int
    seq_len: int
    seconds: float
    expert_shards: int = 1
    micro_batches: int = 1

    def config(self) -> Config:
        """The run as we would start it."""
        batch_size = self.batch * topology.num_devices(self.slice_name)
        train = TrainConfig(
            batch_size=batch_size, seq_len=self.seq_len, grad_accum_steps=self.micro_batches
        )
        return Config(self.model, mesh=MeshConfig(data=-1, expert=self.expert_shards), train=train)


def _llama(vocab_size: int, hidden_size: int, ffn: int, num_layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=ffn,
        num_layers=num_layers,
        num_heads=hidden_size // 128,
        num_kv_heads=8,
        head_dim=128,
        max_position=8192,
        rope_type="default",
        use_qk_norm=False,
        tie_embeddings=False,
        dtype="bfloat16",
        remat="full",
    )


def _llama_70b() -> ModelConfig:
    return _llama(128_256, 8192, 28_672, 80)


def _mixtral_8x7b() -> ModelConfig:
    moe = MoeConfig(8, 2, norm_topk_prob=True, dispatch="drop", capacity_factor=1.25)
    return dataclasses.replace(_llama(32_000, 4096, 14_336, 32), moe=moe)


def _hy3() -> ModelConfig:
    model = presets.hy3()
    moe = dataclasses.replace(model.moe, dispatch="drop", capacity_factor=1.03125)
    return dataclasses.replace(model, moe=moe, num_mtp_layers=0)


PUBLISHED = {
    "mixtral_8x7b_v6e": Published("v6e:16x16", _mixtral_8x7b(), 8, 4096, 8.409),
    "llama3_1_70b_tpu7x": Published("tpu7x:4x4x4", _llama_70b(), 2, 8192, 12.20),
    "hy3_v5p": Published("v5p:4x8x8", _hy3(), 8, 8192, 63.17, expert_shards=4, micro_batches=4),
}


def main(names: list[str]) -> None:
    """Prints a row for each name, all by default."""
    for name in names or PUBLISHED:
        published = PUBLISHED[name]
        report = aot.report(published.config(), published.slice_name)
        estimate = report.all_in_seconds
        print(
            f"| {name} | {published.slice_name} | {published.batch} x {published.seq_len} | "
            f"{published.seconds:.2f} | {report.compute_seconds:.2f} | {estimate:.2f} | "
            f"{report.slow_links_seconds:.2f} | {estimate / published.seconds - 1:+.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
