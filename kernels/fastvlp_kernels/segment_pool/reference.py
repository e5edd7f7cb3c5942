"""Mean or maximum of each segment, one after the other: the mathematics of ``segment_pool``."""

import torch
from torch import Tensor

from fastvlp_kernels._inputs import sum_dtype


def segment_pool(x: Tensor, lengths: list[int], mode: str, weight: Tensor | None) -> Tensor:
    """[S, C] in the dtype of x; differentiable. Of equal maxima the first takes the gradient."""
    dtype = sum_dtype(x.dtype)
    weights = x.new_ones(x.shape[0], dtype=dtype) if weight is None else weight.to(dtype)
    rows = [weights[:0, None] * x[:0].to(dtype)]
    for tokens, w in zip(x.to(dtype).split(lengths), weights.split(lengths), strict=True):
        if mode == "max" and len(tokens):
            row = tokens.max(0).values
        else:
            total = w.sum()
            row = (w[:, None] * tokens).sum(0) / torch.where(total == 0, 1, total)
        rows.append(row[None])
    return torch.cat(rows).to(x.dtype)
