"""CLIP's loss with consistent rankings within and between modalities (RankCLIP)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlp_kernels import _inputs

from .across.group import ALONE
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
    compute_dtype: torch.dtype | None = None,
    stash_bytes: int = 0,
    impl: str | None = None,
) -> Tensor:
    """CLIP's loss, and list-wise losses that make two similarity matrices rank alike (RankCLIP, Zhang et al. 2024, arXiv:2404.09387).

    With A and B two matrices of similarities [N, N], row i of A is asked to be in the order of row i of B: of a model that draws without
    replacement with probabilities softmax(A_i) (Plackett-Luce), the negative log-likelihood of the order of falling B_i (ListMLE, Xia et
    al. 2008), which is the sum over ranks d of logsumexp_{e >= d} A_i,order(e) - A_i,order(d). Equal similarities keep the order of their
    columns (the authors' code shuffles them). An order has no gradient. R(A, B) is the mean of these terms over rows and ranks, plus that
    with A and B exchanged. The loss is

    contrastive_loss(image, text, scale) + in_modal * R(image image^T, text text^T) + cross_modal * R(image text^T, text image^T),

    all matrices times ``scale``. Memory is O(N D), and of the matrices of R a few rows at a time, which are sorted: plain PyTorch on any
    device, with the gradients made in the same sweep.

    Args:
        image, text: [N, D], row i of both is a pair; float32, bfloat16 or float16 (float64 on the CPU).
        scale: number, 0-d or [1] tensor.
        in_modal, cross_modal: weights; 0 leaves a term out. In the authors' code they grow from 0 to 1/16 in two thirds of the training.
        compute_dtype, stash_bytes, impl: see :func:`fastvlp.ops.similarity_logsumexp`; the rankings have one implementation.

    Returns:
        A 0-d tensor, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: the inputs do not fit, or a weight is negative.
    """
    check(NAME, image, text)
    image, text = align(NAME, image, text)
    for name, weight in (("in_modal", in_modal), ("cross_modal", cross_modal)):
        if not weight >= 0:
            raise ValueError(f"{NAME}: {name}={weight}; it must be 0 (without this term) or more")
    dtype = _inputs.product_dtype(NAME, image, compute_dtype)
    factor = _inputs.scalar(NAME, "scale", scale, image, _inputs.sum_dtype(dtype))
    with torch.autocast(image.device.type, enabled=False):
        x, y = operand(image, dtype), operand(text, dtype)
        loss = contrastive_loss(x, y, factor, compute_dtype=dtype, stash_bytes=stash_bytes, impl=impl, group=ALONE)
        for weight, pairs in ((in_modal, [(0, 0), (1, 1)]), (cross_modal, [(0, 1), (1, 0)])):
            if weight:
                loss = loss + weight / len(x) ** 2 * fused_sum(_rank_alike, [x, y], pairs, factor, whole_rows=True)
        return loss


def _rank_alike(blocks: list[Tensor], rows: slice, cols: slice, needs: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """Of some rows of two matrices: each in the order of the other."""
    found = [_list_mle(blocks[k], blocks[1 - k], needs[k]) for k in (0, 1)]
    return found[0][0] + found[1][0], [gradient for _, gradient in found]


def _list_mle(scores: Tensor, reference: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of ListMLE of the rows of ``scores`` [M, N] in the order of falling ``reference``, and its gradient."""
    order = reference.argsort(dim=1, descending=True, stable=True)
    ranked = scores.gather(1, order)
    left = ranked.flip(1).logcumsumexp(1).flip(1)  # of all that are still to be drawn
    total = (left - ranked).sum(dtype=torch.float64)
    if not need:
        return total, None
    # What comes at rank k takes part in all draws up to k, with exp(ranked_k - left_d) in that of d.
    gradient = torch.expm1(ranked + left.neg_().logcumsumexp(1))
    return total, ranked.scatter_(1, order, gradient)
