"""Classification of features among prototypes of clusters (ProtoCLIP)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlp_kernels import _check, _inputs
from fastvlp_kernels.similarity_attend import similarity_attend
from fastvlp_kernels.similarity_logsumexp import logsumexp_results

from .softmax_terms import operand, softplus

NAME = "proto_clip_loss"


@torch.no_grad()
def back_translate(features: Tensor, assignments: Tensor, clusters: int) -> Tensor:
    """The mean of ``features`` [N, D] of each cluster, [clusters, D] in the dtype of sums, without gradient; zeros for an empty cluster.

    ProtoCLIP's back translation: clusters of the other modality (or a teacher), means in the space of this one.

    Args:
        assignments: integers [N] below ``clusters``; below zero: in none. Checked on the CPU only.

    Raises:
        TypeError, ValueError: the inputs do not fit.
    """
    _check_assigned("back_translate", features, assignments)
    if not isinstance(clusters, int) or clusters < 1:
        raise ValueError(f"back_translate: clusters={clusters!r}; it must be how many there are, an integer of at least 1")
    _check_range("back_translate", assignments, clusters)
    wide = features.to(_inputs.sum_dtype(features.dtype))
    # Features without a cluster go to one more, which is dropped at the end: no mask, so no size that only the device knows.
    places = torch.where(assignments < 0, clusters, assignments.long())
    total = wide.new_zeros(clusters + 1, wide.shape[1]).index_add_(0, places, wide)
    count = wide.new_zeros(clusters + 1).index_add_(0, places, wide.new_ones(len(wide)))
    return (total / count.clamp_min(1)[:, None])[:-1]


def proto_clip_loss(
    features: Tensor,
    prototypes: Tensor,
    assignments: Tensor,
    scale: float | Tensor = 1.0,
    *,
    teacher: Tensor | None = None,
    teacher_scale: float | Tensor = 1.0,
    compute_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """Mean cross-entropy of softmax_k(scale * <feature_i, prototype_k>) with the cluster of i (ProtoCLIP, Chen et al. 2022,
    arXiv:2206.10996).

    With ``teacher``, its prototypes t, targets are softmax_k(teacher_scale * <t_a, t_k>) for cluster a; the authors leave an external
    model's hard. Nothing N x K or K x K is stored. The published loss is the mean of both directions, with back translation::

        proto_clip_loss(image, image_of_text_clusters, text_clusters, scale, teacher=text_prototypes, teacher_scale=10.0)

    Args:
        features: [N, D] and prototypes: [K, D]; float32, bfloat16 or float16 (float64 on the CPU).
        assignments: integers [N] below K; below zero: no loss, not counted. Checked on the CPU only.
        scale: number, 0-d or [1]. teacher: [K, E], or None: hard targets; it and ``teacher_scale`` get no gradient.
        compute_dtype, impl: see :func:`fastvlp.ops.similarity_logsumexp`.

    Returns:
        0-d, float32 (float64 for float64); 0 if no feature has a cluster.

    Raises:
        TypeError, ValueError: the inputs do not fit.
    """
    _check_assigned(NAME, features, assignments)
    _check.plain_tensors(NAME, 2, features=features, prototypes=prototypes, teacher=teacher)
    if prototypes.ndim != 2 or len(prototypes) == 0 or prototypes.shape[1] != features.shape[1]:
        raise ValueError(f"{NAME}: prototypes have shape {tuple(prototypes.shape)}; they must be [K, {features.shape[1]}] with K >= 1")
    K = len(prototypes)
    if teacher is not None and (teacher.ndim != 2 or len(teacher) != K):
        raise ValueError(f"{NAME}: teacher has shape {tuple(teacher.shape)}; it must be [{K}, width], a row for each prototype")
    for name, tensor in (("prototypes", prototypes), ("teacher", teacher)):
        if tensor is not None and tensor.dtype not in _check.FLOATS:
            raise TypeError(f"{NAME}: {name} are {tensor.dtype}; they must be float32, bfloat16 or float16 (or float64 on the CPU)")
    _check_range(NAME, assignments, K)
    dtype = _inputs.product_dtype(NAME, features, compute_dtype)
    sums = _inputs.sum_dtype(dtype)
    factor = _inputs.scalar(NAME, "scale", scale, features, sums)
    how: dict[str, Any] = {"compute_dtype": dtype, "impl": impl}
    with torch.autocast(features.device.type, enabled=False):
        x, p = operand(features, dtype), operand(prototypes.to(sums), dtype)
        cluster = assignments.long()
        counted = cluster >= 0
        # Features without a cluster look up any row, whose loss is not counted.
        at = cluster.clamp_min(0)
        if teacher is None:
            # The positive is left out of the sum, so that no term of a confident feature cancels against another.
            others = logsumexp_results(x, p, factor, row_ids=cluster, col_ids=torch.arange(K, device=x.device), **how).row
            loss = softplus(others.minus(factor * torch.linalg.vecdot(x, F.embedding(at, p))))
        else:
            t = teacher.detach().to(sums)
            mean, _ = similarity_attend(t, t, p, _inputs.scalar(NAME, "teacher_scale", teacher_scale, x, sums).detach(), **how)
            loss = logsumexp_results(x, p, factor, **how).row.minus(factor * torch.linalg.vecdot(x, F.embedding(at, mean)))
        # Not a product with 0, which makes NaN of an infinite loss that is not counted.
        return torch.where(counted, loss, 0.0).sum() / counted.sum().clamp_min(1)


def _check_assigned(name: str, features: Tensor, assignments: Tensor) -> None:
    _check.plain_tensors(name, 2, features=features, assignments=assignments)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name}: features have shape {tuple(features.shape)}; they must be a matrix [N, D] with N and D >= 1")
    if features.dtype not in _check.FLOATS:
        raise TypeError(f"{name}: features are {features.dtype}; they must be float32, bfloat16 or float16 (or float64 on the CPU)")
    _check.vector(name, "assignments", assignments, len(features), integer=True)


def _check_range(name: str, assignments: Tensor, clusters: int) -> None:
    if assignments.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if (highest := int(assignments.max())) >= clusters:
        raise ValueError(f"{name}: assignments go up to {highest}, but there are {clusters} clusters; they must be below {clusters}")
