"""One function per op, with its implementations behind it; the caller never names one."""

from meshloom.pallas_kernels.attention import KVPages, Mask, Ragged, attention, paged_attention
from meshloom.pallas_kernels.matmul import QArray, matmul, quantize, quantized_matmul

__all__ = [
    "KVPages",
    "Mask",
    "QArray",
    "Ragged",
    "attention",
    "matmul",
    "paged_attention",
    "quantize",
    "quantized_matmul",
]
