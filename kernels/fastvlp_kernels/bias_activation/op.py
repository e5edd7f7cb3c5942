"""``bias_activation``: what stands between the two products of a feed-forward layer, in one pass over memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _check, _op
from . import reference

OP = "bias_activation"
IMPLEMENTATIONS = ("triton", "cpu", "reference")
KINDS = ("gelu", "geglu", "relu2")


def _forward(x: Tensor, bias: Tensor | None, kind: str, impl: str) -> Tensor:
    found: Tensor = _op.module(__package__, impl).forward(x, bias, kind)
    return found


_bias_activation = _op.custom_op(OP)(_forward)


@_bias_activation.register_fake
def _(x, bias, kind, impl):
    return x.new_empty(x.shape[0], x.shape[1] // 2 if kind == "geglu" else x.shape[1])


def _gradients(grad: Tensor, x: Tensor, bias: Tensor | None, kind: str, impl: str, needs: list[bool]) -> tuple[Tensor, Tensor]:
    dx, dbias = _op.module(__package__, impl).backward(grad, x, bias, kind, needs)
    return dx, dbias if bias is None else dbias.to(bias.dtype)


_bias_activation_backward = _op.custom_op(f"{OP}_backward")(_gradients)


@_bias_activation_backward.register_fake
def _(grad, x, bias, kind, impl, needs):
    dtype = torch.promote_types(x.dtype, torch.float32) if bias is None else bias.dtype
    return x.new_empty(x.shape if needs[0] else (0,)), x.new_empty(x.shape[1:] if needs[1] else (0,), dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.kind, ctx.impl = inputs
    # x, which exists already, and not x + bias, which would have to be written as well.
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    # In grad mode a second derivative is asked for, and its refusal is registered with the operator alone.
    direct = _op.untraced(grad) and not torch.is_grad_enabled()
    run: Callable[..., tuple[Tensor, ...]] = _gradients if direct else torch.ops.fastvlp.bias_activation_backward
    found = run(grad, *ctx.saved_tensors, ctx.kind, ctx.impl, needs)
    return (*(g if need else None for g, need in zip(found, needs, strict=True)), None, None)


class _Direct(torch.autograd.Function):
    """The operator without the Python of ``custom_op``, which takes longer than a small batch on a CPU."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


_op.differentiate(OP, _bias_activation, _bias_activation_backward, _setup, _backward)


def bias_activation(x: Tensor, bias: Tensor | None = None, activation: str = "gelu", *, impl: str | None = None) -> Tensor:
    """activation(x + bias), where x is a product without its bias; backward makes the gradients of both in one pass.

    Computed in float32 (float64 for float64), rounded once. What is kept for backward is x. The bias's gradient is a sum over all tokens
    in a fixed order.

    Args:
        x: [..., H], float32, bfloat16, float16 or float64, any strides. bias: [H], or None.
        activation: "gelu": h Phi(h) (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415), by the error function; "relu2":
            max(h, 0)^2 (So et al. 2021, https://arxiv.org/abs/2109.08668); "geglu": H is even, the first half times the gelu of the
            second (Shazeer 2020, https://arxiv.org/abs/2002.05202).
        impl: "triton", "cpu", "reference"; None takes the first that runs on the device.

    Returns:
        [..., H], of "geglu" [..., H / 2], in the dtype of x; exact first derivatives in x and bias.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or an unknown activation.
        RuntimeError: ``impl`` cannot run here; a second or a forward-mode derivative is asked for.
    """
    _check.plain_tensors(OP, x=x, bias=bias)
    if x.ndim < 1 or x.dtype not in _check.FLOATS or x.shape[-1] == 0:
        raise ValueError(f"{OP}: x is {x.dtype} {tuple(x.shape)}; it must be [..., H], floating point, with H at least 1")
    _check.vector(OP, "bias", bias, x.shape[-1])
    if activation not in KINDS:
        raise ValueError(f"{OP}: activation={activation!r} is unknown; allowed: {', '.join(map(repr, KINDS))}")
    if activation == "geglu" and x.shape[-1] % 2:
        raise ValueError(f"{OP}: x has width {x.shape[-1]}; for 'geglu' it must be even, values and gates")
    chosen = _op.choose(OP, impl, x.device, IMPLEMENTATIONS, (x.dtype,), (x, bias))
    flat = x.reshape(-1, x.shape[-1])
    if chosen == "reference":
        out = reference.bias_activation(flat, bias, activation)
    else:
        run = _Direct.apply if chosen == "cpu" and _op.untraced(x) else torch.ops.fastvlp.bias_activation
        out = run(flat, bias, activation, chosen)
    return out.view(*x.shape[:-1], out.shape[1])
