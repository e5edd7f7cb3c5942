"""CLIP's loss with consistent rankings within and between modalities (RankCLIP)."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from fastvlp_kernels import _inputs

from .across.group import ALONE
from .autograd import differentiable_once
from .fused import fused_sum
from .inputs import align, check
from .objective import contrastive_loss
from .softmax_terms import operand

NAME = "rank_clip_loss"


def rank_clip_loss(
    image: Tensor,
    text: Tensor,
    scale: float | Tensor = 1.0,
    *,
    in_modal: float = 1 / 16,
    cross_modal: float = 1 / 16,
    eps: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    stash_bytes: int = 0,
    impl: str | None = None,
) -> Tensor:
    """CLIP's loss, and list-wise losses that make two similarity matrices rank alike (RankCLIP, Zhang et al. 2024, arXiv:2404.09387).

    Row i of A is asked to be in the order of falling B_i (ListMLE, Xia et al. 2008): the sum over ranks d of
    logsumexp_{e >= d} A_i,order(e) - A_i,order(d); of equal ones the first comes first (the authors shuffle). R(A, B) is the mean over rows
    and ranks, plus that of (B, A). The loss is

    contrastive_loss(image, text, scale) + in_modal * R(image image^T, text text^T) + cross_modal * R(image text^T, text image^T),

    all matrices times ``scale``. Memory is O(N D) and a few rows; one sweep.

    Args:
        image, text, scale, compute_dtype, stash_bytes, impl: as in :func:`contrastive_loss`, [N, D].
        in_modal, cross_modal: weights; the authors' grow from 0 to 1/16 in two thirds of the training.
        eps: added to each sum of exp(A_i - max A_i): 1e-10 in the authors' code, 10% off at scale 100; 0: the likelihood itself.

    Returns:
        0-d, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: the inputs do not fit, or a weight is negative.
    """
    check(NAME, image, text)
    image, text = align(NAME, image, text)
    for name, weight in (("in_modal", in_modal), ("cross_modal", cross_modal)):
        if not weight >= 0:
            raise ValueError(f"{NAME}: {name}={weight}; it must be 0 (without this term) or more")
    if not eps >= 0:
        raise ValueError(f"{NAME}: eps={eps}; it must be 0 or more")
    dtype = _inputs.product_dtype(NAME, image, compute_dtype)
    factor = _inputs.scalar(NAME, "scale", scale, image, _inputs.sum_dtype(dtype))
    with torch.autocast(image.device.type, enabled=False):
        x, y = operand(image, dtype), operand(text, dtype)
        if in_modal or cross_modal:
            x, y, factor = differentiable_once(x, y, factor)
        loss = contrastive_loss(x, y, factor, compute_dtype=dtype, stash_bytes=stash_bytes, impl=impl, group=ALONE)
        for weight, pairs in ((in_modal, [(0, 0), (1, 1)]), (cross_modal, [(0, 1), (1, 0)])):
            if weight:
                loss = loss + weight / len(x) ** 2 * fused_sum(partial(_rank_alike, eps), [x, y], pairs, factor, whole_rows=True)
        return loss


def _rank_alike(eps: float, blocks: list[Tensor], rows: slice, cols: slice, needs: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """Of some rows of two matrices: each in the order of the other."""
    found = [_list_mle(blocks[k], blocks[1 - k], needs[k], eps) for k in (0, 1)]
    return found[0][0] + found[1][0], [gradient for _, gradient in found]


def _list_mle(scores: Tensor, reference: Tensor, need: bool, eps: float) -> tuple[Tensor, Tensor | None]:
    """Sum of ListMLE of the rows of ``scores`` [M, N] in the order of falling ``reference``, and its gradient."""
    # Stable: equal similarities have to rank alike in every run.
    order = reference.argsort(dim=1, descending=True, stable=True)
    ranked = scores.gather(1, order)
    left = ranked.flip(1).logcumsumexp(1).flip(1)  # of all that are still to be drawn
    if eps:
        highest, place = ranked.max(1, keepdim=True)
        least = highest + math.log(eps)
        left = torch.logaddexp(left, least)
    total = (left - ranked).sum(dtype=torch.float64)
    if not need:
        return total, None
    # What comes at rank k takes part in all draws up to k, with exp(ranked_k - left_d) in that of d.
    share = (least - left).exp_().sum(1, keepdim=True) if eps else None  # of eps, which is relative to the highest
    # expm1, since the exponential is near 1 where the ranking already fits.
    gradient = torch.expm1(ranked + left.neg_().logcumsumexp(1))
    if share is not None:
        gradient.scatter_add_(1, place, share)
    return total, ranked.scatter_(1, order, gradient)
