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
    """1/N * sum over pairs of -(1 - p_ij)^gamma * log p_ij, p_ij the sigmoid's probability of what the pair (i, j) is.

    With S_ij = scale * <image_i, text_j> + bias, p_ii = sigmoid(S_ii) and p_ij = 1 - sigmoid(S_ij) for i != j: the focal loss (Lin et al.
    2017, arXiv:1708.02002) in the place of the contrastive one (RO-ViT, Kim et al. 2023, arXiv:2305.07011; ``gamma`` and the equal weights
    of pairs and negatives are the authors'). ``gamma=0`` is the loss of SigLIP. Value and gradients come from one sweep; S is never stored.

    Args:
        image, text: [N, D], row i of both is a pair; float32, bfloat16 or float16 (float64 on the CPU).
        scale, bias: numbers, 0-d or [1] tensors.
        gamma: 0 or more.
        compute_dtype: what the features are rounded to for the products; None: autocast's dtype, else that of the features.

    Returns:
        A 0-d tensor, float32 (float64 for float64).

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
