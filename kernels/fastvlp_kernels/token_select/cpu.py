"""The highest scores of each segment through one sort of each padded batch."""

import torch
from torch import Tensor

from fastvlp_kernels._inputs import sum_dtype
from fastvlp_kernels._ragged import batches

TOKENS = 1 << 22  # sorted at once


def select(scores: Tensor, lengths: Tensor, counts: Tensor, protected: int, total: int) -> Tensor:
    """int64 [total]: the tokens that stay, ascending. lengths, counts: int64 [S] on the CPU."""
    stays = torch.empty(scores.shape[0], dtype=torch.bool, device=scores.device)
    values = scores.to(sum_dtype(scores.dtype)).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    counts = counts.to(scores.device)
    for batch in batches(lengths, scores.device, TOKENS):
        # Of equals the first stay: the prefix before infinite scores, padding behind them.
        ranked = batch.read(values).masked_fill_(~batch.inside, -torch.inf)
        ranked[:, :protected] = torch.inf
        order = ranked.argsort(dim=1, descending=True, stable=True)
        kept = torch.arange(order.shape[1], device=order.device) < counts[batch.segments, None]
        batch.write(torch.empty_like(kept).scatter_(1, order, kept), stays)
    if scores.device.type == "cpu":
        return stays.nonzero().squeeze(1)
    # The number is known; nonzero would ask the device for it and wait.
    return torch.nonzero_static(stays, size=total).squeeze(1)
