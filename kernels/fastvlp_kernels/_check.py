"""Input checks that the operators share: each refusal says what was got, what is allowed and what to do."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plain_tensors(op: str, required: int = 1, /, **tensors: Tensor | None) -> None:
    """Refuse by name what is no dense tensor (None is fine after the ``required`` first), and tensors that do not share one device."""
    device = None
    for place, (name, tensor) in enumerate(tensors.items()):
        if tensor is None and place >= required:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is {type(tensor).__name__}; it must be a torch.Tensor (torch.as_tensor makes one of an array)")
        # By name: importing DTensor takes long, and most processes never make one.
        if type(tensor).__name__ == "DTensor":
            raise TypeError(f"{op}: {name} is a DTensor, which this operator does not take; pass {name}.to_local() or {name}.full_tensor()")
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} has the layout {tensor.layout}; it must be dense, as {name}.to_dense() is")
        if device is None:
            device, first = tensor.device, name
        elif tensor.device != device:
            raise ValueError(f"{op}: {first} is on {device} but {name} is on {tensor.device}; move them to one device")


def features(op: str, x: Tensor, y: Tensor) -> None:
    """Refuse anything but two floating-point matrices of one width and one dtype, on one device."""
    plain_tensors(op, 2, x=x, y=y)
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
    plain_tensors(op, **{name: tensor})
    if tensor.shape != (length,):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must have shape ({length},)")
    if tensor.is_floating_point() == integer or tensor.is_complex():
        raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be {'an integer' if integer else 'a floating-point'} tensor")
