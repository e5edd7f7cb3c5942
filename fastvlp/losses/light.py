"""CLIP's loss with targets that soften while training goes on (LightCLIP)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlp_kernels import _inputs
from fastvlp_kernels.similarity_attend import similarity_attend

from .across.group import ALONE
from .inputs import align, check
from .objective import contrastive_loss
from .softmax_terms import operand

NAME = "light_clip_loss"


def softness(step: int, total: int, final: float) -> float:
    """How soft the targets of :func:`light_clip_loss` are at ``step``: from 0 at the first step along a line to ``final`` at ``total``.

    Raises:
        ValueError: ``total`` is below 1, or ``step`` is negative; or ``final`` is not from 0 to 1.
    """
    if not 0 <= final <= 1:
        raise ValueError(f"softness: final={final}; it is a share of each target, from 0 to 1")
    if total < 1 or step < 0:
        raise ValueError(f"softness: step={step} of total={total}; step counts from 0, and total is at least 1")
    return final * min(1.0, step / total)


def light_clip_loss(
    image: Tensor,
    text: Tensor,
    scale: float | Tensor = 1.0,
    *,
    soft: float,
    target_scale: float | Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    stash_bytes: int = 0,
    impl: str | None = None,
) -> Tensor:
    """CLIP's loss, with a share ``soft`` of each target spread over the negatives that are like the positive.

    An image's target is its text with 1 - soft, and text j with soft * softmax over j != i of target_scale * <image_i, image_j>; a text's
    likewise, from texts. Targets have no gradient. After LightCLIP (Nie et al. 2023, arXiv:2312.00674), whose code is not public: the line
    (:func:`softness`) and similarities within a modality (SoftCLIP, Gao et al. 2023, arXiv:2303.17561) are ours. Two sweeps more than
    :func:`contrastive_loss`, none for 0; nothing N x N is stored.

    Args:
        image, text, scale, compute_dtype, stash_bytes, impl: as there, [N, D].
        target_scale: as ``scale``, without gradient; None: ``scale``. soft: from 0 to 1.

    Returns:
        0-d, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: the inputs do not fit.
    """
    check(NAME, image, text)
    image, text = align(NAME, image, text)
    if not 0 <= soft <= 1:
        raise ValueError(f"{NAME}: soft={soft}; it is the share of a target that negatives get, from 0 to 1")
    dtype = _inputs.product_dtype(NAME, image, compute_dtype)
    sums = _inputs.sum_dtype(dtype)
    factor = _inputs.scalar(NAME, "scale", scale, image, sums)
    # Detached: targets are not to be learned, or they would learn to agree.
    sharpness = (factor if target_scale is None else _inputs.scalar(NAME, "target_scale", target_scale, image, sums)).detach()
    with torch.autocast(image.device.type, enabled=False):
        if not soft:
            return contrastive_loss(image, text, factor, compute_dtype=dtype, stash_bytes=stash_bytes, impl=impl, group=ALONE)
        x, y = operand(image, dtype), operand(text, dtype)
        loss = contrastive_loss(x, y, factor, compute_dtype=dtype, stash_bytes=stash_bytes, impl=impl, group=ALONE)
        places = torch.arange(len(x), device=x.device)
        for anchors, others in ((x, y), (y, x)):
            like = anchors.detach()
            mean, lse = similarity_attend(like, like, others, sharpness, row_ids=places, col_ids=places, compute_dtype=dtype, impl=impl)
            # Cross-entropy is linear in the target, so moving a share of it adds share * (positive logit - mean logit of the targets).
            spread = torch.linalg.vecdot(anchors, others - mean).masked_fill(lse == -torch.inf, 0.0)
            loss = loss + soft / 2 * factor * spread.mean()
        return loss
