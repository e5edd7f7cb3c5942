"""Pooling on GPUs: a program per segment and block of features walks the segment's tokens."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import span

PROGRAMS = 4  # per segment in backward


def config(width: int) -> dict[str, int]:
    """Block sizes and launch options for ``width`` features."""
    block = min(128, triton.next_power_of_2(max(width, 1)))
    return {"BLOCK_N": 16, "BLOCK_C": block, "num_warps": 4, "num_stages": 2}


@triton.jit(do_not_specialize=["T"])
def _pool_kernel(
    x_ptr, weight_ptr, cu_ptr, out_ptr, total_ptr, first_ptr, T, C, stride, MAX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out [S, C]; for means total [S], the sums of the weights; for maxima first [S, C], the first token that has it, or -1."""
    segment = tl.program_id(0).to(tl.int64)
    start, n = span(cu_ptr, segment, T)
    start = start.to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = cols < C
    best = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    place = tl.full((BLOCK_C,), -1, tl.int32)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    total = 0.0
    for done in range(0, n, BLOCK_N):
        offs = done + tl.arange(0, BLOCK_N)
        inside = (offs < n)[:, None] & in_c[None, :]
        x = tl.load(x_ptr + (start + offs)[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if MAX:
            # NaN is the largest, as in torch.max.
            key = tl.where(x == x, x, float("inf"))
            key = tl.where(inside, key, float("-inf"))
            spoiled = tl.min(tl.where(inside & (x != x), offs[:, None], n), 0)
            largest, where = tl.max(key, 0, return_indices=True)
            where = tl.where(spoiled < n, spoiled, done + where.to(tl.int32))
            largest = tl.where(spoiled < n, float("nan"), largest)
            # Once NaN, always NaN; the first token is taken even where it is -inf, so that only empty segments have no place.
            better = (best == best) & ((largest > best) | (largest != largest) | (place < 0))
            place = tl.where(better, where, place)
            best = tl.where(better, largest, best)
        else:
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + start + offs, mask=offs < n, other=0.0).to(tl.float32)
            else:
                weight = (offs < n).to(tl.float32)
            acc += tl.sum(x * weight[:, None], 0)
            total += tl.sum(weight, 0)
    if MAX:
        acc = tl.where(place >= 0, best, 0.0)
        tl.store(first_ptr + segment * C + cols, tl.where(place >= 0, start + place, -1), mask=in_c)
    else:
        # Weights may cancel: a mean without weight is 0 and not NaN, as for an empty segment.
        acc = acc / tl.where(total == 0, 1.0, total)
        if tl.program_id(1) == 0:
            tl.store(total_ptr + segment, total)
    tl.store(out_ptr + segment * C + cols, acc.to(out_ptr.dtype.element_ty), mask=in_c)


@triton.jit(do_not_specialize=["T"])
def _mean_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, out_ptr, total_ptr, cu_ptr, dx_ptr, dweight_ptr, T, C, stride_grad, stride,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx [T, C] and dweight [T]; a program takes every num_programs-th block of its segment's tokens.

    The tokens behind the last segment have gradient 0, which its programs write.
    """
    segment = tl.program_id(0).to(tl.int64)
    start, n = span(cu_ptr, segment, T)
    # Rows behind the last segment belong to none, but their gradient, 0, has to be written by somebody.
    last = n
    if segment == tl.num_programs(0) - 1:
        last = T - start
    start = start.to(tl.int64)
    total = tl.load(total_ptr + segment)
    share = tl.where(total == 0, 0.0, 1 / total)
    for done in range(tl.program_id(1) * BLOCK_N, last, tl.num_programs(1) * BLOCK_N):
        offs = done + tl.arange(0, BLOCK_N)
        tokens = start + offs
        scale = tl.where(offs < n, share, 0.0)
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr + tokens, mask=offs < n, other=0.0).to(tl.float32)
        dot = tl.zeros((BLOCK_N,), tl.float32)
        for c in range(0, C, BLOCK_C):
            cols = c + tl.arange(0, BLOCK_C)
            inside = (offs < n)[:, None] & (cols < C)[None, :]
            g = tl.load(grad_ptr + segment * stride_grad + cols, mask=cols < C, other=0.0).to(tl.float32)
            if dx_ptr is not None:
                dx = tl.where((offs < n)[:, None], scale[:, None] * g[None, :], 0.0)
                written = (offs < last)[:, None] & (cols < C)[None, :]
                tl.store(dx_ptr + tokens[:, None] * C + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=written)
            if dweight_ptr is not None:
                x = tl.load(x_ptr + tokens[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
                mean = tl.load(out_ptr + segment * C + cols, mask=cols < C, other=0.0).to(tl.float32)
                # The mean is taken off before the product: the difference of two long sums would lose digits.
                dot += tl.sum((x - mean[None, :]) * g[None, :], 1)
        if dweight_ptr is not None:
            dweight = tl.where(offs < n, dot * share, 0.0)
            tl.store(dweight_ptr + tokens, dweight.to(dweight_ptr.dtype.element_ty), mask=offs < last)


def forward(x: Tensor, cu_seqlens: Tensor, mode: str, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """out [S, C]; total [S], the sums of the weights; first [S, C], the token of the maximum, -1 for none ([0] for means)."""
    S, C, options = cu_seqlens.shape[0] - 1, x.shape[1], config(x.shape[1])
    x, weight = x if x.stride(1) == 1 else x.contiguous(), None if weight is None else weight.contiguous()
    out, total = x.new_empty(S, C), x.new_zeros(S, dtype=torch.float32)
    first = torch.empty((S, C) if mode == "max" else 0, dtype=torch.int64, device=x.device)
    if S:
        grid = (S, max(1, triton.cdiv(C, options["BLOCK_C"])))
        with torch.cuda.device_of(x):
            _pool_kernel[grid](x, weight, cu_seqlens, out, total, first, len(x), C, x.stride(0), MAX=mode == "max", **options)
    return out, total, first


def mean_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, out: Tensor, total: Tensor, cu_seqlens: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weights; [0] where ``needs`` says no."""
    S, options = len(total), config(x.shape[1])
    x, grad = (t if t.stride(1) == 1 else t.contiguous() for t in (x, grad))
    weight = None if weight is None else weight.contiguous()
    dx, dweight = x.new_empty(x.shape if needs[0] else 0), (total if weight is None else weight).new_empty(x.shape[0] if needs[1] else 0)
    if S:
        with torch.cuda.device_of(x):
            _mean_backward_kernel[(S, PROGRAMS)](
                grad, x, weight, out, total, cu_seqlens, dx if needs[0] else None, dweight if needs[1] else None,
                len(x), x.shape[1], grad.stride(0), x.stride(0), **options,
            )  # fmt: skip
    return dx, dweight
