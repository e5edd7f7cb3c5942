"""What the implementations take and give. M rows, N columns, width D; sums are float32 (float64 for float64 operands)."""

from typing import NamedTuple

import torch
from torch import Tensor


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
    """What a sweep gives. Log-sum-exps are kept in float64: p - 1 of a confident pair needs digits of S - lse that float32 lacks."""

    row: Tensor  # [M] log-sum-exp over columns; -inf for an empty row
    col: Tensor  # [N] log-sum-exp over rows
    row_positives: Tensor  # [M] over pairs of equal id: with ids="both" the same, with "sums" the sum of S, else 0 elements
    col_positives: Tensor  # [N]
    positive: Tensor  # [M] S[i, i + offset], 0 elements without an offset


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
