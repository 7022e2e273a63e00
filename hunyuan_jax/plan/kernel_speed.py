"""How fast Pallas kernels and row lookups are by the TPU compiler's static cycles.

The compiler gives no cycles for either inside a program.  These are of each kernel compiled alone
at a52b's shapes (docs/results/kernels.md, which names the commands), attention also with heads of
128, and of `x[index]` alone.
"""

import math
import re
from collections.abc import Callable

from hunyuan_jax.plan import hlo_text
from hunyuan_jax.plan.hlo_text import Op
from pallas_kernels.chips import Chip

# On one line with quotes; inside a fusion, over several lines without.
_FLOPS = re.compile(r'"cost_estimate":\s*\{[^{}]*"flops":"?(\d+)')

_V5P = {
    "expert_gate_up": 0.973,
    "expert_matmul": 0.980,
    "expert_gated_gradient": 0.913,
    "expert_input_gradient": 0.979,
    "expert_weight_gradient": 0.965,
    "flash_attention_forward": {80: 0.582, 128: 0.795},
    "flash_attention_backward": {80: 0.723, 128: 0.921},
}
_V6E = {
    "expert_gate_up": 0.960,
    "expert_matmul": 0.902,
    "expert_gated_gradient": 0.800,
    "expert_input_gradient": 0.901,
    "expert_weight_gradient": 0.827,
    "flash_attention_forward": {80: 0.202, 128: 0.292},
    "flash_attention_backward": {80: 0.308},
}
# Of attention by head dim.
SHARES_OF_PEAK: dict[str, dict[str, float | dict[int, float]]] = {
    "v4": _V5P,  # assumed: not counted
    "v5e": {
        "expert_gate_up": 0.980,
        "expert_matmul": 0.977,
        "expert_gated_gradient": 0.915,
        "expert_input_gradient": 0.977,
        "expert_weight_gradient": 0.963,
        "flash_attention_forward": {80: 0.585},
        "flash_attention_backward": {80: 0.728},
    },
    "v5p": _V5P,
    "v6e": _V6E,
    "tpu7x": _V6E,  # assumed: libtpu counts nothing for tpu7x
}
# Of a lookup on the TensorCore.  v5p: 50.5 cycles for a row of 12800 bytes, 35.3 for one of 8192,
# 9.7 for a number; assumed for the others.
_LOOKUP_BYTES_PER_CYCLE = 250
_LOOKUP_CYCLES = 10


def lookup_cycles(gather: Op) -> float:
    """Returns the cycles of looking up rows of an array, on the TensorCore."""
    total = hlo_text.num_bytes(gather.shape)
    sizes = re.search(r"slice_sizes=\{([\d,]*)\}", gather.attributes)[1]
    elements = math.prod(map(int, sizes.split(",")))
    num_rows = hlo_text.num_elements(gather.shape) // elements
    return max(num_rows * _LOOKUP_CYCLES, total / _LOOKUP_BYTES_PER_CYCLE)


def stated_flops(kernel: Op) -> int:
    """Returns the FLOPs that a kernel states, 0 if it states none."""
    stated = _FLOPS.search(kernel.attributes)
    return int(stated[1]) if stated else 0


def name_of(kernel: Op) -> str:
    """Strips the op's number, and the operand that the compiler appends when the result goes
    straight into another kernel.
    """
    return re.sub(r"(\.\d+)+(\.\w+_)?$", "", kernel.name)


def share_of_peak(chip: Chip, kernel: Op) -> float:
    """Returns a kernel's share of the peak; that of attention at the nearest head dim, 1 for a
    kernel that is not listed.
    """
    share = SHARES_OF_PEAK[chip.name].get(name_of(kernel), 1.0)
    if isinstance(share, float):
        return share
    head_dim = int(re.search(r"(\d+),\d+\]", kernel.shape)[1])  # results are [..., H, T]
    return share[min(share, key=lambda known: abs(known - head_dim))]


def seconds_on(chip: Chip) -> Callable[[Op], float]:
    """Returns a function from a kernel to its seconds."""
    return lambda kernel: stated_flops(kernel) / chip.peak_flops / share_of_peak(chip, kernel)
