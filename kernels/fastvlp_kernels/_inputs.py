"""What the operators do to their inputs before any arithmetic: dtypes, scalars, and which of them need a gradient."""

import torch
from torch import Tensor

from ._check import FLOATS


def product_dtype(op: str, x: Tensor, requested: torch.dtype | None) -> torch.dtype:
    """The dtype of the operands of matrix products: ``requested``, else autocast's, else that of ``x``.

    Like autocast itself, it leaves float64 alone.

    Raises:
        TypeError: ``requested`` is not a floating-point dtype that the operators compute in.
    """
    if requested is not None:
        if requested not in FLOATS:
            allowed = "float32, bfloat16, float16 (or float64 on the CPU), or None for autocast's"
            raise TypeError(f"{op}: compute_dtype={requested}; allowed: {allowed}")
        return requested
    device = x.device.type
    # Autocast leaves float64 alone as PyTorch's own products do, and knows no "meta" device.
    if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulation, statistics and losses for operands of ``dtype``: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scalar(op: str, name: str, value: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` as a 0-d tensor of ``dtype`` beside ``x``; a tensor's gradient goes back to it in its own shape and dtype.

    Raises:
        TypeError: not a number nor a floating-point tensor.
        ValueError: a tensor of more than one element, or on another device.
    """
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} is {type(value).__name__}; it must be a number or a tensor with one element")
        # Filled on the device: a copy of a Python number from the host would wait for the device.
        return torch.full((), value, dtype=dtype, device=x.device)
    if type(value).__name__ == "DTensor":
        raise TypeError(f"{op}: {name} is a DTensor, which this operator does not take; pass {name}.to_local() or {name}.full_tensor()")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} is a {value.dtype} tensor; it must be floating point")
    if value.shape not in ((), (1,)):
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; it must be a number, a 0-d tensor or a tensor of shape (1,)")
    if value.device != x.device:
        raise ValueError(f"{op}: x is on {x.device} but {name} is on {value.device}; move them to one device")
    return value if value.ndim == 0 and value.dtype == dtype else value.reshape(()).to(dtype)


def needs_grad(*tensors: Tensor | None) -> list[bool]:
    """Which of ``tensors`` take part in differentiation here and now (none under ``no_grad``)."""
    enabled = torch.is_grad_enabled()
    return [enabled and tensor is not None and tensor.requires_grad for tensor in tensors]
