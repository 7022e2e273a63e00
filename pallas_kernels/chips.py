"""What each chip can do: the rooflines of kernels, plans and training runs."""

from typing import NamedTuple

_KIB, _MIB, _GIB = 2**10, 2**20, 2**30


class Chip(NamedTuple):
    """One jax device of a kind of chip.

    name: the key in CHIPS; for a TPU also its name in a topology ("v5p:2x2x1").
    device_kinds: how jax's names for the device begin.
    devices_per_chip: jax devices on one chip; all other figures are per device.
    peak_flops: dense bfloat16 FLOP/s.
    clock_hz: clock of the matrix units, which turns the TPU compiler's cycles into seconds; None
      for a GPU.
    hbm_bytes: memory.  For a TPU, what the compiler lets a program use.
    hbm_bytes_per_s: bandwidth of the memory.
    vmem_bytes: vector memory of a TPU; shared memory of one multiprocessor of a GPU.
    """

    name: str
    device_kinds: tuple[str, ...]
    devices_per_chip: int
    peak_flops: float
    clock_hz: float | None
    hbm_bytes: int
    hbm_bytes_per_s: float
    vmem_bytes: int


# Sources:
# * peak_flops and hbm_bytes_per_s: the vendors' data sheets (cloud.google.com/tpu/docs,
#   nvidia.com); GPUs in their SXM form where no other is named.
# * hbm_bytes and vmem_bytes of TPUs: the compiler's out-of-memory messages ("exceeds available HBM
#   (95.73G)"), libtpu 0.0.50.1.
# * clock_hz: v4 and v5e are published, 1.75 GHz for v5p is a common estimate.  v6e and tpu7x are
#   ASSUMED to be the peak over 524288 FLOP a cycle, the smallest power of two above what the
#   compiler estimates for an 8192^3 matmul (369 000 and 422 000 FLOP a cycle).  The same rule
#   gives the known clocks of v4 (2 x 131072), v5e and v5p.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 1, 275e12, 1.05e9, int(30.75 * _GIB), 1.23e12, 16 * _MIB),
        Chip(
            "v5e",
            ("TPU v5 lite", "TPU v5e"),
            1,
            197e12,
            1.5e9,
            int(15.75 * _GIB),
            0.82e12,
            128 * _MIB,
        ),
        Chip("v5p", ("TPU v5",), 1, 459e12, 1.75e9, int(95.73 * _GIB), 2.77e12, 64 * _MIB),
        Chip("v6e", ("TPU v6",), 1, 918e12, 1.75e9, int(31.24 * _GIB), 1.64e12, 128 * _MIB),
        Chip(
            "tpu7x",
            ("TPU7x",),
            2,
            2307e12 / 2,
            2.2e9,
            int(94.74 * _GIB),
            7.37e12 / 2,
            64 * _MIB,
        ),
        Chip("h100", ("NVIDIA H100",), 1, 989e12, None, 80 * 10**9, 3.35e12, 227 * _KIB),
        Chip("h100 pcie", ("NVIDIA H100 PCIe",), 1, 756e12, None, 80 * 10**9, 2.0e12, 227 * _KIB),
        Chip("h100 nvl", ("NVIDIA H100 NVL",), 1, 835e12, None, 94 * 10**9, 3.9e12, 227 * _KIB),
        Chip("h200 nvl", ("NVIDIA H200 NVL",), 1, 835e12, None, 141 * 10**9, 4.8e12, 227 * _KIB),
        Chip("h200", ("NVIDIA H200",), 1, 989e12, None, 141 * 10**9, 4.8e12, 227 * _KIB),
        Chip("gh200", ("NVIDIA GH200",), 1, 989e12, None, 96 * 10**9, 4.0e12, 227 * _KIB),
    )
}


def of_device(device_kind: str) -> Chip | None:
    """Returns the chip of a jax device_kind, or None for one that is not in the table (a CPU)."""
    kinds = {kind: chip for chip in CHIPS.values() for kind in chip.device_kinds}
    matching = [kind for kind in kinds if device_kind.startswith(kind)]
    return kinds[max(matching, key=len)] if matching else None


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 peak of a jax device in FLOP/s, or None if it is not known."""
    chip = of_device(device_kind)
    return chip.peak_flops if chip else None


def has_int8_product(device_kind: str) -> bool:
    """Whether a device multiplies int8 with int8 itself; TPU7x has float8 instead."""
    return not device_kind.startswith("TPU7x")


def has_fp8_product(device_kind: str) -> bool:
    """Whether a device multiplies float8 with float8 itself: TPU7x, NVIDIA's Hopper and later."""
    return device_kind.startswith(("TPU7x", "NVIDIA H", "NVIDIA GH", "NVIDIA B", "NVIDIA GB"))
