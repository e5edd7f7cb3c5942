"""ProLIP's objectives: images and texts as Gaussians with diagonal covariance (Chun et al. 2024, arXiv:2410.18857)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlp_kernels import _check, _inputs
from fastvlp_kernels.pairwise_sigmoid import pairwise_sigmoid

from .inputs import align, check

NAME = "prolip_loss"
RELEASED_WEIGHT = math.exp(-10)  # of distances, in the authors' code


def prolip_loss(
    image_mean: Tensor,
    image_log_variance: Tensor,
    text_mean: Tensor,
    text_log_variance: Tensor,
    scale: float | Tensor,
    bias: float | Tensor = 0.0,
    *,
    compute_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """The probabilistic pairwise sigmoid loss of the pairs of this process; nothing M x N is stored (ProLIP).

    The sampled distance is d_ij = |mu_i - mu_j|^2 + sum of var_i + sum of var_j in closed form, so that with normalised means the logits
    are

        scale * (<mu_i, mu_j> - (sum of var_i + sum of var_j) / 2) + bias.

    The loss is the sum over pairs of softplus(-z_ij * logit_ij), z = 1 for i = j, else -1, over the number of pairs (i, i); beyond the
    shorter side all is negative. The published objective adds a little of ``inclusion_loss`` (images in their texts, whole inputs in masked
    ones) and ``gaussian_kl`` of both sides.

    Args:
        image_mean: [M, D] and text_mean: [N, D], normalised; float32, bfloat16 or float16 (float64 on the CPU).
        image_log_variance, text_log_variance: natural logarithms, as many, of any floating-point dtype; computed in float32.
        scale, bias: numbers, 0-d or [1]. compute_dtype, impl: see :func:`fastvlp.ops.pairwise_sigmoid`.

    Returns:
        0-d, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: the inputs do not fit.
    """
    check(NAME, image_mean, text_mean, pairs=False)
    for name, mean, log_variance in (("image", image_mean, image_log_variance), ("text", text_mean, text_log_variance)):
        _check_gaussians(NAME, **{f"{name}_mean": mean, f"{name}_log_variance": log_variance})
    image_mean, text_mean = align(NAME, image_mean, text_mean)
    sums = _inputs.sum_dtype(_inputs.product_dtype(NAME, image_mean, compute_dtype))
    scale = _inputs.scalar(NAME, "scale", scale, image_mean, sums)
    with torch.autocast(image_mean.device.type, enabled=False):
        # The expected squared distance of two Gaussians is that of their means plus all variances: biases of rows and columns.
        spread = (scale * (log_variance.to(sums).exp().sum(1) / -2) for log_variance in (image_log_variance, text_log_variance))
    return pairwise_sigmoid(
        image_mean, text_mean, scale, bias, row_bias=next(spread), col_bias=next(spread),
        factor=1 / min(len(image_mean), len(text_mean)), compute_dtype=compute_dtype, impl=impl,
    )  # fmt: skip


def log_inclusion(mean: Tensor, log_variance: Tensor, mean_of: Tensor, log_variance_of: Tensor, *, released: bool = False) -> Tensor:
    """How much the first Gaussians p lie inside the second ones q: log of the integral of p^2 q over that of p q^2, by feature.

    Positive where p is inside of q, negative the other way round; summed over features it is that of the joint densities. With variances u
    of p, v of q and t = (v - u) / (v + u), it is (no difference of two integrals)

        log(v / u) / 2 - atanh(t / 3) + 4 t (mean - mean_of)^2 / ((u + v) (9 - t^2))

    Args:
        mean, log_variance, mean_of, log_variance_of: [..., D] of p and q, of one shape, floating point.
        released: as the authors' code: log(v / u) not halved, and the term with the distance times e^-10.

    Returns:
        [..., D], float32 (float64 if an input is).

    Raises:
        TypeError, ValueError: not of one shape, on one device, or floating point.
    """
    given = {"mean": mean, "log_variance": log_variance, "mean_of": mean_of, "log_variance_of": log_variance_of}
    mean, log_variance, mean_of, log_variance_of = _wide("log_inclusion", **given)
    wider = log_variance_of - log_variance
    t = torch.tanh(wider / 2)
    # 1 / (v + v') through logarithms, which do not overflow.
    apart = (mean - mean_of).square() * torch.exp(-torch.logaddexp(log_variance, log_variance_of))
    share, weight = (1.0, RELEASED_WEIGHT) if released else (0.5, 1.0)
    return share * wider - torch.atanh(t / 3) + weight * 4 * t * apart / (9 - t.square())


def inclusion_loss(
    mean: Tensor, log_variance: Tensor, mean_of: Tensor, log_variance_of: Tensor, scale: float = 1.0, *, by_feature: bool = False,
    released: bool = False,
) -> Tensor:  # fmt: skip
    """The mean over rows of softplus(-scale * h), h = ``log_inclusion`` summed over features: asks the first Gaussians to lie inside the
    second.

    The authors train with ``inclusion_loss(..., scale=1000.0, by_feature=True, released=True)``.

    Args:
        mean, log_variance, mean_of, log_variance_of: [B, D], and released: see ``log_inclusion``. scale: positive.
        by_feature: each feature has its own h, and the mean is over all.

    Returns:
        0-d, float32 (float64 if an input is).

    Raises:
        TypeError, ValueError: as there, or ``scale`` is not positive.
    """
    if not scale > 0:
        raise ValueError(f"inclusion_loss: scale={scale}; it must be positive (to ask for the opposite, swap the two Gaussians)")
    h = log_inclusion(mean, log_variance, mean_of, log_variance_of, released=released)
    return -F.logsigmoid(scale * (h if by_feature else h.sum(-1))).mean()


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)), averaged over rows and features: ProLIP's information bottleneck.

    The authors' code halves the log variance first: ``gaussian_kl(mean, log_variance / 2)``.

    Args:
        mean, log_variance: [B, D], floating point.

    Returns:
        0-d, float32 (float64 if an input is).

    Raises:
        TypeError, ValueError: as in ``log_inclusion``.
    """
    mean, log_variance = _wide("gaussian_kl", mean=mean, log_variance=log_variance)
    # expm1, since near N(0, 1) both v - 1 and log v are small.
    return (mean.square() + torch.expm1(log_variance) - log_variance).mean() / 2


def _wide(name: str, **given: Tensor) -> tuple[Tensor, ...]:
    """``given``, checked, in the dtype of sums."""
    _check_gaussians(name, **given)
    sums = torch.float64 if any(tensor.dtype == torch.float64 for tensor in given.values()) else torch.float32
    return tuple(tensor.to(sums) for tensor in given.values())


def _check_gaussians(name: str, **given: Tensor) -> None:
    """Refuse anything but floating-point tensors of one shape, with at least one row and feature, on one device."""
    _check.plain_tensors(name, len(given), **given)
    (first, model), *_ = given.items()
    for what, tensor in given.items():
        if tensor.dtype not in _check.FLOATS:
            raise TypeError(f"{name}: {what} is {tensor.dtype}; it must be float32, bfloat16 or float16 (or float64 on the CPU)")
        if tensor.shape != model.shape:
            shapes = f"{first} has shape {tuple(model.shape)} and {what} {tuple(tensor.shape)}"
            raise ValueError(f"{name}: {shapes}; every feature needs a mean and a log variance")
    if model.ndim < 1 or model.numel() == 0:
        raise ValueError(f"{name}: {first} has shape {tuple(model.shape)}; at least one row and one feature are needed")
