"""The highest scores of each segment through sorts of padded batches."""

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
        # Two stable sorts, because scores may be infinite themselves: padding last, the protected prefix first.
        order = values[batch.tokens].argsort(dim=1, descending=True, stable=True)
        group = torch.where(batch.inside, 1, 2)
        group[:, :protected].masked_fill_(batch.inside[:, :protected], 0)
        order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, place)
        stays[batch.tokens[batch.inside]] = (rank < counts[batch.segments, None])[batch.inside]
    if scores.device.type == "cpu":
        return stays.nonzero().squeeze(1)
    return torch.nonzero_static(stays, size=total).squeeze(1)
