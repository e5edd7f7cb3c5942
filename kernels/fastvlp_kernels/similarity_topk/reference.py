"""The k largest similarities in plain PyTorch: all of them are stored and sorted."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._inputs import sum_dtype


def search(
    x: Tensor, y: Tensor, k: int, row_ids: Tensor | None, col_ids: Tensor | None, offset: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Values and indices of each row [M, k], see ``op.similarity_topk``; ``dtype`` is what the features are rounded to."""
    M, N, acc = len(x), len(y), sum_dtype(dtype)
    S = x.to(dtype).to(acc) @ y.to(dtype).to(acc).T
    if row_ids is not None and col_ids is not None:
        S = S.masked_fill((row_ids[:, None] == col_ids) & (row_ids[:, None] >= 0), -torch.inf)
    if offset is not None:
        partners = torch.arange(M, device=x.device) + offset
        S = S.masked_fill(torch.arange(N, device=x.device) == partners[:, None], -torch.inf)
    values, indices = S.sort(dim=1, descending=True, stable=True)
    missing = max(0, k - N)
    values, indices = pad(values[:, :k], (0, missing), value=-torch.inf), pad(indices[:, :k], (0, missing))
    return values, indices.masked_fill(values == -torch.inf, -1)
