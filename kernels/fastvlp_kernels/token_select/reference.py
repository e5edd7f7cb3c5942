"""The highest scores of each segment, by sorting: the mathematics of ``token_select``."""

import math

import torch
from torch import Tensor


def select(scores: Tensor, lengths: list[int], counts: list[int], protected: int) -> Tensor:
    """int64 [sum of counts]: the tokens that stay, ascending. NaN counts as the lowest score."""
    kept, start = [], 0
    for n, count in zip(lengths, counts, strict=True):
        values = [-math.inf if math.isnan(v) else v for v in scores[start : start + n].tolist()]
        ranking = sorted(range(n), key=lambda i: (i >= protected, -values[i] if i >= protected else 0, i))
        kept += [start + i for i in sorted(ranking[:count])]
        start += n
    return torch.tensor(kept, dtype=torch.int64, device=scores.device)
