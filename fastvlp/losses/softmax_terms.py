"""The terms that softmax objectives consist of. K prefixes (1 without), M anchors on one side, N candidates on the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlp_kernels._inputs import sum_dtype
from fastvlp_kernels.similarity_logsumexp import LogSumExp, Results, logsumexp, logsumexp_results, merge

from .across.split_batch import SplitBatch
from .queue import NegativeQueue

SHORTEST = 1e-12  # a prefix shorter than this is divided by this instead of its length


class Sweep(NamedTuple):
    """How the products of one loss are computed."""

    scale: Tensor  # 0-d, in the dtype of sums
    dtype: torch.dtype  # of the operands of products
    prefixes: tuple[int, ...] | None
    stash_bytes: int
    impl: str | None

    def __call__(self, rows: Side, cols: Side, offset: int | None = None, ids: str | None = None) -> Results:
        """The results of the operator, each with a leading K; ``ids``: what it does with rows and columns of one group."""
        row_ids, col_ids = (None, None) if ids is None else (rows.groups, cols.groups)
        found = logsumexp_results(
            rows.features, cols.features, self.scale, row_bias=rows.bias, col_bias=cols.bias, row_scale=rows.factors,
            col_scale=cols.factors, row_ids=row_ids, col_ids=col_ids, ids=ids or "exclude", offset=offset, prefixes=self.prefixes,
            compute_dtype=self.dtype, stash_bytes=self.stash_bytes, impl=self.impl,
        )  # fmt: skip
        return found if self.prefixes else Results.unflatten([part[None] for part in found.flatten()])


class Side(NamedTuple):
    """The images or the texts of a loss."""

    features: Tensor  # [M, D], or [M, J, D] for J negatives of each anchor
    factors: Tensor | None  # [K, M] (or [K, M, J]): one over the length of each prefix
    bias: Tensor | None  # [M], added to all similarities
    groups: Tensor | None  # int64 [M], equal within and between sides where ids are equal
    limit: int = 0  # above all groups of both sides

    def views(self, prefixes: tuple[int, ...] | None) -> list[Tensor]:
        """The features as each of the K products takes them."""
        if self.factors is None or prefixes is None:
            return [self.features]
        return [self.features[..., :width] * factor[..., None] for width, factor in zip(prefixes, self.factors, strict=True)]


class Negatives(NamedTuple):
    """Candidates beside those of the batch: log-sum-exp and sum of their similarities, [K, M], and how many they are."""

    lse: LogSumExp
    total: Tensor
    number: int | Tensor


def symmetric_softmax(row: LogSumExp, column: LogSumExp, of_row: Tensor, of_column: Tensor, factor: float) -> Tensor:
    """``factor`` / 2 times the cross-entropies of rows and of columns, from the means of S under their targets."""
    return (row.minus(of_row) + column.minus(of_column)).sum() * (factor / 2)


def operand(features: Tensor, dtype: torch.dtype) -> Tensor:
    """``features`` as products in ``dtype`` see them, in the dtype of sums, so that gradients of several terms meet before rounding."""
    wide = features.to(sum_dtype(dtype))
    if dtype in (features.dtype, wide.dtype):
        return wide
    with torch.no_grad():
        lost = wide.to(dtype).to(wide.dtype) - wide
    # The rounding as a constant: its own gradient would round the sum of the terms' gradients once for each term.
    return wide + lost


def make_side(
    features: Tensor, sweep: Sweep, shared: bool, bias: Tensor | None = None, groups: Tensor | None = None, limit: int = 0
) -> Side:
    """A side; ``shared``: several terms read its features."""
    if shared:
        features = operand(features, sweep.dtype)
    factors = None
    if sweep.prefixes:
        lengths = [torch.linalg.vector_norm(features[..., :width], dim=-1) for width in sweep.prefixes]
        factors = torch.stack(lengths).clamp_min(SHORTEST).reciprocal()
    return Side(features, factors, bias, groups, limit)


def number_groups(ids: Tensor) -> Tensor:
    """Numbers from 0 to len(ids) - 1, equal where ``ids`` [M] are equal; each id below zero is a group of its own."""
    ordered, order = ids.sort()
    first = torch.ones_like(ordered)
    # unique would ask the device how many there are.
    first[1:] = (ordered[1:] != ordered[:-1]) | (ordered[1:] < 0)
    return torch.empty_like(ids).scatter_(0, order, first.cumsum(0) - 1)


def total_similarity(anchors: Side, others: Side, sweep: Sweep, count: int | Tensor) -> Tensor:
    """Sum of S over ``count`` candidates, [K, M], from the sum of their features: O(N D). Biases of the candidates are left out."""
    pairs = zip(anchors.views(sweep.prefixes), others.views(sweep.prefixes), strict=True)
    total = sweep.scale * torch.stack([x @ y.sum(0) for x, y in pairs])
    return total if anchors.bias is None else total + count * anchors.bias


def by_group(anchors: Side, others: Side, values: Tensor) -> Tensor:
    """Sums of ``values`` [N, ...] over the candidates of each anchor's group, [M, ...]."""
    here, there = anchors.groups, others.groups
    assert here is not None and there is not None
    return values.new_zeros(others.limit, *values.shape[1:]).index_add(0, there, values)[here]


def group_size(anchors: Side, others: Side, sweep: Sweep) -> Tensor:
    """How many candidates are of each anchor's group, [M]."""
    assert others.groups is not None
    return by_group(anchors, others, torch.ones_like(others.groups, dtype=sweep.scale.dtype))


def group_similarity(anchors: Side, others: Side, sweep: Sweep, count: Tensor) -> Tensor:
    """Sum of S over the ``count`` candidates of each anchor's group, [K, M], from sums of features by group: O(N D)."""
    pairs = zip(anchors.views(sweep.prefixes), others.views(sweep.prefixes), strict=True)
    total = sweep.scale * torch.stack([torch.linalg.vecdot(x, by_group(anchors, others, y)) for x, y in pairs])
    if anchors.bias is not None:
        total = total + count * anchors.bias
    return total if others.bias is None else total + by_group(anchors, others, others.bias)


def negatives_of(anchors: Side, extra: Tensor | NegativeQueue, sweep: Sweep) -> Negatives:
    """Negatives [J, D] or a queue, seen by all anchors, or [M, J, D], those of each anchor."""
    if isinstance(extra, NegativeQueue):
        others = make_side(extra.features, sweep, True, bias=extra.log_weight.to(sweep.scale.dtype))
        count: int | Tensor = (extra.log_weight == 0).sum()
    else:
        others, count = make_side(extra, sweep, True), extra.shape[-2]
    # A sum of similarities is a similarity with a sum: O(N D), without S.
    if others.features.ndim == 2:
        return Negatives(sweep(anchors, others).row, total_similarity(anchors, others, sweep, count), count)
    pairs = zip(anchors.views(sweep.prefixes), others.views(sweep.prefixes), strict=True)
    S = sweep.scale * torch.stack([torch.bmm(y, x[..., None])[..., 0] for x, y in pairs])
    if anchors.bias is not None:
        S = S + anchors.bias[:, None]
    return Negatives(logsumexp(S, -1), S.sum(-1), count)


def debias(margin: Tensor, positive: Tensor, count: Tensor, tau_plus: Tensor, scale: Tensor) -> Tensor:
    """log(n g) - positive, g = max((mean of exp(negatives) - tau_plus * exp(positive)) / (1 - tau_plus), exp(-scale)), [K, M].

    Args:
        margin: log of the sum of exp(negatives), minus ``positive``. Small numbers are taken from it, so that little is rounded.
        count: [M], n.
    """
    share = (tau_plus * count).log() - margin
    # Where the estimate is below 0 its logarithm would be NaN, and NaN times a mask of 0 is NaN in the gradient.
    estimated = share < 0
    unbounded = margin + (-torch.expm1(share.masked_fill(~estimated, -1.0))).log() - (-tau_plus).log1p()
    return torch.maximum(unbounded.masked_fill(~estimated, -torch.inf), count.log() - scale - positive)


def softplus(margin: Tensor) -> Tensor:
    """log(1 + exp(margin)) to all digits of float64 too: PyTorch's own ends at 20, where the exponential still counts."""
    return F.softplus(margin, threshold=40.0)


def focal_weight(loss: Tensor, margin: Tensor | None, gamma: float) -> Tensor:
    """(1 - p)^gamma for loss = -log p, or for loss = softplus(margin), where 1 - p keeps its digits."""
    if margin is not None:
        return (gamma * F.logsigmoid(margin)).exp()
    return (-torch.expm1(-loss.clamp_min(torch.finfo(loss.dtype).tiny))).pow(gamma)


class Terms(NamedTuple):
    """What one objective is made of, for each of its two directions."""

    sweep: Sweep
    several: bool  # positives are the pairs of equal id, not (i, i)
    averages: bool  # of several: the mean of their -log p, not -log of their sum
    excludes: bool  # the sums of the sweep hold no positives
    label_smoothing: float
    focal_gamma: float
    tau_plus: Tensor | None

    def direction(
        self,
        anchors: Side,
        others: Side,
        lse: LogSumExp,
        positive: LogSumExp,
        extra: Tensor | NegativeQueue | None,
        weight: Tensor | None,
        batch: SplitBatch,
    ) -> list[Tensor]:
        """The mean over anchors of their losses, one for each prefix.

        Args:
            others: all candidates (without ``label_smoothing`` only their groups are read). lse, positive: [K, M]; with ``averages`` the
                sum of S over the positives. extra: more candidates, see ``negatives_of``. weight: [M]. batch: the anchors of all processes.
        """
        negatives = None if extra is None else negatives_of(anchors, extra, self.sweep)
        if negatives is not None:
            lse = merge(lse, negatives.lse)
        same = None
        if self.averages or (self.excludes and (self.label_smoothing or self.tau_plus is not None)):
            same = group_size(anchors, others, self.sweep)
        if self.averages and same is not None:
            mean = positive.value() / same.clamp_min(1)
            positive = LogSumExp(torch.where(same > 0, mean, -torch.inf), torch.zeros_like(mean))
        none = positive.reference == -torch.inf if self.several else None
        if none is not None:
            # An anchor without positives has loss 0, and no gradient: it is compared with itself.
            positive = LogSumExp(*(torch.where(none, here, there) for here, there in zip(lse, positive, strict=True)))

        margin = None
        if self.excludes:
            margin = lse.minus(positive)
            if self.tau_plus is not None and same is not None and others.groups is not None:
                count = others.groups.shape[0] - same + (0 if negatives is None else negatives.number)
                margin = debias(margin, positive.value(), count, self.tau_plus, self.sweep.scale)
            loss = softplus(margin)
        else:
            loss = lse.minus(positive)
        if self.focal_gamma:
            loss = loss * focal_weight(loss, margin, self.focal_gamma)
        if self.label_smoothing:
            loss = loss + self.label_smoothing * (positive.value() - self._uniform(anchors, others, positive.value(), same, negatives))
        if none is not None:
            loss = loss.masked_fill(none, 0.0)
        if weight is not None:
            loss = loss * weight.to(loss.dtype)
        counted = sum(batch.sizes) if none is None else batch.members.sum((~none).sum(1)).clamp_min(1)
        return list(loss.sum(1) * batch.members.size / counted)

    def _uniform(self, anchors: Side, others: Side, positive: Tensor, same: Tensor | None, negatives: Negatives | None) -> Tensor:
        """The mean of S over the candidates of each anchor, [K, M]."""
        count: int | Tensor = others.features.shape[0]
        total = total_similarity(anchors, others, self.sweep, count)
        if others.bias is not None:
            total = total + others.bias.sum()
        if self.excludes and same is not None:
            total, count = total - group_similarity(anchors, others, self.sweep, same) + positive, count - same + 1
        if negatives is not None:
            total, count = total + negatives.total, count + negatives.number
        return total / count
