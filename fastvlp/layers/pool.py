"""Pooling over the segments of a packed batch."""

import torch
from torch import Tensor

from fastvlp_kernels import segment_pool
from fastvlp_kernels.packed import Packed


def segment_mean(packed: Packed) -> Tensor:
    """The mean token of each segment: [S, C] of the dtype of ``packed.x`` [T, C], weighted by ``packed.size``; zeros of no tokens."""
    if packed.size is not None:
        return segment_pool(packed.x, packed.cu_seqlens, "mean", packed.size, lengths=packed.lengths)
    lengths = packed.lengths.to(packed.x.device, non_blocking=True)
    x = packed.x.to(torch.promote_types(packed.x.dtype, torch.float32))
    total = torch.segment_reduce(x, "sum", lengths=lengths, axis=0, initial=0.0)
    return (total / lengths.clamp_min(1)[:, None]).to(packed.x.dtype)
