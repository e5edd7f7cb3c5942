"""Pooling over the segments of a packed batch."""

from torch import Tensor

from fastvlp_kernels import segment_pool
from fastvlp_kernels.packed import Packed, check_packed


def segment_mean(packed: Packed) -> Tensor:
    """The mean token of each segment: [S, C] of the dtype of ``packed.x`` [T, C], weighted by ``packed.size``; zeros of no tokens."""
    check_packed("segment_mean", packed=packed)
    return segment_pool(packed.x, packed.cu_seqlens, "mean", packed.size, lengths=packed.lengths)
