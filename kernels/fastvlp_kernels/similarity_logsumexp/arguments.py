"""What the implementations take and give. M rows, N columns, width D; sums are float32 (float64 for float64 operands)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._logsumexp import LogSumExp


class Inputs(NamedTuple):
    """One matrix S_ij = scale * row_scale_i * col_scale_j * <x_i, y_j> + row_bias_i + col_bias_j and what is asked about it."""

    x: Tensor  # [M, D]
    y: Tensor  # [N, D]
    scale: Tensor  # 0-d
    row_bias: Tensor | None  # [M]
    col_bias: Tensor | None  # [N]
    row_scale: Tensor | None  # [M]
    col_scale: Tensor | None  # [N]
    row_ids: Tensor | None  # int64 [M]
    col_ids: Tensor | None  # int64 [N]
    ids: str  # "exclude" | "only" | "both" | "sums"
    offset: int | None
    dtype: torch.dtype  # of the operands of products

    @property
    def both(self) -> bool:
        return self.ids == "both" and self.row_ids is not None

    @property
    def sums(self) -> bool:
        return self.ids == "sums" and self.row_ids is not None


class Results(NamedTuple):
    """What a sweep gives."""

    row: LogSumExp  # [M] over columns; -inf for an empty row
    col: LogSumExp  # [N] over rows
    row_positives: LogSumExp  # [M] over pairs of equal id, with ids="both"; with "sums" ``log`` is the sum of S; else 0 elements
    col_positives: LogSumExp  # [N]
    positive: Tensor  # [M] S[i, i + offset], 0 where that is outside; 0 elements without an offset

    @classmethod
    def unflatten(cls, flat: Sequence[Tensor]) -> Results:
        """From what ``flatten`` gives, as the registered operators pass it."""
        row, col, row_positives, col_positives = (LogSumExp(*flat[k : k + 2]) for k in (0, 2, 4, 6))
        return cls(row, col, row_positives, col_positives, flat[8])

    def flatten(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (*self.row, *self.col, *self.row_positives, *self.col_positives, self.positive)


class Own(NamedTuple):
    """S[i, i + offset] where the sums count it, else -inf. The sums leave it out and get it at the end, exactly: a confident pair's p is
    then 1 to the last bit, and p - 1 keeps its digits.
    """

    counted: Tensor | None  # [M]; None without an offset
    alike: Tensor | None  # [M] in the sums over pairs of equal id; None unless ids="both"


def own_logits(a: Inputs, positive: Tensor) -> Own:
    """From ``positive`` of Results."""
    if a.offset is None:
        return Own(None, None)
    M, N = len(a.x), len(a.y)
    counted = positive
    # With more rows than partners, or an offset outside, some rows have no pair of their own.
    partner = torch.arange(M, device=positive.device) + a.offset
    if a.offset < 0 or a.offset + M > N:
        counted = counted.masked_fill((partner < 0) | (partner >= N), -torch.inf)
    if a.row_ids is None or a.col_ids is None or a.sums:
        return Own(counted, None)
    same = (a.row_ids == a.col_ids[partner.clamp(0, N - 1)]) & (a.row_ids >= 0)
    if a.both:
        return Own(counted, counted.masked_fill(~same, -torch.inf))
    return Own(counted.masked_fill(~same if a.ids == "only" else same, -torch.inf), None)


class ResultGrads(NamedTuple):
    """Gradients of Results; None stands for zero."""

    row: Tensor | None
    col: Tensor | None
    row_positives: Tensor | None
    col_positives: Tensor | None
    positive: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool = True
    y: bool = True
    scale: bool = True
    row_bias: bool = False
    col_bias: bool = False
    row_scale: bool = False
    col_scale: bool = False


class Grads(NamedTuple):
    """Gradients of the inputs, shaped like them, in the dtype of x and y or that of sums; 0 elements where not wanted."""

    x: Tensor
    y: Tensor
    scale: Tensor
    row_bias: Tensor
    col_bias: Tensor
    row_scale: Tensor
    col_scale: Tensor
