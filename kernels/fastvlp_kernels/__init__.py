"""Operators for vision-language pre-training; each folder holds one, with its mathematics, its implementations and its PyTorch op."""

from fastvlp_kernels.packed import Packed as Packed
from fastvlp_kernels.packed_attention import packed_attention as packed_attention
