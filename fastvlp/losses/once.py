"""Gradients that cannot be differentiated again say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., Any]


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
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        parts = found if isinstance(found, tuple) else (found,)
        return tuple(_Refusal.apply(part.requires_grad_()) if isinstance(part, Tensor) else part for part in parts)

    return wrapped
