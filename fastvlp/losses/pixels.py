"""The error of predicted patches against normalised pixels."""

from __future__ import annotations

from torch import Tensor


def pixel_error(predicted: Tensor, pixels: Tensor) -> Tensor:
    """The mean square error of each patch: [T].

    Each patch of ``pixels`` is first brought to mean 0 and variance 1 (MAE's norm_pix_loss, He et al. 2021, arXiv:2111.06377, also AIM's):
    unbiased variance, plus 1e-6 on pixels in 0..1, as in github.com/facebookresearch/mae.

    Args:
        predicted: [T, P*P*3], in floating point. pixels: as many in 0..255, of any dtype.

    Raises:
        ValueError: the shapes differ.
    """
    if predicted.ndim != 2 or predicted.shape != pixels.shape:
        raise ValueError(f"pixel_error: {tuple(predicted.shape)} predicted for pixels {tuple(pixels.shape)}; both must be [T, P*P*3]")
    x = pixels.to(predicted.dtype) / 255
    # A patch of one colour has variance 0: without the small number its target, and with it every gradient, would be NaN.
    target = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-6).sqrt()
    return (predicted - target).square().mean(1)
