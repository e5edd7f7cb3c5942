"""Input checks that the operators share: each refusal says what was got, what is allowed and what to do."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plain_tensors(op: str, **tensors: Tensor | None) -> None:
    """Refuse DTensors by name, and tensors that do not share one device."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if type(tensor).__name__ == "DTensor":
            raise TypeError(f"{op}: {name} is a DTensor, which this operator does not take; pass {name}.to_local() or {name}.full_tensor()")
        if device is None:
            device, first = tensor.device, name
        elif tensor.device != device:
            raise ValueError(f"{op}: {first} is on {device} but {name} is on {tensor.device}; move them to one device")


def features(op: str, x: Tensor, y: Tensor) -> None:
    """Refuse anything but two floating-point matrices of one width and one dtype, on one device."""
    plain_tensors(op, x=x, y=y)
    for name, tensor in (("x", x), ("y", y)):
        if tensor.ndim != 2:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be a matrix [rows, width]")
        if tensor.dtype not in FLOATS:
            allowed = "float32, bfloat16, float16 (or float64 on the CPU)"
            raise TypeError(f"{op}: {name} is {tensor.dtype}; features must be floating point: {allowed}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{op}: x has width {x.shape[1]} and y has width {y.shape[1]}; both towers must project to one width")
    if x.shape[1] == 0:
        raise ValueError(f"{op}: the features have width 0; at least 1 is needed")
    if x.dtype != y.dtype:
        raise TypeError(f"{op}: x is {x.dtype} and y is {y.dtype}; cast one of them")


def vector(op: str, name: str, tensor: Tensor | None, length: int, integer: bool = False) -> None:
    """Refuse a per-row or per-column vector of the wrong length or kind."""
    if tensor is None:
        return
    if tensor.shape != (length,):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must have shape ({length},)")
    if tensor.is_floating_point() == integer or tensor.is_complex():
        raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be {'an integer' if integer else 'a floating-point'} tensor")
