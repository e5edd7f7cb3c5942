"""similarity_topk on GPUs: tiles of similarities live in registers beside the best of each row so far, without atomics.

A program walks over its share of the columns for a block of rows. Of each tile it takes the largest of every row, one at a time, for as
long as one belongs among the best of its row: often in the first tile, seldom later. The lists of the shares are merged by two sorts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import dot_tile, operand, precision, processors, same_ids, upcast


def config(dtype: torch.dtype, k: int, ids: bool, M: int, device: torch.device) -> dict[str, int]:
    """Block sizes and launch options; long lists, ids, and rows too few for all processors take smaller blocks of rows."""
    slots = max(triton.next_power_of_2(k), 2)
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "SLOTS": slots, "num_warps": 8, "num_stages": 2}
    BLOCK_M = 64 if slots > 16 or ids or triton.cdiv(M, 128) < processors(device) else 128
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": 128, "BLOCK_K": 64, "SLOTS": slots, "num_warps": 8, "num_stages": 3}


@triton.jit(do_not_specialize=["M", "N", "k", "offset", "tiles_of_share"])
def _search_kernel(
    x_ptr, stride_x, y_ptr, stride_y, row_ids_ptr, col_ids_ptr, values_ptr, indices_ptr, M, N, D, k, offset, tiles_of_share,
    HAS_OFFSET: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The k best of a block of rows in one share of the columns, in no order: values and indices [shares, M, k]."""
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    share = tl.program_id(1).to(tl.int64)
    t_m, t_n, t_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, SLOTS)
    rows = tl.minimum(first_m + t_m, M - 1)
    # A slot that is not asked for holds +inf and is never given away; empty ones have numbers of their own, below every column.
    best = tl.zeros((BLOCK_M, SLOTS), tl.float32) + tl.where(t_k < k, -float("inf"), float("inf"))[None, :]
    places = tl.zeros((BLOCK_M, SLOTS), tl.int32) - 1 - t_k[None, :]
    start = share * tiles_of_share * BLOCK_N
    first_n = start
    for _ in range(0, tl.cdiv(tl.minimum(N - start, tiles_of_share * BLOCK_N), BLOCK_N)):
        S = dot_tile(x_ptr, stride_x, y_ptr, stride_y, first_m, first_n, M, N, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
        counted = (t_n < tl.minimum(N - first_n, BLOCK_N).to(tl.int32))[None, :]
        if HAS_OFFSET:
            shift = tl.maximum(tl.minimum(first_m + offset - first_n, BLOCK_N), -BLOCK_M).to(tl.int32)
            counted = counted & ((t_m + shift)[:, None] != t_n[None, :])
        if row_ids_ptr is not None:
            cols = tl.minimum(first_n + t_n, N - 1)
            counted = counted & (same_ids(tl.load(row_ids_ptr + rows), tl.load(col_ids_ptr + cols)) == 0)
        S = tl.where(counted, S, -float("inf"))
        least = tl.min(best, 1)
        highest = tl.max(S, 1)
        while tl.max((highest > least).to(tl.int32), 0) > 0:
            place = tl.min(tl.where(S == highest[:, None], t_n[None, :], BLOCK_N), 1)
            enters = highest > least
            # Of equal values the one of the highest column leaves: the first that came stays.
            last = tl.max(tl.where(best == least[:, None], places, -SLOTS - 1), 1)
            slot = (best == least[:, None]) & (places == last[:, None]) & enters[:, None]
            best = tl.where(slot, highest[:, None], best)
            places = tl.where(slot, (first_n.to(tl.int32) + place)[:, None], places)
            S = tl.where(t_n[None, :] == place[:, None], -float("inf"), S)
            least = tl.min(best, 1)
            highest = tl.max(S, 1)
        first_n += BLOCK_N
    out = (share * M + first_m + t_m)[:, None] * k + t_k[None, :]
    inside = (first_m + t_m < M)[:, None] & (t_k < k)[None, :]
    tl.store(values_ptr + out, best, mask=inside)
    tl.store(indices_ptr + out, places, mask=inside)


def search(
    x: Tensor, y: Tensor, k: int, row_ids: Tensor | None, col_ids: Tensor | None, offset: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Values and indices of each row [M, k]."""
    M, N = len(x), len(y)
    x, y = operand(x, dtype), operand(y, dtype)
    options = config(dtype, k, row_ids is not None, M, x.device)
    tiles_m, tiles_n = triton.cdiv(M, options["BLOCK_M"]), triton.cdiv(N, options["BLOCK_N"])
    if M == 0 or N == 0:
        return x.new_full((M, k), -torch.inf, dtype=torch.float32), x.new_full((M, k), -1, dtype=torch.int64)
    # Two programs for every processor, where there is work for them.
    tiles_of_share = triton.cdiv(tiles_n, min(tiles_n, triton.cdiv(2 * processors(x.device), tiles_m)))
    shares = triton.cdiv(tiles_n, tiles_of_share)
    values = x.new_empty(shares, M, k, dtype=torch.float32)
    indices = x.new_empty(shares, M, k, dtype=torch.int32)
    row_ids, col_ids = (v if v is None else v.contiguous() for v in (row_ids, col_ids))
    with torch.cuda.device_of(x):
        _search_kernel[(tiles_m, shares)](
            x, x.stride(0), y, y.stride(0), row_ids, col_ids, values, indices, M, N, x.shape[1], k, offset or 0, tiles_of_share,
            HAS_OFFSET=offset is not None, PRECISION=precision(), UPCAST=upcast(), **options,
        )  # fmt: skip
    # By column first, then by value, which keeps the order of equals.
    indices, order = indices.movedim(0, 1).flatten(1).sort(dim=1)
    values, again = values.movedim(0, 1).flatten(1).gather(1, order).sort(dim=1, descending=True, stable=True)
    values, indices = values[:, :k].contiguous(), indices.gather(1, again[:, :k]).long()
    return values, indices.masked_fill_(values == -torch.inf, -1)
