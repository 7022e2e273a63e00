"""Products of rows, sorted by expert, with the weights of their experts: SwiGLU forward and
backward.
"""

from pallas_kernels.expert_matmul.api import swiglu
from pallas_kernels.expert_matmul.quantized import Quantized

__all__ = ["Quantized", "swiglu"]
