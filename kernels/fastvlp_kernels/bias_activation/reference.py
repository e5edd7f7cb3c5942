"""A bias and an activation in plain PyTorch; autograd does the rest."""

from torch import Tensor
from torch.nn import functional as F

from .._inputs import sum_dtype


def bias_activation(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """[T, H] (geglu: [T, H / 2]), see ``op.bias_activation``."""
    hidden = x.to(sum_dtype(x.dtype))
    if bias is not None:
        hidden = hidden + bias.to(hidden.dtype)
    if kind == "relu2":
        return hidden.clamp_min(0).square().to(x.dtype)
    if kind == "geglu":
        value, gate = hidden.chunk(2, 1)
        return (value * F.gelu(gate)).to(x.dtype)
    return F.gelu(hidden).to(x.dtype)
