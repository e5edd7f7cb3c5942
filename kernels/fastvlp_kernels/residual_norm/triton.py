"""residual_norm on GPUs: a program holds whole tokens, so that memory is passed over as often as the tensors demand, without atomics.

Backward, each program walks over its share of the tokens and keeps sums for the vectors; the sums of the shares are added in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import processors
from .arguments import Inputs, Needs, Saved

PROGRAMS = 6  # of backward, for each processor: what its registers hold at 768 features


def config(width: int, tensors: int) -> dict[str, int]:
    """Block sizes and launch options for tokens of ``width``, of which a program holds ``tensors`` at once."""
    block = max(triton.next_power_of_2(width), 64)
    # The more tensors a program holds, the fewer rows of each, so that they stay in registers.
    rows = max(1, 4096 // (block * max(1, tensors // 2)))
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, block * rows // 512)), "num_stages": 1}


@triton.jit
def _tokens(ptr, stride, rows, cols, inside):
    """[ROWS, BLOCK] in float32, 0 outside."""
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _vector(ptr, cols, C):
    return tl.load(ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x_ptr, branch_ptr, gamma_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr, mean_ptr, rstd_ptr, T, C, stride_x, stride_branch, eps,
    RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out and total [T, C], mean and rstd [T]."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < T)[:, None] & (cols < C)[None, :]
    total = _tokens(branch_ptr, stride_branch, rows, cols, inside)
    if gamma_ptr is not None:
        total *= _vector(gamma_ptr, cols, C)
    rounded = (total + _tokens(x_ptr, stride_x, rows, cols, inside)).to(total_ptr.dtype.element_ty)
    at = rows[:, None] * C + cols[None, :]
    tl.store(total_ptr + at, rounded, mask=inside)
    # The norm of what is returned, as of a sum that was stored.
    centred = rounded.to(tl.float32)
    if not RMS:
        mean = tl.sum(centred, 1) / C
        tl.store(mean_ptr + rows, mean, mask=rows < T)
        # Columns behind C were read as 0, and would count as -mean in the variance.
        centred = tl.where((cols < C)[None, :], centred - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < T)
    out = centred * rstd[:, None] * _vector(weight_ptr, cols, C)
    if bias_ptr is not None:
        out += _vector(bias_ptr, cols, C)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "share"])
def _backward_kernel(
    grad_ptr, grad_total_ptr, total_ptr, branch_ptr, gamma_ptr, weight_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dbranch_ptr, dgamma_ptr, dweight_ptr, dbias_ptr, T, C, share, stride_grad, stride_grad_total, stride_branch,
    RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx and dbranch [T, C], and the sums [programs, C] of this program's ``share`` of the tokens, each if wanted."""
    first = tl.program_id(0).to(tl.int64) * share
    last = tl.minimum(first + share, T)
    cols = tl.arange(0, BLOCK)
    sum_gamma = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        inside = (rows < last)[:, None] & (cols < C)[None, :]
        g = _tokens(grad_ptr, stride_grad, rows, cols, inside)
        unit = _tokens(total_ptr, C, rows, cols, inside)
        if not RMS:
            unit = tl.where(inside, unit - tl.load(mean_ptr + rows, mask=rows < last, other=0.0)[:, None], 0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < last, other=0.0)[:, None]
        unit *= rstd
        if dweight_ptr is not None:
            sum_weight += g * unit
        if dbias_ptr is not None:
            sum_bias += g
        if (dx_ptr is not None) or (dbranch_ptr is not None) or (dgamma_ptr is not None):
            g *= _vector(weight_ptr, cols, C)
            ds = g - unit * (tl.sum(g * unit, 1) / C)[:, None]
            if not RMS:
                ds -= (tl.sum(g, 1) / C)[:, None]
            ds *= rstd
            if grad_total_ptr is not None:
                ds += _tokens(grad_total_ptr, stride_grad_total, rows, cols, inside)
            at = rows[:, None] * C + cols[None, :]
            if dx_ptr is not None:
                tl.store(dx_ptr + at, ds.to(dx_ptr.dtype.element_ty), mask=inside)
            if dgamma_ptr is not None:
                sum_gamma += ds * _tokens(branch_ptr, stride_branch, rows, cols, inside)
            if dbranch_ptr is not None:
                if gamma_ptr is not None:
                    ds *= _vector(gamma_ptr, cols, C)
                tl.store(dbranch_ptr + at, ds.to(dbranch_ptr.dtype.element_ty), mask=inside)
    out = tl.program_id(0).to(tl.int64) * C + cols
    if dgamma_ptr is not None:
        tl.store(dgamma_ptr + out, tl.sum(sum_gamma, 0), mask=cols < C)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + out, tl.sum(sum_weight, 0), mask=cols < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + out, tl.sum(sum_bias, 0), mask=cols < C)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def forward(a: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [T, C], total [T, C], mean and reciprocal standard deviation [T] in float32; no mean ([0]) of RMS."""
    T, C = a.x.shape
    x, branch = _dense(a.x), _dense(a.branch)
    total, out = a.x.new_empty(T, C, dtype=a.total_dtype), a.x.new_empty(T, C, dtype=a.dtype)
    mean, rstd = (a.x.new_empty(n, dtype=torch.float32) for n in (0 if a.rms else T, T))
    options = config(C, 2)
    if T:
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(T, options["ROWS"]),)](
                x, branch, *(None if v is None else v.contiguous() for v in (a.gamma, a.weight, a.bias)), out, total, mean, rstd,
                T, C, x.stride(0), branch.stride(0), a.eps, RMS=a.rms, **options,
            )  # fmt: skip
    return out, total, mean, rstd


def backward(a: Saved, grad: Tensor, grad_total: Tensor | None, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (of branch too where they share it), branch, gamma, weight and bias; [0] where ``needs`` says no."""
    total, mean, rstd, (T, C) = a.total, a.mean, a.rstd, a.total.shape
    dx = total.new_empty((T, C) if needs.x or (needs.branch and a.shared) else (0,), dtype=a.x_dtype)
    dbranch = total.new_empty((T, C) if needs.branch and not a.shared else (0,), dtype=a.branch_dtype)
    if T == 0:
        dgamma, dweight, dbias = (rstd.new_zeros(C if need else 0) for need in needs[2:])
        return dx, dbranch, dgamma, dweight, dbias
    grad, grad_total = _dense(grad), None if grad_total is None else _dense(grad_total)
    branch = _dense(a.branch) if needs.gamma and a.branch is not None else None
    options = config(C, 4 + sum(needs[2:]))
    # Whole tiles, so that none reaches into the tokens of the next program.
    share = triton.cdiv(triton.cdiv(T, PROGRAMS * processors(grad.device)), options["ROWS"]) * options["ROWS"]
    programs = triton.cdiv(T, share)
    # One row per program, summed afterwards: atomics would add in another order in each run.
    sums = [rstd.new_empty(programs, C) if need else None for need in needs[2:]]
    with torch.cuda.device_of(grad):
        _backward_kernel[(programs,)](
            grad, grad_total, total, branch, None if a.gamma is None else a.gamma.contiguous(), a.weight.contiguous(), mean, rstd,
            dx if dx.numel() else None, dbranch if dbranch.numel() else None, *sums, T, C, share,
            grad.stride(0), 0 if grad_total is None else grad_total.stride(0), 0 if branch is None else branch.stride(0),
            RMS=a.rms, **options,
        )  # fmt: skip
    dgamma, dweight, dbias = (rstd.new_empty(0) if part is None else part.sum(0) for part in sums)
    return dx, dbranch, dgamma, dweight, dbias
