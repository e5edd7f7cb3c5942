"""The mathematics of similarity_logsumexp: dense, and differentiable as often as wished."""

import torch
from torch import Tensor

from .._inputs import sum_dtype
from .._logsumexp import LogSumExp, logsumexp
from .arguments import Inputs, Results


def similarities(a: Inputs) -> Tensor:
    """S [M, N] in float32 (float64 for float64), from operands rounded to ``a.dtype``."""
    x, y = (features.to(a.dtype).to(sum_dtype(a.dtype)) for features in (a.x, a.y))
    S = a.scale * (x @ y.T)
    if a.row_scale is not None:
        S = S * a.row_scale[:, None]
    if a.col_scale is not None:
        S = S * a.col_scale
    if a.row_bias is not None:
        S = S + a.row_bias[:, None]
    if a.col_bias is not None:
        S = S + a.col_bias
    return S


def forward(a: Inputs) -> Results:
    """Log-sum-exps of the rows and columns of S, and its offset diagonal."""
    S = similarities(a)
    M, N = S.shape
    positive = S.new_empty(0)
    row_positives = col_positives = LogSumExp(positive, positive)
    counted = S
    if a.row_ids is not None and a.col_ids is not None:
        same = (a.row_ids[:, None] == a.col_ids) & (a.row_ids[:, None] >= 0)
        alike = S.masked_fill(~same, -torch.inf)
        if a.both:
            row_positives, col_positives = logsumexp(alike, 1), logsumexp(alike, 0)
        elif a.sums:
            totals = [S.masked_fill(~same, 0.0).sum(axis) for axis in (1, 0)]
            row_positives, col_positives = (LogSumExp(torch.zeros_like(total), total) for total in totals)
        else:
            counted = alike if a.ids == "only" else S.masked_fill(same, -torch.inf)
    if a.offset is not None:
        partner = torch.arange(M, device=S.device) + a.offset
        inside = (partner >= 0) & (partner < N)
        positive = S.gather(1, partner.clamp(0, N - 1)[:, None])[:, 0].masked_fill(~inside, 0.0)
    return Results(logsumexp(counted, 1), logsumexp(counted, 0), row_positives, col_positives, positive)

