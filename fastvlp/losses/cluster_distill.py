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

    After CLIP-CID (Yang et al. 2024, arXiv:2408.09441), which distils a large model's clusters and instances to a small one. There is no
    public code: the form of the terms and their weights are this function's. Four sweeps; nothing of N x N or N x K is stored.

    Args:
        image, text: [N, D] of the student, row i of both is a pair; float32, bfloat16 or float16 (float64 on the CPU).
        teacher_image, teacher_text: [N, D] of the same pairs, without gradient; any floating-point dtype. Where the teacher is wider,
            project the student to its width.
        prototypes: [K, D], of the clusters of the teacher's images: learned in the student's space, or their means there
            (:func:`back_translate`).
        assignments: integers [N] below K, the cluster of each image; below zero: in none.
        scale: number, 0-d or [1] tensor. cluster, instance: weights, 0 or more; 0 leaves a term out.
        compute_dtype, stash_bytes, impl: see :func:`fastvlp.ops.similarity_logsumexp`.

    Returns:
        A 0-d tensor, float32 (float64 for float64).

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
        loss = contrastive_loss(x, y, factor, stash_bytes=stash_bytes, group=ALONE, **how)
        if cluster:
            loss = loss + cluster * proto_clip_loss(x, prototypes, assignments, factor, **how)
        if instance:
            for own, teacher in ((x, teacher_image), (y, teacher_text)):
                target = teacher.detach().to(sums)
                loss = loss + instance / 2 * contrastive_loss(own, target, factor, stash_bytes=stash_bytes, group=ALONE, **how)
        return loss
