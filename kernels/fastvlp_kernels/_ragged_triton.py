"""Counts and starts of segments on the device, for Triton kernels over segments. Only ``triton.py`` files import this module."""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_S = 1024


@triton.jit(do_not_specialize=["S", "bits"])
def _count_kernel(cu_ptr, each_ptr, count_ptr, S, bits, SHARE: tl.constexpr, MERGE: tl.constexpr, PROTECTED: tl.constexpr,
                  GHOST_LAST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """count [S]: how many tokens of each segment to merge away (MERGE) or to keep. bits: those of the number, a float64."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < S
    length = tl.load(cu_ptr + offs + 1, mask=inside, other=0).to(tl.int64) - tl.load(cu_ptr + offs, mask=inside, other=0)
    if each_ptr is not None:
        number = tl.load(each_ptr + offs, mask=inside, other=0)
    else:
        number = bits.to(tl.int64).to(tl.float64, bitcast=True)
    if SHARE:
        count = (length.to(tl.float64) * number).to(tl.int64)
    else:
        count = number.to(tl.int64) + 0 * length
    if MERGE:
        candidates = tl.maximum((length + 1) // 2 - (PROTECTED + 1) // 2, 0)
        count = tl.where(length // 2 > PROTECTED // 2, tl.minimum(count, candidates), 0)
        if GHOST_LAST:
            count = tl.where(offs == S - 1, 0, count)
    else:
        count = tl.minimum(tl.maximum(count, PROTECTED), length)
    tl.store(count_ptr + offs, tl.maximum(count, 0), mask=inside)


@triton.jit(do_not_specialize=["S", "rows"])
def _starts_kernel(cu_ptr, count_ptr, out_ptr, S, rows, MERGE: tl.constexpr, GHOST: tl.constexpr, BLOCK: tl.constexpr):
    """out: where the segments start when they hold count tokens, or that many less. GHOST 1: one more segment; 2: the last one."""
    done = tl.zeros((1,), tl.int64)
    for first in range(0, S, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        inside = offs < S
        count = tl.load(count_ptr + offs, mask=inside, other=0)
        if MERGE:
            length = tl.load(cu_ptr + offs + 1, mask=inside, other=0).to(tl.int64) - tl.load(cu_ptr + offs, mask=inside, other=0)
            count = length - count
        tl.store(out_ptr + offs, (done + tl.cumsum(count, 0) - count).to(tl.int32), mask=inside)
        done += tl.sum(count, 0)
    last = S + tl.arange(0, 1)
    if GHOST == 2:
        done = tl.zeros((1,), tl.int64) + rows
    tl.store(out_ptr + last, done.to(tl.int32))
    if GHOST == 1:
        tl.store(out_ptr + last + 1, (tl.zeros((1,), tl.int64) + rows).to(tl.int32))


def counts(cu_seqlens: Tensor, number: float, share: bool, each: Tensor | None, merge: bool, protected: int, ghost_last: bool) -> Tensor:
    """int64 [S] on the device; see ``_ragged.counted``. The host's float64 arithmetic to the bit."""
    S = cu_seqlens.shape[0] - 1
    count = torch.empty(S, dtype=torch.int64, device=cu_seqlens.device)
    if each is not None:
        share = each.is_floating_point()
        each = each.to(cu_seqlens.device, torch.float64 if share else torch.int64).contiguous()
    if S:
        # Triton passes Python floats as float32, which would round shares otherwise than the host does; the bits go as an integer.
        (bits,) = struct.unpack("q", struct.pack("d", number))
        _count_kernel[(triton.cdiv(S, BLOCK_S),)](
            cu_seqlens, each, count, S, bits, SHARE=share, MERGE=merge, PROTECTED=protected, GHOST_LAST=ghost_last, BLOCK=BLOCK_S
        )
    return count


def starts(cu_seqlens: Tensor, count: Tensor, merge: bool, ghost: int, rows: int) -> Tensor:
    """int32 [S+1], or [S+2] with a new ghost segment: where the segments of the result start."""
    S = cu_seqlens.shape[0] - 1
    out = torch.empty(S + 1 + (ghost == 1), dtype=torch.int32, device=cu_seqlens.device)
    _starts_kernel[(1,)](cu_seqlens, count, out, S, rows, MERGE=merge, GHOST=ghost, BLOCK=BLOCK_S)
    return out
