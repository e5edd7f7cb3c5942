"""Distillation of a teacher's clusters and instances (after CLIP-CID)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlp_kernels import _check, _inputs

from .across.group import ALONE
from .inputs import align, check
from .objective import contrastive_loss
from .proto import proto_clip_loss
from .softmax_terms import operand

NAME = "cluster_instance_loss"


def cluster_instance_loss(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    prototypes: Tensor,
    assignments: Tensor,
    scale: float | Tensor = 1.0,
    *,
    cluster: float = 1.0,
    instance: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    stash_bytes: int = 0,
    impl: str | None = None,
) -> Tensor:
    """CLIP's loss, with the student's images told apart by a teacher's clusters, and its features by the teacher's of the same instance.

        contrastive_loss(image, text, scale) + cluster * proto_clip_loss(image, prototypes, assignments, scale)
        + instance / 2 * (contrastive_loss(image, teacher_image, scale) + contrastive_loss(text, teacher_text, scale))

    After CLIP-CID (Yang et al. 2024, arXiv:2408.09441), whose code is not public: form and weights are ours. Nothing N x N or N x K is
    stored.

    Args:
        image, text, scale, compute_dtype, stash_bytes, impl: as in :func:`contrastive_loss`, [N, D].
        teacher_image, teacher_text: [N, D] of the same pairs, without gradient (project the student to a wider teacher).
        prototypes: [K, D], learned, or the clusters' means (:func:`back_translate`). assignments: integers [N] below K; below zero: in
            none.
        cluster, instance: weights; 0 leaves a term out.

    Returns:
        0-d, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: the inputs do not fit, or a weight is negative.
    """
    check(NAME, image, text)
    image, text = align(NAME, image, text)
    _check.plain_tensors(NAME, 3, image=image, teacher_image=teacher_image, teacher_text=teacher_text)
    for name, weight in (("cluster", cluster), ("instance", instance)):
        if weight < 0:
            raise ValueError(f"{NAME}: {name}={weight}; it must be 0 (without this term) or more")
    for name, features in (("teacher_image", teacher_image), ("teacher_text", teacher_text)):
        if features.shape != image.shape:
            shapes = f"{name} has shape {tuple(features.shape)}, the student's features {tuple(image.shape)}"
            raise ValueError(f"{NAME}: {shapes}; both must be the same pairs in one width (project the student to the teacher's)")
        if not features.is_floating_point():
            raise TypeError(f"{NAME}: {name} is {features.dtype}; it must be floating point")
    dtype = _inputs.product_dtype(NAME, image, compute_dtype)
    sums = _inputs.sum_dtype(dtype)
    factor = _inputs.scalar(NAME, "scale", scale, image, sums)
    how: dict[str, Any] = {"compute_dtype": dtype, "impl": impl}
    with torch.autocast(image.device.type, enabled=False):
        x, y = operand(image, dtype), operand(text, dtype)
        # Of this process's pairs alone, as the terms of clusters are.
        loss = contrastive_loss(x, y, factor, stash_bytes=stash_bytes, group=ALONE, **how)
        if cluster:
            loss = loss + cluster * proto_clip_loss(x, prototypes, assignments, factor, **how)
        if instance:
            for own, teacher in ((x, teacher_image), (y, teacher_text)):
                # The two sides of a loss need one dtype, and this one loses nothing of the teacher's.
                target = teacher.detach().to(sums)
                loss = loss + instance / 2 * contrastive_loss(own, target, factor, stash_bytes=stash_bytes, group=ALONE, **how)
        return loss
