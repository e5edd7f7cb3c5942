"""The focal loss on the sigmoid of every pair (RO-ViT)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlp_kernels import _inputs

from .fused import fused_sum
from .inputs import align, check
from .softmax_terms import operand, softplus

NAME = "focal_sigmoid_loss"


def focal_sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    *,
    gamma: float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """1/N * sum over pairs of -(1 - p_ij)^gamma * log p_ij, with p_ij = sigmoid(S_ij) for i = j, else 1 - sigmoid(S_ij).

    S_ij = scale * <image_i, text_j> + bias: the focal loss (Lin et al. 2017, arXiv:1708.02002) for the contrastive one (RO-ViT, Kim et al.
    2023, arXiv:2305.07011, whose are ``gamma`` and the equal weights). ``gamma=0`` is SigLIP. One sweep; S is never stored.

    Args:
        image, text: [N, D], row i of both is a pair; float32, bfloat16 or float16 (float64 on the CPU). scale, bias: numbers, 0-d or [1].
        compute_dtype: of the products; None: autocast's, else the features'.

    Returns:
        0-d, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: the inputs do not fit, or ``gamma`` is negative.
    """
    check(NAME, image, text)
    image, text = align(NAME, image, text)
    if not gamma >= 0:
        raise ValueError(f"{NAME}: gamma={gamma}; it must be 0 (no focus) or more")
    dtype = _inputs.product_dtype(NAME, image, compute_dtype)
    factor, shift = (_inputs.scalar(NAME, n, value, image, _inputs.sum_dtype(dtype)) for n, value in (("scale", scale), ("bias", bias)))

    def tile(blocks: list[Tensor], rows: slice, cols: slice, needs: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
        (u,) = blocks
        u.diagonal(rows.start - cols.start).neg_()  # log((1 - p) / p)
        missed, loss = u.sigmoid(), softplus(u)
        weight = missed.pow(gamma)
        total = (weight * loss).sum(dtype=torch.float64)
        if not needs[0]:
            return total, [None]
        # d/du = (1 - p)^gamma * (gamma * p * -log p + (1 - p)); p is small where 1 - p has no digits of it left.
        gradient = loss.mul_(u.neg_().sigmoid_()).mul_(gamma).add_(missed).mul_(weight)
        gradient.diagonal(rows.start - cols.start).neg_()
        return total, [gradient]

    with torch.autocast(image.device.type, enabled=False):
        return fused_sum(tile, [operand(image, dtype), operand(text, dtype)], [(0, 1)], factor, shift) / len(image)
