"""What a loss asks of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlp_kernels import _check


def check(loss: str, image: Tensor, text: Tensor, *, pairs: bool = True) -> None:
    """Refuse features that are not two matrices of one width on one device, with ``pairs`` of one shape.

    Raises:
        TypeError: no tensor, a DTensor, or not floating point. ValueError: shapes or devices do not fit, or there are no pairs.
    """
    features = {"image_features": image, "text_features": text}
    for name, tensor in features.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{loss}: {name} is {type(tensor).__name__}; it must be a tensor [batch, width]")
    _check.plain_tensors(loss, **features)
    for name, tensor in features.items():
        if tensor.dtype not in _check.FLOATS:
            raise TypeError(f"{loss}: {name} is {tensor.dtype}; features must be float32, bfloat16 or float16 (or float64 on the CPU)")
        if tensor.ndim != 2:
            raise ValueError(f"{loss}: {name} has shape {tuple(tensor.shape)}; it must be a matrix [batch, width]")
    if image.shape[1] != text.shape[1] or image.shape[1] == 0:
        raise ValueError(f"{loss}: images have {image.shape[1]} features and texts {text.shape[1]}; project both towers to one width")
    if pairs and image.shape[0] != text.shape[0]:
        raise ValueError(f"{loss}: {image.shape[0]} images but {text.shape[0]} texts; row i of both must be the same pair")
    if 0 in (image.shape[0], text.shape[0]):
        raise ValueError(f"{loss}: the batch is empty; every process needs at least one pair (drop the last batch, or repeat a sample)")


def align(loss: str, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The features in one dtype: as they are, or, where the towers differ under autocast, cast to its dtype.

    Raises:
        TypeError: the dtypes differ outside autocast.
    """
    if image.dtype == text.dtype:
        return image, text
    device = image.device.type
    # Under autocast one tower may end in a norm (float32) and the other in a product (16 bits); elsewhere it is a mistake.
    if not torch.is_autocast_enabled(device):
        raise TypeError(f"{loss}: image_features are {image.dtype}, text_features {text.dtype}; cast one of them, or use autocast")
    dtype = torch.get_autocast_dtype(device)
    return image.to(dtype), text.to(dtype)
