"""``grouped_linear``: a linear layer whose weights are those of each token's type."""

from typing import Any

import torch
from torch import Tensor

from .. import _check, _op
from .._inputs import product_dtype, sum_dtype
from . import reference
from .routing import route

OP = "grouped_linear"
IMPLEMENTATIONS = ("triton", "cpu", "reference")


@_op.custom_op(OP)
def _grouped_linear(x: Tensor, types: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """The product [T, O], and what backward reads again: the order of the tokens [T] and where each type starts [types + 1]."""
    order, starts = route(OP, types, len(weight))
    return _op.module(__package__, impl).forward(x, order, starts, weight, bias), order, starts


@_grouped_linear.register_fake
def _(x, types, weight, bias, impl):
    order = types.new_empty(types.shape, dtype=torch.int64)
    return x.new_empty(x.shape[0], weight.shape[1]), order, types.new_empty(weight.shape[0] + 1, dtype=torch.int32)


@_op.custom_op(f"{OP}_backward")
def _grouped_linear_backward(
    grad: Tensor, x: Tensor, order: Tensor, starts: Tensor, weight: Tensor, bias: Tensor | None, impl: str, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _op.module(__package__, impl).backward(grad, x, order, starts, weight, needs)
    return dx, dweight, dbias if bias is None else dbias.to(bias.dtype)


@_grouped_linear_backward.register_fake
def _(grad, x, order, starts, weight, bias, impl, needs):
    shapes = (x.shape, weight.shape, weight.shape[:2])
    dtypes = (x.dtype, weight.dtype, sum_dtype(x.dtype) if bias is None else bias.dtype)
    return tuple(x.new_empty(shape if need else (0,), dtype=d) for shape, d, need in zip(shapes, dtypes, needs, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, weight, bias, ctx.impl = inputs
    ctx.save_for_backward(x, *output[1:], weight, bias)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    found = torch.ops.fastvlp.grouped_linear_backward(grad, *ctx.saved_tensors, ctx.impl, needs)
    dx, dweight, dbias = (g if need else None for g, need in zip(found, needs, strict=True))
    return dx, None, dweight, dbias, None


_op.differentiate(OP, _grouped_linear, _grouped_linear_backward, _setup, _backward)


def grouped_linear(x: Tensor, types: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """out_t = weight[types_t] x_t + bias[types_t]: every token costs what it costs in one linear layer (mixture of transformers,
    https://arxiv.org/abs/2411.04996).

    Sums are in float32 (float64 for float64). Under autocast the operands become its dtype. Gradients of a type are summed in a fixed
    order.

    Args:
        x: [T, I] and weight: [types, O, I], float32, bfloat16 or float16 (float64 with impl "cpu" and "reference"), any strides; T may
            be 0, and a type may have no tokens. bias: [types, O], floating point.
        types: integers [T] from 0 to types - 1. On a CUDA device, where looking would cost a synchronisation, any other leaves its token's
            result undefined.
        impl: "triton", which reads tokens through their order; "cpu", which sorts them (on CUDA devices in bfloat16 by
            ``torch._grouped_mm``); "reference", every token through every type; None takes the first that runs on the device.

    Returns:
        [T, O] in the dtype of the products; x, weight and bias get exact first derivatives.

    Raises:
        TypeError, ValueError: wrong inputs. RuntimeError: ``impl`` cannot run here; a second or a forward-mode derivative is asked for.
    """
    _check.plain_tensors(OP, 3, x=x, types=types, weight=weight, bias=bias)
    for name, tensor, sides, ndim in (("x", x, "[tokens, in]", 2), ("weight", weight, "[types, out, in]", 3)):
        if tensor.ndim != ndim or tensor.dtype not in _check.FLOATS:
            raise ValueError(f"{OP}: {name} is {tensor.dtype} {tuple(tensor.shape)}; it must be {sides}, floating point")
    if x.shape[1] != weight.shape[2] or weight.numel() == 0:
        got = f"x has shape {tuple(x.shape)} and weight has shape {tuple(weight.shape)}"
        raise ValueError(f"{OP}: {got}; they must be [tokens, in] and [types, out, in] of one width, with at least one type, out and in")
    _check.vector(OP, "types", types, x.shape[0], integer=True)
    if bias is not None and (bias.shape != weight.shape[:2] or not bias.is_floating_point()):
        want = f"[types, out] = {tuple(weight.shape[:2])}, floating point"
        raise ValueError(f"{OP}: bias is {bias.dtype} {tuple(bias.shape)}; it must be {want}")
    dtype = product_dtype(OP, x, None)
    if dtype != product_dtype(OP, weight, None):
        raise TypeError(f"{OP}: x is {x.dtype} and weight is {weight.dtype}; cast one of them")
    chosen = _op.choose(OP, impl, x.device, IMPLEMENTATIONS, (dtype,), (x, weight, bias))
    x, weight = x.to(dtype), weight.to(dtype)
    if chosen == "reference":
        return reference.grouped_linear(x, types, weight, bias)
    out: Tensor = torch.ops.fastvlp.grouped_linear(x, types, weight, bias, chosen)[0]
    return out
