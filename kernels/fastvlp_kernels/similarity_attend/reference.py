"""The mathematics of similarity_attend: dense, and differentiable as often as wished."""

import torch

from .._inputs import sum_dtype
from .._logsumexp import logsumexp
from .arguments import Inputs, Results


def forward(a: Inputs) -> Results:
    """softmax(S) v and the log-sum-exps of the rows of S, from operands rounded to ``a.dtype``."""
    x, y, v = (features.to(a.dtype).to(sum_dtype(a.dtype)) for features in (a.x, a.y, a.v))
    S = a.scale * (x @ y.T)
    if a.row_bias is not None:
        S = S + a.row_bias[:, None]
    if a.col_bias is not None:
        S = S + a.col_bias
    if a.row_ids is not None and a.col_ids is not None:
        same = (a.row_ids[:, None] == a.col_ids) & (a.row_ids[:, None] >= 0)
        S = S.masked_fill(~same if a.ids == "only" else same, -torch.inf)
    lse = logsumexp(S, 1)
    P = ((S - lse.reference.masked_fill(lse.reference == -torch.inf, 0.0)[:, None]) - lse.log[:, None]).exp()
    return Results(P @ v, lse)
