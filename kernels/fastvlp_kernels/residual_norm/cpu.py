"""residual_norm in whole passes of PyTorch's own kernels, for the CPU and for any device without Triton.

Blocks of tokens that stay in a cache from the sum to the norm were tried: copying out of them cost more than the pass that they spared.
"""

import torch
from torch import Tensor

from .._inputs import sum_dtype
from .arguments import Inputs, Needs, Saved


def forward(a: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [T, C], total [T, C], mean and reciprocal standard deviation [T] in the dtype of sums; no mean ([0]) of RMS."""
    C, acc = a.x.shape[1], sum_dtype(a.total_dtype)
    weight = a.weight.to(acc)
    gamma, bias = (None if v is None else v.to(acc) for v in (a.gamma, a.bias))
    if gamma is None:
        total = torch.add(a.x, a.branch)
    else:
        total = torch.addcmul(a.x.to(acc), a.branch.to(acc), gamma).to(a.total_dtype)
    # The norm reads the sum as it is stored, rounded, so that a backward pass from the stored sum fits.
    wide = total.to(acc).contiguous()
    if a.rms:
        # vector_norm squares and adds in one pass; the mean of squares would store the squares first.
        rstd = torch.linalg.vector_norm(wide, dim=1).square_().div_(C).add_(a.eps).rsqrt_()
        out = torch.mul(wide, rstd[:, None]).mul_(weight)
        return (out if bias is None else out.add_(bias)).to(a.dtype), total.contiguous(), rstd.new_empty(0), rstd
    out, mean, rstd = torch.native_layer_norm(wide, [C], weight, bias, a.eps)
    return out.to(a.dtype), total.contiguous(), mean.flatten(), rstd.flatten()


def backward(a: Saved, grad: Tensor, grad_total: Tensor | None, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (of branch too where they share it), branch, gamma, weight and bias; [0] where ``needs`` says no."""
    C, acc = a.total.shape[1], a.rstd.dtype
    through = needs.x or needs.branch or needs.gamma
    dx, dbranch = a.total.new_empty(0, dtype=a.x_dtype), a.total.new_empty(0, dtype=a.branch_dtype)
    dgamma, dweight, dbias = (a.rstd.new_empty(0) for _ in range(3))
    weight, wide, g, rstd = a.weight.to(acc), a.total.to(acc), grad.to(acc).contiguous(), a.rstd[:, None]
    if a.rms:
        unit = wide * rstd
        dweight = (g * unit).sum(0) if needs.weight else dweight
        dbias = g.sum(0) if needs.bias else dbias
        of_unit = g * weight
        ds = torch.addcmul(of_unit, unit, (of_unit * unit).mean(1, keepdim=True), value=-1).mul_(rstd)
    else:
        bias = None if a.bias is None else a.bias.to(acc)
        ds, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            g, wide, [C], a.mean[:, None], rstd, weight, bias, [through, needs.weight, needs.bias]
        )
        dweight, dbias = of_weight if needs.weight else dweight, of_bias if needs.bias else dbias
    if through:
        # total has two readers: the norm, and whoever takes it on as the residual stream.
        if grad_total is not None:
            ds += grad_total
        if needs.x or (needs.branch and a.shared):
            dx = ds.to(a.x_dtype)
        if needs.gamma and a.branch is not None:
            dgamma = (ds * a.branch).sum(0)
        if needs.branch and not a.shared:
            dbranch = (ds if a.gamma is None else ds * a.gamma).to(a.branch_dtype)
    return dx, dbranch, dgamma, dweight, dbias
