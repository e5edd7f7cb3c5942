"""ToMe's matching and merging, one token at a time: the mathematics of ``token_merge``."""

import torch
from torch import Tensor

from fastvlp_kernels._inputs import sum_dtype


def match(
    metric: Tensor, lengths: list[int], most: list[int], threshold: float | None, protected: int, keep_order: bool, rows: int,
) -> tuple[list[int], list[int], list[int], list[int]]:
    """source [T], order [T] and starts [rows + 1] as in ``MergePlan``, and how many tokens of each segment were merged away.

    most: how many tokens may go at most in each segment. Rows that no token goes to lie at the end.
    """
    unit = metric.to(sum_dtype(metric.dtype))
    norm = unit.norm(dim=1, keepdim=True)
    unit = torch.where(norm.isfinite() & (norm > 0), unit / norm, 0)
    source, gone, merged = [0] * len(metric), [False] * len(metric), []
    start = first_row = 0
    for n, limit in zip(lengths, most, strict=True):
        free_b = [j for j in range(1, n, 2) if j >= protected]
        best: dict[int, tuple[float, int]] = {}
        for i in range(0, n, 2):
            if i >= protected and free_b:
                similarity = [float(unit[start + i] @ unit[start + j]) for j in free_b]
                # Ties: the first, as everywhere.
                k = max(range(len(free_b)), key=lambda k: (similarity[k], -k))
                best[i] = similarity[k], free_b[k]
        ranking = sorted(best, key=lambda i: (-best[i][0], i))
        away = [i for i in ranking[:limit] if threshold is None or best[i][0] >= threshold]
        stay = [i for i in range(n) if i not in away]
        if not keep_order:
            a = [i for i in stay if i % 2 == 0]
            if protected == 0:
                a.sort(key=lambda i: ranking.index(i) if i in best else 0)
            stay = a + list(range(1, n, 2))
        for row, i in enumerate(stay):
            source[start + i] = first_row + row
        for i in away:
            source[start + i], gone[start + i] = source[start + best[i][1]], True
        merged.append(len(away))
        start, first_row = start + n, first_row + len(stay)
    order = sorted(range(len(metric)), key=lambda i: (source[i], gone[i], i))
    return source, order, [sum(row < k for row in source) for k in range(rows + 1)], merged


def merge(x: Tensor, size: Tensor | None, order: Tensor, starts: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Each row from its tokens, weighted by size for "mean": x [R, C] and size [R]. Differentiable."""
    dtype = sum_dtype(x.dtype)
    sizes = x.new_ones(x.shape[0], dtype=torch.float32) if size is None else size.to(sum_dtype(size.dtype))
    rows, totals = [x[:0]], [sizes[:0]]
    for first, last in zip(starts.tolist(), starts[1:].tolist(), strict=False):
        tokens, weight = x[order[first:last]].to(dtype), sizes[order[first:last]]
        total = weight.sum()
        if mode == "amax" and last > first:
            row = tokens.max(0).values
        elif mode == "mean" and last > first + 1:
            row = (tokens * weight[:, None]).sum(0) / torch.where(total > 0, total, 1)
        else:
            row = tokens.sum(0)
        rows.append(row[None].to(x.dtype))
        totals.append(total[None])
    return torch.cat(rows), torch.cat(totals)
