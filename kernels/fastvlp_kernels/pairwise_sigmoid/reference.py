"""The pairwise sigmoid loss in plain PyTorch: every pair is stored, autograd does the rest."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastvlp_kernels._inputs import sum_dtype


def pairwise_sigmoid(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    col_weight: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    exclude: bool = False,
    offset: int | None = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """sum over i, j of w_i w_j softplus(-z_ij (scale <x_i, y_j> + row_bias_i + col_bias_j + bias)), see ``op.pairwise_sigmoid``.

    ``dtype`` is what the features are rounded to; the rest is computed in float32, or in float64 for float64.
    """
    accumulate = sum_dtype(dtype)
    logits = scale * (x.to(dtype).to(accumulate) @ y.to(dtype).to(accumulate).T) + bias
    if row_bias is not None:
        logits = logits + row_bias.to(accumulate)[:, None]
    if col_bias is not None:
        logits = logits + col_bias.to(accumulate)[None, :]

    positive = torch.zeros(logits.shape, dtype=torch.bool, device=x.device)
    if offset is not None:
        rows, cols = torch.arange(len(x), device=x.device), torch.arange(len(y), device=x.device)
        positive = cols[None, :] == rows[:, None] + offset
    counted = torch.ones_like(positive)
    if row_ids is not None and col_ids is not None:
        same = (row_ids[:, None] == col_ids[None, :]) & (row_ids[:, None] >= 0)
        if exclude:
            counted = positive | ~same
        else:
            positive = positive | same

    losses = torch.where(counted, -logsigmoid(torch.where(positive, logits, -logits)), 0.0)
    if row_weight is not None:
        losses = losses * row_weight.to(accumulate)[:, None]
    if col_weight is not None:
        losses = losses * col_weight.to(accumulate)[None, :]
    return losses.sum()
