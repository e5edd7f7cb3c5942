"""Functions with a first derivative in reverse mode and no other: what else is asked of them is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fastvlp_kernels._op import refuse_forward_mode

Backward = Callable[..., Any]


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``.

    Raises:
        RuntimeError: under forward-mode differentiation of one of the tensors.
    """
    refuse_forward_mode("fastvlp.losses", *(arg for arg in args if isinstance(arg, Tensor)))
    return function.apply(*args)


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        raise RuntimeError("fastvlp.losses: this loss has no second derivatives; take no gradient of its gradient")


def no_second_derivatives(backward: Backward) -> Backward:
    """For the ``backward`` of a ``torch.autograd.Function``.

    PyTorch's ``once_differentiable`` refuses only where the upstream gradient needs a gradient itself: with a loss that is differentiated
    directly, the usual case, a penalty on its gradient would silently have none.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor) -> Any:
        with torch.no_grad():
            # In numbers only: recording operators that refuse would refuse in the first derivative already.
            found = backward(ctx, *gradients)
        # Without create_graph nobody can ask for a second derivative.
        if not torch.is_grad_enabled():
            return found
        parts = found if isinstance(found, tuple) else (found,)
        return tuple(_Refusal.apply(part.requires_grad_()) if isinstance(part, Tensor) else part for part in parts)

    return wrapped


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @no_second_derivatives
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.detach()


def differentiable_once(*inputs: Tensor) -> tuple[Tensor, ...]:
    """``inputs`` of a loss that has no second derivatives as a whole, though a part of it, an operator, advises on how to get its own."""
    return tuple(apply(_Once, x) for x in inputs)
