"""bias_activation in blocks of tokens that stay in a cache from one step to the next, for the CPU and for any device without Triton."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .._inputs import sum_dtype

ELEMENTS = 2**18  # of a block: 1 MiB in float32
WHOLE = 2**21  # so many are one block, for copies out of blocks would cost more than they save
_gelu_backward = torch.ops.aten.gelu_backward.default


def forward(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """[T, H] (geglu: [T, H / 2]) in the dtype of x."""
    T, H = x.shape
    if T * H <= WHOLE:
        # Elementwise results keep the strides of x, while the operator's fake promises contiguous ones.
        return _forward(x, bias, kind).contiguous()
    out = x.new_empty(T, H // 2 if kind == "geglu" else H)
    for rows in _blocks(T, H):
        out[rows] = _forward(x[rows], bias, kind)
    return out


def _forward(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    hidden = _hidden(x, bias)
    if kind == "relu2":
        positive = hidden.clamp_min(0)
        # clamp_min keeps NaN, and made a tensor of its own, which may be squared in place.
        out = positive.mul_(positive)
    elif kind == "geglu":
        value, gate = hidden.chunk(2, 1)
        out = F.gelu(gate).mul_(value)
    else:
        out = F.gelu(hidden)
    return out.to(x.dtype)


def backward(grad: Tensor, x: Tensor, bias: Tensor | None, kind: str, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of x and, in the dtype of sums, of the bias; [0] where ``needs`` says no."""
    T, H = x.shape
    if T * H <= WHOLE:
        return _backward(grad, x, bias, kind, needs)
    dx = x.new_empty((T, H) if needs[0] else (0,))
    # In the dtype of sums: added in 16 bits, the gradients of late tokens would be lost beside the sum.
    dbias = x.new_zeros(H if needs[1] else 0, dtype=sum_dtype(x.dtype))
    for rows in _blocks(T, H):
        of_rows, sums = _backward(grad[rows], x[rows], bias, kind, needs)
        if needs[0]:
            dx[rows] = of_rows
        dbias += sums
    return dx, dbias


def _backward(grad: Tensor, x: Tensor, bias: Tensor | None, kind: str, needs: list[bool]) -> tuple[Tensor, Tensor]:
    hidden = _hidden(x, bias)
    g = grad.to(hidden.dtype)
    if kind == "relu2":
        slope = hidden.clamp_min(0).mul_(g).mul_(2)
    elif kind == "geglu":
        value, gate = hidden.chunk(2, 1)
        # Values beside gates, as they lie in x, so that one sum over tokens gives the gradients of both biases.
        slope = torch.cat((F.gelu(gate).mul_(g), _gelu_backward(value * g, gate)), 1)
    else:
        slope = _gelu_backward(g, hidden)
    # The bias's sum reads the slope before it is rounded to the dtype of x.
    dx = slope.to(x.dtype).contiguous() if needs[0] else x.new_empty(0)
    return dx, slope.sum(0) if needs[1] else hidden.new_empty(0)


def _hidden(x: Tensor, bias: Tensor | None) -> Tensor:
    wide = x.to(sum_dtype(x.dtype))
    return wide if bias is None else wide + bias.to(wide.dtype)


def _blocks(T: int, H: int) -> Iterator[slice]:
    step = max(1, ELEMENTS // H)
    return (slice(i, min(i + step, T)) for i in range(0, T, step))
