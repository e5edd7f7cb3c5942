"""Distillation of hard candidates that a teacher chooses, weighted by how sure it is of each anchor (DCD)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastvlp_kernels import _check, _inputs

from .inputs import align, check
from .softmax_terms import operand, softplus

NAME = "dcd_loss"
SCORES = 1 << 22  # of a teacher at a time


@torch.no_grad()
def hard_candidates(
    anchors: Tensor, others: Tensor, number: int, scale: float | Tensor = 1.0, *, compute_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """For each anchor the ``number`` candidates nearest to it for a teacher of two towers, without its partner: for :func:`dcd_loss`.

    Args:
        anchors: [N, E] and others: [M, E], row i of both is a pair, M >= N; float32, bfloat16 or float16 (float64 on the CPU).
        number: K, below M. scale: number, 0-d or [1]. compute_dtype: of the products; None: autocast's, else the features'.

    Returns:
        Rows of ``others``, int64 [N, K], nearest first, and scores scale * <anchor, other> [N, 1 + K], the pair's first; float32 (float64
        for float64).

    Raises:
        TypeError, ValueError: the inputs do not fit.
    """
    name = "hard_candidates"
    anchors, others, dtype = _two_sides(name, anchors, others, compute_dtype)
    if not 1 <= number < len(others):
        raise ValueError(f"{name}: number={number}; it must be at least 1 and below the number of others, {len(others)}")
    factor = _inputs.scalar(name, "scale", scale, anchors, _inputs.sum_dtype(dtype))
    with torch.autocast(anchors.device.type, enabled=False):
        x, y = operand(anchors, dtype), operand(others, dtype)
        chosen, scores = [], []
        # Some rows of S at a time, as the whole of it may not fit.
        height = max(1, SCORES // len(y))
        for start in range(0, len(x), height):
            S = factor * x[start : start + height] @ y.T
            pair = S.diagonal(start)
            own = pair.clone()
            pair.fill_(-torch.inf)
            nearest, places = S.topk(number, dim=1)
            chosen.append(places)
            scores.append(torch.cat([own[:, None], nearest], 1))
        return torch.cat(chosen), torch.cat(scores)


def dcd_loss(
    anchors: Tensor,
    others: Tensor,
    candidates: Tensor,
    teacher_scores: Tensor,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    *,
    distill: float = 0.2,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Dynamic contrastive distillation to two towers (DCD, Rao et al. 2022, arXiv:2207.01426).

    An anchor meets its partner (k = 0) and K candidates that a teacher has chosen and scored. With S_ik = scale * <anchor_i, candidate_ik>
    + bias, T the teacher's scores and H_i the entropy of softmax(T_i):

        doubt_i = H_i / sum of H,  trust = softmax of (1 - doubt)^2 over the anchors,
        loss = distill * sum_i trust_i * mean_k (S_ik - T_ik)^2 + (1 - distill) * sum_i doubt_i * mean_k BCE(S_ik, 1 if k = 0 else 0).

    (The authors' code averages the squares over the anchors before it weights them.) The teacher gets no gradient. Memory is O((N + M) D).

    Args:
        anchors: [N, D] and others: [M, D], as in :func:`hard_candidates`; exchange them for the other direction.
        candidates: integers [N, K], rows of ``others`` but the partner's; range checked on the CPU only.
        teacher_scores: [N, 1 + K], finite, the partner's first. scale, bias: numbers, 0-d or [1]. distill: from 0 to 1.
        compute_dtype: as there.

    Returns:
        0-d, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: the inputs do not fit.
    """
    anchors, others, dtype = _two_sides(NAME, anchors, others, compute_dtype)
    _check_chosen(anchors, others, candidates, teacher_scores)
    if not 0 <= distill <= 1:
        raise ValueError(f"{NAME}: distill={distill}; it is the share of the teacher's scores in the loss, from 0 to 1")
    sums = _inputs.sum_dtype(dtype)
    factor, shift = (_inputs.scalar(NAME, n, value, anchors, sums) for n, value in (("scale", scale), ("bias", bias)))
    with torch.autocast(anchors.device.type, enabled=False):
        x, y = operand(anchors, dtype), operand(others, dtype)
        places = [torch.arange(len(x), device=x.device), *candidates.long().unbind(1)]
        S = shift + factor * torch.stack(
            # Recomputed in the backward pass: the gathered candidates are as large as the features, times their number.
            [checkpoint(_similarity, x, y, place, use_reentrant=False, preserve_rng_state=False) for place in places], 1
        )
        T = teacher_scores.detach().to(sums)
        log_p = T.log_softmax(1)
        H = -(log_p.exp() * log_p).sum(1)
        # A teacher that is sure of every anchor doubts none more than another.
        doubt = torch.where(H.sum() > 0, H / H.sum(), 1 / len(H))
        trust = (1 - doubt).square().softmax(0)
        labelled = softplus(torch.cat([-S[:, :1], S[:, 1:]], 1)).mean(1)
        return distill * trust @ (S - T).square().mean(1) + (1 - distill) * doubt @ labelled


def _similarity(x: Tensor, y: Tensor, places: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, F.embedding(places, y))


def _two_sides(name: str, anchors: Tensor, others: Tensor, compute_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both sides in one dtype, and that of their products."""
    check(name, anchors, others, pairs=False)
    if len(others) < len(anchors):
        raise ValueError(f"{name}: {len(anchors)} anchors but {len(others)} others; the partner of anchor i is row i of the others")
    anchors, others = align(name, anchors, others)
    return anchors, others, _inputs.product_dtype(name, anchors, compute_dtype)


def _check_chosen(anchors: Tensor, others: Tensor, candidates: Tensor, teacher_scores: Tensor) -> None:
    _check.plain_tensors(NAME, 3, anchors=anchors, candidates=candidates, teacher_scores=teacher_scores)
    if candidates.dtype not in (torch.int64, torch.int32) or not teacher_scores.is_floating_point():
        raise TypeError(f"{NAME}: candidates are {candidates.dtype}, teacher_scores {teacher_scores.dtype}; allowed: integers, floats")
    N, shapes = len(anchors), (tuple(candidates.shape), tuple(teacher_scores.shape))
    if len(shapes[0]) != 2 or shapes[0][0] != N or 0 in shapes[0] or shapes[1] != (N, 1 + shapes[0][1]):
        raise ValueError(
            f"{NAME}: candidates have shape {shapes[0]}, teacher_scores {shapes[1]}; they must be [{N}, K] and [{N}, 1 + K], K >= 1"
        )
    if candidates.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(candidates.min()), int(candidates.max())
        if low < 0 or high >= len(others):
            raise ValueError(f"{NAME}: candidates go from {low} to {high}; they are rows of the others, from 0 to {len(others) - 1}")
