"""A residual and the norm of its sum in plain PyTorch; autograd does the rest."""

import torch
from torch import Tensor

from .._inputs import sum_dtype
from .arguments import Inputs


def residual_norm(a: Inputs) -> tuple[Tensor, Tensor]:
    """out and total [T, C], see ``op.residual_norm``."""
    acc = sum_dtype(a.total_dtype)
    branch = a.branch.to(acc)
    total = (a.x.to(acc) + (branch if a.gamma is None else branch * a.gamma.to(acc))).to(a.total_dtype)
    wide = total.to(acc)
    centred = wide if a.rms else wide - wide.mean(1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + a.eps) * a.weight.to(acc)
    return (out if a.bias is None else out + a.bias.to(acc)).to(a.dtype), total
