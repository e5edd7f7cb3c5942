"""similarity_topk in tiles of plain PyTorch, for the CPU and for any device without Triton.

The k largest of a row of a tile lie in the k blocks of largest maximum, so that a sort sees k blocks and not the row. Where the k-th and
the next are equal the row is sorted whole, for the first of equals counts.
"""

import math

import torch
from torch import Tensor

from .._inputs import sum_dtype

# Elements of a tile of similarities, and its most columns. The wider it is, the less its rows have to be merged with others'.
TILE, COLS = 2**21, 2**14


def search(
    x: Tensor, y: Tensor, k: int, row_ids: Tensor | None, col_ids: Tensor | None, offset: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Values and indices of each row [M, k]."""
    acc = sum_dtype(dtype)
    M, N = len(x), len(y)
    y = y.to(dtype).to(acc)
    best = y.new_full((M, k), -torch.inf)
    places = torch.full((M, k), -1, dtype=torch.int64, device=x.device)
    tile_n = max(1, min(COLS, N))
    tile_m = max(1, min(TILE // tile_n, max(64, -(-M // 9))))
    buffer = y.new_empty(tile_m * tile_n)
    for i in range(0, M, tile_m):
        rows = slice(i, min(i + tile_m, M))
        x_tile = x[rows].to(dtype).to(acc)
        for j in range(0, N, tile_n):
            cols = slice(j, min(j + tile_n, N))
            m, n = rows.stop - i, cols.stop - j
            S = torch.mm(x_tile, y[cols].T, out=buffer[: m * n].view(m, n))
            if row_ids is not None and col_ids is not None:
                S.masked_fill_((row_ids[rows, None] == col_ids[cols]) & (row_ids[rows, None] >= 0), -torch.inf)
            if offset is not None and -m < offset + i - j < n:
                S.diagonal(offset + i - j).fill_(-torch.inf)
            values, indices = largest(S, min(k, n))
            # Earlier columns first, so that a stable sort keeps the order of equals.
            values, order = torch.cat((best[rows], values), 1).sort(dim=1, descending=True, stable=True)
            indices = torch.cat((places[rows], indices + j), 1).gather(1, order)
            best[rows], places[rows] = values[:, :k], indices[:, :k]
    return best, places.masked_fill_(best == -torch.inf, -1)


def largest(S: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of S [m, n] and their columns, largest first and of equals the first; k <= n."""
    m, n = S.shape
    size = math.isqrt(n // (k + 1))
    if S.device.type != "cpu":  # finding ties would cost a synchronisation
        values, indices = S.sort(dim=1, descending=True, stable=True)
        return values[:, :k], indices[:, :k]
    if size < 4:
        values, indices = S.topk(min(k + 1, n), 1)
        tied = torch.zeros(m, dtype=torch.bool)
    else:
        # Block b holds columns b, b + blocks, b + 2 blocks, ..., so that maxima are taken over whole vectors; the rest are candidates.
        blocks = n // size
        maxima, best = S[:, : size * blocks].view(m, size, blocks).amax(1).topk(k + 1, 1)
        rest = torch.arange(size * blocks, n).expand(m, -1)
        within = torch.arange(0, size * blocks, blocks)
        candidates = torch.cat(((best[:, :k, None] + within).flatten(1), rest), 1)
        values, places = S.gather(1, candidates).topk(k + 1, 1)
        indices = candidates.gather(1, places)
        tied = maxima[:, k] == values[:, k - 1]
    if values.shape[1] > k:
        tied |= values[:, k] == values[:, k - 1]
        values, indices = values[:, :k], indices[:, :k]
    # By column first, then by value, which keeps the order of equals.
    indices, order = indices.sort(1)
    values, again = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    indices = indices.gather(1, again)
    tied &= values[:, k - 1] > -torch.inf
    if tied.any():
        rows = tied.nonzero()[:, 0]
        values, indices = values.clone(), indices.clone()
        exact, places = S[rows].sort(dim=1, descending=True, stable=True)
        values[rows], indices[rows] = exact[:, :k], places[:, :k]
    return values, indices
