"""Sub-captions against the patches that they are about (DreamLIP)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlp_kernels import _check, _inputs
from fastvlp_kernels._ragged import batches
from fastvlp_kernels.packed import Packed, check_packed

from .across.group import ALONE
from .objective import contrastive_loss

NAME = "grouping_loss"
EPS = 1e-12  # least norm, as in F.normalize
TOKENS = 1 << 16  # of patches in a padded batch of images of similar sizes


def group_patches(patches: Packed, captions: Packed, threshold: float | None = 0.1) -> Packed:
    """For each sub-caption the mean of its image's patches that are like it, normalised; one segment for each image.

    With s_kp the cosine of sub-caption k and patch p, a patch weighs (s_kp - min_p) / (max_p - min_p), 0 below ``threshold``, over the sum
    of the weights (DreamLIP, Zheng et al. 2024, arXiv:2403.17007; after SPARC, Bica et al. 2024, arXiv:2401.09865). If all are equally
    like, so are their weights.

    Args:
        patches: [Tp, D] and captions: [Tc, D], a segment each for each image; float32, bfloat16 or float16 (float64 on the CPU); normalised
            here. An image with sub-captions has patches.
        threshold: from 0 to 1; None: 1 over the image's number of patches (SPARC's).

    Returns:
        ``captions`` with other contents, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: the inputs do not fit.
    """
    _check_segments(patches, captions, threshold)
    sums = _inputs.sum_dtype(patches.x.dtype)
    with torch.autocast(patches.x.device.type, enabled=False):
        p, c = patches.x.to(sums), F.normalize(captions.x.to(sums), dim=1)
        words, _ = captions.replace(x=c).to_padded()
        grouped, order = [words[:0]], [torch.empty(0, dtype=torch.int64, device=p.device)]
        for batch in batches(patches.lengths, p.device, TOKENS):
            own = batch.read(p)
            # Patches are normalised in the K x P numbers, not in their own P x D.
            inverse = torch.linalg.vector_norm(own, dim=2).clamp_min(EPS).reciprocal()[:, None]
            s = words.index_select(0, batch.segments) @ own.mT * inverse
            inside = batch.inside[:, None]
            low = s.masked_fill(~inside, torch.inf).amin(2, keepdim=True)
            span = s.masked_fill(~inside, -torch.inf).amax(2, keepdim=True) - low
            weight = torch.where(span > 0, (s - low) / torch.where(span > 0, span, 1.0), 1.0)
            least = 1 / batch.inside.sum(1)[:, None, None] if threshold is None else threshold
            weight = weight.masked_fill(~inside | (weight < least), 0.0)
            grouped.append(F.normalize(weight * inverse @ own, dim=2))  # which also divides by the sum of the weights
            order.append(batch.segments)
        everywhere = words.new_zeros(words.shape).index_copy(0, torch.cat(order), torch.cat(grouped))
        return captions.replace(x=Packed.from_padded(everywhere, captions.lengths).x)


def grouping_loss(
    patches: Packed,
    captions: Packed,
    scale: float | Tensor = 1.0,
    *,
    threshold: float | None = 0.1,
    compute_dtype: torch.dtype | None = None,
    stash_bytes: int = 0,
    impl: str | None = None,
) -> Tensor:
    """:func:`contrastive_loss` of DreamLIP's sub-captions and their patch groups (:func:`group_patches`), among all of the batch.

    Similarities with patches of other images are never made, those of groups and sub-captions never stored (Zheng et al. 2024,
    arXiv:2403.17007).

    Args:
        patches, captions, threshold: as there; at least one sub-caption. scale: number, 0-d or [1].
        compute_dtype, stash_bytes, impl: see :func:`fastvlp.ops.similarity_logsumexp`; None: autocast's dtype, else float32.

    Returns:
        0-d, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: the inputs do not fit.
    """
    grouped = group_patches(patches, captions, threshold)
    if captions.total == 0:
        raise ValueError(f"{NAME}: there are no sub-captions; at least one is needed")
    words = F.normalize(captions.x.to(grouped.x.dtype), dim=1)
    return contrastive_loss(grouped.x, words, scale, compute_dtype=compute_dtype, stash_bytes=stash_bytes, impl=impl, group=ALONE)


def _check_segments(patches: Packed, captions: Packed, threshold: float | None) -> None:
    check_packed(NAME, patches=patches, captions=captions)
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"{NAME}: threshold={threshold}; it must be from 0 to 1, or None for 1 over the number of patches")
    if len(patches) != len(captions):
        raise ValueError(f"{NAME}: patches of {len(patches)} images, sub-captions of {len(captions)}; segments i of both are one image's")
    x, y = patches.x, captions.x
    _check.features(NAME, x, y.to(x.dtype) if x.is_floating_point() and y.is_floating_point() else y)
    without = ((patches.lengths == 0) & (captions.lengths > 0)).nonzero()
    if len(without):
        raise ValueError(f"{NAME}: image {int(without[0])} has sub-captions but no patches; drop them, or keep a patch")
