"""One function per op, with its implementations behind it; the caller never names one."""

from meshloom.pallas_kernels.attention import KVPages, Mask, Ragged, attention, paged_attention

__all__ = ["KVPages", "Mask", "Ragged", "attention", "paged_attention"]
