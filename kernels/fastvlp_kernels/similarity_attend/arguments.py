"""What the implementations take and give. M rows, N columns, width D of features and E of values; sums are float32 or float64."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._logsumexp import LogSumExp


class Inputs(NamedTuple):
    """One matrix S_ij = scale * <x_i, y_j> + row_bias_i + col_bias_j and the values that its softmax averages."""

    x: Tensor  # [M, D]
    y: Tensor  # [N, D]
    v: Tensor  # [N, E]
    scale: Tensor  # 0-d
    row_bias: Tensor | None  # [M]
    col_bias: Tensor | None  # [N]
    row_ids: Tensor | None  # int64 [M]
    col_ids: Tensor | None  # int64 [N]
    ids: str  # "exclude" | "only"
    dtype: torch.dtype  # of the operands of products


class Results(NamedTuple):
    """What a sweep gives. Averages are not rounded to 16 bits: the backward subtracts <gradient, out> from what nearly cancels it."""

    out: Tensor  # [M, E] softmax(S) v in the dtype of sums; 0 for a row without columns
    lse: LogSumExp  # [M]; -inf for a row without columns


class ResultGrads(NamedTuple):
    """Gradients of Results; None stands for zero."""

    out: Tensor | None
    lse: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool = True
    y: bool = True
    v: bool = True
    scale: bool = True
    row_bias: bool = False
    col_bias: bool = False

    @property
    def similarities(self) -> bool:
        """Whether anything behind S is wanted."""
        return self.x or self.y or self.scale or self.row_bias or self.col_bias


class Grads(NamedTuple):
    """Gradients of the inputs, shaped like them, in the dtype of x, y and v or that of sums; 0 elements where not wanted."""

    x: Tensor
    y: Tensor
    v: Tensor
    scale: Tensor
    row_bias: Tensor
    col_bias: Tensor
