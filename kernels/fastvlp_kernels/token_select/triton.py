"""The highest scores of each segment on GPUs: ranks by counting, no sort, no atomics, no copy between host and device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _ragged_triton


def config() -> dict[str, int]:
    """Block sizes and launch options."""
    return {"BLOCK": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}


@triton.jit(do_not_specialize=["protected"])
def _stay_kernel(scores_ptr, cu_ptr, count_ptr, stay_ptr, protected, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """stay [T]: 1 where fewer than count tokens of the segment rank before."""
    segment = tl.program_id(0)
    start = tl.load(cu_ptr + segment).to(tl.int64)
    n = (tl.load(cu_ptr + segment + 1) - start).to(tl.int32)
    if tl.program_id(1) * BLOCK >= n:
        return
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(scores_ptr + start + place, mask=place < n, other=0.0).to(tl.float32)
    # NaN compares with nothing and would rank first.
    mine = tl.where(mine == mine, mine, float("-inf"))
    rank = tl.zeros((BLOCK,), tl.int32)
    # All pairs of a segment: quadratic, but segments are images, and a sort would need many passes.
    for first in range(0, n, BLOCK_K):
        rival = first + tl.arange(0, BLOCK_K)
        theirs = tl.load(scores_ptr + start + rival, mask=rival < n, other=0.0).to(tl.float32)
        theirs = tl.where(theirs == theirs, theirs, float("-inf"))
        earlier = rival[None, :] < place[:, None]
        before = (theirs[None, :] > mine[:, None]) | ((theirs[None, :] == mine[:, None]) & earlier)
        # A protected token ranks by its place, and before all others.
        before = (before & (place >= protected)[:, None]) | (earlier & ((rival < protected)[None, :] | (place < protected)[:, None]))
        rank += tl.sum((before & (rival < n)[None, :]).to(tl.int32), 1)
    tl.store(stay_ptr + start + place, (rank < tl.load(count_ptr + segment)).to(tl.int32), mask=place < n)


@triton.jit
def _index_kernel(stay_ptr, cu_ptr, new_ptr, index_ptr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """index [T']: the tokens that stay, each at the number of those that stay before it."""
    segment = tl.program_id(0)
    start = tl.load(cu_ptr + segment).to(tl.int64)
    n = (tl.load(cu_ptr + segment + 1) - start).to(tl.int32)
    if tl.program_id(1) * BLOCK >= n:
        return
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    stays = tl.load(stay_ptr + start + place, mask=place < n, other=0) != 0
    before = tl.load(new_ptr + segment).to(tl.int64)
    for first in range(0, tl.program_id(1) * BLOCK, BLOCK_K):
        other = first + tl.arange(0, BLOCK_K)
        before += tl.sum(tl.load(stay_ptr + start + other, mask=other < tl.program_id(1) * BLOCK, other=0), 0)
    row = before + tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(index_ptr + row, start + place, mask=stays)


def select(
    scores: Tensor, cu_seqlens: Tensor, longest: int, keep: float, share: bool, each: Tensor | None, protected: int, total: int
) -> tuple[Tensor, Tensor]:
    """index int64 [total] and the new cu_seqlens. longest: the longest segment, or more."""
    S, options = cu_seqlens.shape[0] - 1, config()
    scores = scores.contiguous()
    stay = torch.empty(scores.shape[0], dtype=torch.int32, device=scores.device)
    index = torch.empty(total, dtype=torch.int64, device=scores.device)
    with torch.cuda.device_of(scores):
        count = _ragged_triton.counts(cu_seqlens, keep, share, each, False, protected, False)
        new_starts = _ragged_triton.starts(cu_seqlens, count, False, 0, total)
        if len(scores):
            grid = (S, triton.cdiv(longest, options["BLOCK"]))
            _stay_kernel[grid](scores, cu_seqlens, count, stay, protected, **options)
            _index_kernel[grid](stay, cu_seqlens, new_starts, index, **options)
    return index, new_starts
