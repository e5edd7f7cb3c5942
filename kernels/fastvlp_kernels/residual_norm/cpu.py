"""residual_norm in blocks of tokens that stay in a cache from the sum to the norm, for the CPU and for any device without Triton.

Memory is passed over four times forward (x, branch, total, out), where the sum and the norm one after the other take five.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._inputs import sum_dtype
from .arguments import Inputs, Needs

ELEMENTS = 2**18  # of a block: 1 MiB in float32


def forward(a: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [T, C], total [T, C], mean and reciprocal standard deviation [T] in the dtype of sums; no mean ([0]) of RMS."""
    (T, C), acc = a.x.shape, sum_dtype(a.total_dtype)
    gamma, weight, bias = (None if v is None else v.to(acc) for v in (a.gamma, a.weight, a.bias))
    total, out = a.x.new_empty(T, C, dtype=a.total_dtype), a.x.new_empty(T, C, dtype=a.dtype)
    mean, rstd = a.x.new_empty(0 if a.rms else T, dtype=acc), a.x.new_empty(T, dtype=acc)
    for rows in _blocks(T, C):
        if gamma is None:
            torch.add(a.x[rows], a.branch[rows], out=total[rows])
        else:
            total[rows] = torch.addcmul(a.x[rows].to(acc), a.branch[rows].to(acc), gamma)
        # The norm reads the sum as it is stored, rounded, so that a backward pass from the stored sum fits.
        wide = total[rows].to(acc)
        if a.rms:
            torch.add(torch.linalg.vector_norm(wide, dim=1).square_().div_(C), a.eps, out=rstd[rows]).rsqrt_()
            normed = torch.mul(wide, rstd[rows, None]).mul_(weight)
            normed = normed if bias is None else normed.add_(bias)
        else:
            normed, of_rows, deviation = torch.native_layer_norm(wide, [C], weight, bias, a.eps)
            mean[rows], rstd[rows] = of_rows[:, 0], deviation[:, 0]
        out[rows] = normed
    return out, total, mean, rstd


def backward(
    a: Inputs, grad: Tensor, grad_total: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (of branch too where they share it), branch, gamma, weight and bias; [0] where ``needs`` says no."""
    (T, C), acc = a.x.shape, sum_dtype(a.total_dtype)
    through = needs.x or needs.branch or needs.gamma
    dx = a.x.new_empty((T, C) if needs.x or (needs.branch and a.shared) else (0,))
    dbranch = a.branch.new_empty((T, C) if needs.branch and not a.shared else (0,))
    dgamma, dweight, dbias = (a.x.new_zeros(C if need else 0, dtype=acc) for need in needs[2:])
    weight, bias = a.weight.to(acc), None if a.bias is None else a.bias.to(acc)
    for rows in _blocks(T, C):
        wide, g = total[rows].to(acc), grad[rows].to(acc)
        if a.rms:
            unit = wide * rstd[rows, None]
            if needs.weight:
                dweight += (g * unit).sum(0)
            if needs.bias:
                dbias += g.sum(0)
            of_unit = g * weight
            # The gradient of a norm has no part along what it normalised.
            ds = torch.addcmul(of_unit, unit, (of_unit * unit).mean(1, keepdim=True), value=-1).mul_(rstd[rows, None])
        else:
            statistics = (mean[rows, None], rstd[rows, None])
            ds, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
                g.contiguous(), wide, [C], *statistics, weight, bias, [through, needs.weight, needs.bias]
            )
            if needs.weight:
                dweight += of_weight
            if needs.bias:
                dbias += of_bias
        if not through:
            continue
        if grad_total is not None:
            ds += grad_total[rows]
        if dx.numel():
            dx[rows] = ds
        if needs.gamma:
            dgamma += (ds * a.branch[rows]).sum(0)
        if dbranch.numel():
            dbranch[rows] = ds if a.gamma is None else ds.mul_(a.gamma)
    return dx, dbranch, dgamma, dweight, dbias


def _blocks(T: int, C: int) -> Iterator[slice]:
    step = max(1, ELEMENTS // C)
    return (slice(i, min(i + step, T)) for i in range(0, T, step))
