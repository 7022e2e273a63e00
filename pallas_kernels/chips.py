"""What the chips can do: the rooflines that kernels and plans are measured against."""

from typing import NamedTuple

_GIB, _MIB = 2**30, 2**20


class Chip(NamedTuple):
    """One jax device; a tpu7x chip has two of them, every other chip one.

    device_kind: how jax's name of it begins.
    peak_flops: dense bf16 FLOP/s.
    clock_hz: of the matrix units, to turn the TPU compiler's cycles into seconds; None for GPUs.
    hbm_bytes, hbm_bytes_per_s: memory (for TPUs: what the compiler lets a program use) and its
    bandwidth.
    vmem_bytes: a TPU's vector memory, or the shared memory of one multiprocessor of a GPU.
    """

    device_kind: str
    peak_flops: float
    clock_hz: float | None
    hbm_bytes: int
    hbm_bytes_per_s: float
    vmem_bytes: int


# peak, bandwidth: vendors' figures.  hbm_bytes of TPUs: from the compiler's own out-of-memory
# message ("exceeds available HBM (95.73G)"), libtpu 0.0.50.1; vmem_bytes: likewise. clock: v4 1.05
# GHz and v5e 1.5 GHz are published; v5p 1.75 GHz is a common estimate; v6e and tpu7x are ASSUMED:
# peak over 524288 FLOP a cycle, the smallest power of two above what the compiler's estimate of a
# 8192^3 matmul gives (369 000 and 422 000 FLOP a cycle).  The same rule gives the known clocks of
# v4 (2 x 131072), v5e and v5p.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 1.05e9, int(30.75 * _GIB), 1.23e12, 16 * _MIB),
    "v5e": Chip("TPU v5 lite", 197e12, 1.5e9, int(15.75 * _GIB), 0.82e12, 128 * _MIB),
    "v5p": Chip("TPU v5", 459e12, 1.75e9, int(95.73 * _GIB), 2.77e12, 64 * _MIB),
    "v6e": Chip("TPU v6 lite", 918e12, 1.75e9, int(31.24 * _GIB), 1.64e12, 128 * _MIB),
    "tpu7x": Chip("TPU7x", 2307e12 / 2, 2.2e9, int(94.74 * _GIB), 7.37e12 / 2, 64 * _MIB),
    "h100": Chip("NVIDIA H100", 989e12, None, 80 * 10**9, 3.35e12, 227 * 2**10),
    "h200": Chip("NVIDIA H200", 989e12, None, 141 * 10**9, 4.8e12, 227 * 2**10),
}


def of_device(device_kind: str) -> str | None:
    """The name in CHIPS of a jax device_kind, or None for one that is not in the table."""
    matching = [name for name, chip in CHIPS.items() if device_kind.startswith(chip.device_kind)]
    return max(matching, key=lambda name: len(CHIPS[name].device_kind), default=None)
