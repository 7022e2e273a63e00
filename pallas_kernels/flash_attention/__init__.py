"""Attention that never holds the T x S scores: causal or not, packed documents, grouped heads,
dropout.
"""

from pallas_kernels.flash_attention.api import attention_gradients, flash_attention
from pallas_kernels.flash_attention.dropout import head_seeds

__all__ = ["attention_gradients", "flash_attention", "head_seeds"]
