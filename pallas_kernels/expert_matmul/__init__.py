"""SwiGLU of experts on rows sorted by expert, forward and backward."""

from pallas_kernels.expert_matmul.api import swiglu
from pallas_kernels.expert_matmul.quantized import Quantized

__all__ = ["Quantized", "swiglu"]
