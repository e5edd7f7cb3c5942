"""bias_activation in blocks of tokens that stay in a cache from one step to the next, for the CPU and for any device without Triton."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .._inputs import sum_dtype

ELEMENTS = 2**18  # of a block: 1 MiB in float32
_gelu_backward = torch.ops.aten.gelu_backward.default


def forward(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """[T, H] (geglu: [T, H / 2]) in the dtype of x."""
    T, H = x.shape
    out = x.new_empty(T, H // 2 if kind == "geglu" else H)
    for rows in _blocks(T, H):
        hidden = _hidden(x[rows], bias)
        if kind == "relu2":
            positive = hidden.clamp_min(0)
            out[rows] = positive.mul_(positive)
        elif kind == "geglu":
            value, gate = hidden.chunk(2, 1)
            out[rows] = F.gelu(gate).mul_(value)
        else:
            out[rows] = F.gelu(hidden)
    return out


def backward(grad: Tensor, x: Tensor, bias: Tensor | None, kind: str, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of x and, in the dtype of sums, of the bias; [0] where ``needs`` says no."""
    T, H = x.shape
    dx = x.new_empty((T, H) if needs[0] else (0,))
    dbias = x.new_zeros(H if needs[1] else 0, dtype=sum_dtype(x.dtype))
    for rows in _blocks(T, H):
        hidden = _hidden(x[rows], bias)
        g = grad[rows].to(hidden.dtype)
        if kind == "relu2":
            slope = hidden.clamp_min(0).mul_(g).mul_(2)
        elif kind == "geglu":
            value, gate = hidden.chunk(2, 1)
            slope = torch.cat((F.gelu(gate).mul_(g), _gelu_backward(value * g, gate)), 1)
        else:
            slope = _gelu_backward(g, hidden)
        if needs[1]:
            dbias += slope.sum(0)
        if needs[0]:
            dx[rows] = slope
    return dx, dbias


def _hidden(x: Tensor, bias: Tensor | None) -> Tensor:
    wide = x.to(sum_dtype(x.dtype))
    return wide if bias is None else wide + bias.to(wide.dtype)


def _blocks(T: int, H: int) -> Iterator[slice]:
    step = max(1, ELEMENTS // H)
    return (slice(i, min(i + step, T)) for i in range(0, T, step))
