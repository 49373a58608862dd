"""One function per op, with its implementations behind it; the caller never names one."""

from meshloom.pallas_kernels.attention import KVPages, Mask, Ragged, attention, paged_attention
from meshloom.pallas_kernels.attention.context import ring_attention, ulysses_attention
from meshloom.pallas_kernels.cross_entropy import linear_cross_entropy
from meshloom.pallas_kernels.matmul import QArray, matmul, quantize, quantized_matmul
from meshloom.pallas_kernels.matmul.collective import all_gather_matmul, matmul_reduce_scatter
from meshloom.pallas_kernels.matmul.experts import expert_parallel, routed_experts, top_experts
from meshloom.pallas_kernels.matmul.grouped import grouped_matmul
from meshloom.pallas_kernels.matmul.lora import LoraPages, lora_matmul
from meshloom.pallas_kernels.matmul.quantized.mixed import MixedWeight, mixed_matmul, quantize_mixed
from meshloom.pallas_kernels.matmul.quantized.training import quantized_training_matmul

__all__ = [
    "KVPages",
    "LoraPages",
    "Mask",
    "MixedWeight",
    "QArray",
    "Ragged",
    "all_gather_matmul",
    "attention",
    "expert_parallel",
    "grouped_matmul",
    "linear_cross_entropy",
    "lora_matmul",
    "matmul",
    "matmul_reduce_scatter",
    "mixed_matmul",
    "paged_attention",
    "quantize",
    "quantize_mixed",
    "quantized_matmul",
    "quantized_training_matmul",
    "ring_attention",
    "routed_experts",
    "top_experts",
    "ulysses_attention",
]
