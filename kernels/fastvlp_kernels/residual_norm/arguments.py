"""The inputs of ``residual_norm`` as its implementations take them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """Tokens and what is added to them, [T, C] each, and vectors [C]."""

    x: Tensor
    branch: Tensor
    gamma: Tensor | None
    weight: Tensor
    bias: Tensor | None
    eps: float
    rms: bool
    dtype: torch.dtype  # of the norm

    @property
    def total_dtype(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, self.branch.dtype)


class Saved(NamedTuple):
    """What backward reads: of x and branch themselves only what LayerScale's gradient is made of."""

    branch: Tensor | None  # None without LayerScale
    gamma: Tensor | None
    weight: Tensor
    bias: Tensor | None
    total: Tensor
    mean: Tensor
    rstd: Tensor
    x_dtype: torch.dtype
    branch_dtype: torch.dtype
    rms: bool

    @property
    def shared(self) -> bool:
        """Whether x and branch have one gradient."""
        return self.gamma is None and self.x_dtype == self.branch_dtype


class Needs(NamedTuple):
    """What needs a gradient."""

    x: bool
    branch: bool
    gamma: bool
    weight: bool
    bias: bool
