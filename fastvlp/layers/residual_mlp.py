"""A feed-forward layer that stands alone, without attention."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualMlp(nn.Module):
    """x + mlp(norm(x)), four times as wide inside: a block of AIM's head (arXiv:2401.08541), which sees each token alone.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return x + self.down(F.gelu(self.up(self.norm(x))))
