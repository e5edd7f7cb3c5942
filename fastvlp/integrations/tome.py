"""Token merging by the names and calls of ToMe (https://arxiv.org/abs/2210.09461), on ``fastvlp.ops.merge_plan``.

Dense tensors [B, N, C] as in ToMe's scripts. Differences: nothing depends on an unstable sort or on atomics, a mean is taken in float32 and
rounded once, and merging differentiates to exact gradients. To merge inside a whole model, see ``fastvlp.accelerate(model, merge=...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlp.layers.token_merger import check_rows, even_segments
from fastvlp_kernels import MergePlan, merge_plan


@dataclass(frozen=True)
class Merge:
    """What :func:`bipartite_soft_matching` returns first: call it to merge [B, N, C] into [B, N', C]."""

    plan: MergePlan
    shape: tuple[int, int]  # (B, N)
    left: int  # N'
    order: Tensor | None  # int64 [B * N'], where a distillation token moves rows

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor:
        """Merge by "mean" (each token counts once), "sum" or "amax"."""
        return self.weighted(x, None, mode)[0]

    def weighted(self, x: Tensor, size: Tensor | None, mode: str = "mean") -> tuple[Tensor, Tensor]:
        """x [B, N', C] and the sums of the sizes [B, N']; ``size`` [B, N] weighs a mean."""
        check_rows("Merge", "x", x, self.shape)
        merged, sizes = self.plan.merge(x.flatten(0, 1), None if size is None else size.flatten(), mode)
        shape = (self.shape[0], self.left)
        if self.order is not None:
            merged, sizes = merged[self.order], sizes[self.order]
        return merged.unflatten(0, shape), sizes.unflatten(0, shape)


@dataclass(frozen=True)
class Unmerge:
    """What :func:`bipartite_soft_matching` returns second: gives every token the row it went to, [B, N', C] to [B, N, C]."""

    merge: Merge

    def __call__(self, x: Tensor) -> Tensor:
        merge = self.merge
        check_rows("Unmerge", "x", x, (merge.shape[0], merge.left))
        rows = x.flatten(0, 1) if merge.order is None else x.flatten(0, 1)[merge.order.argsort()]
        return merge.plan.unmerge(rows).unflatten(0, merge.shape)


def bipartite_soft_matching(metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False) -> tuple[Merge, Unmerge]:
    """Match the tokens of even place to the most similar of odd place, and merge the ``r`` most similar of them.

    Args:
        metric: [B, N, d], what is compared by cosine. r: at most half of the tokens, without the protected ones, are merged.
        class_token: the first token never merges. distill_token: neither does the second one.

    Returns:
        merge, unmerge. The merged tokens are in ToMe's order: those of even place that stayed (most similar first; with a class token,
        in their own order), then those of odd place; with a distillation token the two special tokens are first.

    Raises:
        ValueError: a distillation token without a class token, a metric that is not [B, N, d].
        TypeError: ``r`` is no int.
    """
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"bipartite_soft_matching: r is {r!r}; it must be an int, how many tokens of each image are merged away")
    if metric.ndim != 3:
        raise ValueError(f"bipartite_soft_matching: metric is {tuple(metric.shape)}; it must be [B, N, d], what is compared of each token")
    if distill_token and not class_token:
        raise ValueError("bipartite_soft_matching: a distillation token is the second token and needs class_token=True before it")
    rows, tokens = metric.shape[:2]
    protected = int(class_token) + int(distill_token)
    # ToMe's bound: half of the tokens that are not protected.
    r = max(0, min(r, (tokens - protected) // 2))
    starts, lengths = even_segments(rows, tokens, metric.device)
    plan = merge_plan(
        metric.flatten(0, 1), starts, r, lengths=lengths, total=rows * (tokens - r), protected=protected, keep_order=r == 0
    )
    order = None
    if distill_token and r:
        left = torch.full_like(lengths, tokens - r)
        order = distillation_order(plan.cu_seqlens, lengths, left, plan.total)
    merge = Merge(plan, (rows, tokens), tokens - r, order)
    return merge, Unmerge(merge)


def distillation_order(starts: Tensor, before: Tensor, after: Tensor, total: int) -> Tensor:
    """int64 [T']: ToMe's order where a class and a distillation token are protected, as places in ``merge_plan``'s order.

    Both come first, then the other tokens of even place that stayed, then those of odd place.

    Args:
        starts: int32 [S+1], where the merged segments start. before, after: their lengths [S] on the CPU. total: T'.
    """
    lengths, device = after.to(starts.device), starts.device
    # Of the tokens of even place, as many stay as did not merge away; ToMe puts the odd ones, the distillation token first, behind them.
    stayed = ((before + 1) // 2 - (before - after)).to(device)
    stayed, first = (each.repeat_interleave(lengths, output_size=total) for each in (stayed, starts[:-1].long()))
    place = torch.arange(total, device=device) - first
    moved = torch.where((place > 1) & (place <= stayed), place - 1, place)
    return first + torch.where(place == 1, stayed, moved)


def merge_wavg(merge: Callable[..., Tensor], x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean of merged tokens weighted by their sizes: x [B, N', C] and size [B, N', 1].

    Args:
        merge: of :func:`bipartite_soft_matching`. x: [B, N, C]. size: [B, N, 1], how many patches each token stands for; None: 1 each.
    """
    if isinstance(merge, Merge):
        merged, sizes = merge.weighted(x, None if size is None else size.squeeze(-1))
        return merged, sizes.unsqueeze(-1)
    size = torch.ones_like(x[..., :1]) if size is None else size
    total = merge(size, mode="sum")
    return merge(x * size, mode="sum") / total, total


def merge_source(merge: Callable[..., Tensor], x: Tensor, source: Tensor | None = None) -> Tensor:
    """Which of the first N tokens each merged token is made of: [B, N', N] of 0 and 1; ``source`` is that of the mergings before.

    ``merge.plan.source`` says the same in N integers per image.
    """
    if source is None:
        source = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(x.shape[0], -1, -1)
    return merge(source, mode="amax")


def parse_r(num_layers: int, r: int | Sequence[int] | tuple[int, float]) -> list[int]:
    """How many tokens each layer merges.

    Args:
        r: a number for all layers; a list, filled up with 0; or a tuple (r, inflect): from r (1 - inflect) in the first layer straight to
            r (1 + inflect) in the last, r on average.
    """
    if isinstance(r, int):
        return [r] * num_layers
    if isinstance(r, tuple):
        mean, inflect = r
        low = int(mean * (1 - inflect))
        # Layers from low to mean + (mean - low), so that the mean over them is the one asked for.
        span = 2 * (int(mean) - low)
        return [low + span * layer // max(1, num_layers - 1) for layer in range(num_layers)]
    return [*r, *[0] * (num_layers - len(r))]
