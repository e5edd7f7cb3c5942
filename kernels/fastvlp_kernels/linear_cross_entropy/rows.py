"""What one row of logits adds to the loss, and the gradient of that: formulas over [T] vectors that the implementations share.

A row keeps its largest logit and its sum of exponentials apart. The target stands outside of the sum: p - 1 of a confident row is
-others / total, which no rounding of p can spoil, and its loss is log(1 + others).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """A classifier over V classes and what is asked of it; the classes are those that count, numbered from 0."""

    x: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # int64 [T]; IGNORED, or UNLISTED
    label_smoothing: float
    z_loss: float
    dtype: torch.dtype  # of the operands of products


IGNORED, UNLISTED = -1, -2


class Rows(NamedTuple):
    """Statistics of logits, [T] each, float32 (float64 for float64 operands)."""

    peak: Tensor  # the largest logit
    others: Tensor  # sum of exp(logit - peak) over all classes but the target
    target: Tensor  # the target's logit - peak; -inf for an unlisted target
    mean: Tensor  # the mean of logit - peak; 0 elements without label smoothing


def losses(rows: Rows, a: Inputs) -> Tensor:
    """[T]: (1 - e) (lse - l_target) + e (lse - mean of l) + z lse^2, 0 for an ignored row."""
    total = rows.others + rows.target.exp()
    log_total = total.log()
    loss = torch.where(rows.target == 0, rows.others.log1p(), log_total - rows.target)
    if a.label_smoothing:
        loss = (1 - a.label_smoothing) * loss + a.label_smoothing * (log_total - rows.mean)
    if a.z_loss:
        loss = loss + a.z_loss * (rows.peak + log_total).square()
    return loss.masked_fill(a.targets == IGNORED, 0.0)


def coefficients(rows: Rows, a: Inputs, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of a row of logits, given that of its loss, as three [T] vectors.

    d l_v = factor * exp(l_v - peak) - uniform for every class but the target, and at_target for that one.
    """
    total = rows.others + rows.target.exp()
    of_lse = 2 * a.z_loss * (rows.peak + total.log()) if a.z_loss else torch.zeros_like(total)
    uniform = grad * (a.label_smoothing / a.weight.shape[0])
    at_target = grad * (of_lse - (1 + of_lse) * rows.others / total + a.label_smoothing) - uniform
    ignored = a.targets == IGNORED
    factor, uniform, at_target = (v.masked_fill(ignored, 0.0) for v in (grad * (1 + of_lse) / total, uniform, at_target))
    return factor, uniform, at_target
