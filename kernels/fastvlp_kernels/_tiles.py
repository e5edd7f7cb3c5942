"""A similarity matrix S as cache-sized tiles of plain torch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ._cpu_products import bf16_products, pays
from ._inputs import sum_dtype

# A tile and one buffer of its size (1 MiB each in float32) stay in the second-level caches of two cores.
TILE = 512


def tile_sides(M: int, N: int) -> tuple[int, int]:
    """At most a third of each side, so that a tile is never a large part of S."""
    return min(TILE, max(16, -(-M // 3))), min(TILE, max(16, -(-N // 3)))


def finite(maximum: Tensor) -> Tensor:
    """``maximum``, with 0 where nothing was counted."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


class Tiles:
    """The operands of S_ij = scale * <x_i, y_j> + row_bias_i + col_bias_j as products read them, and buffers that are allocated once.

    Attributes:
        acc: dtype of sums. y: [N, D] in it, rounded to ``dtype``. tile_m, tile_n: sides of a tile. fast: products are made
            in ``bf16_products``, of operands that hold numbers of ``dtype``.
    """

    def __init__(
        self, x: Tensor, y: Tensor, scale: Tensor, row_bias: Tensor | None, col_bias: Tensor | None, row_ids: Tensor | None,
        col_ids: Tensor | None, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.x, self.dtype, self.acc = x, dtype, sum_dtype(dtype)
        self.M, self.N = len(x), len(y)
        self.y = self.exact(y)
        self.scale, self.row_bias, self.col_bias = scale, row_bias, col_bias
        # Two different numbers below zero: no unknown id equals another one, and the tiles need one comparison only.
        self.row_ids = None if row_ids is None else row_ids.masked_fill(row_ids < 0, -1)
        self.col_ids = None if col_ids is None else col_ids.masked_fill(col_ids < 0, -2)
        self.tile_m, self.tile_n = tile_sides(self.M, self.N)
        self.fast = pays(x.device, dtype, self.tile_m * self.tile_n * x.shape[1])
        self._buffers = [self.y.new_empty(self.tile_m * self.tile_n) for _ in range(2)]

    def exact(self, features: Tensor) -> Tensor:
        # Rounded as the GPU's operands are, then multiplied in float32 as its tensor cores do.
        return features.to(self.dtype).to(self.acc)

    def rows(self) -> Iterator[slice]:
        return (slice(i, min(i + self.tile_m, self.M)) for i in range(0, self.M, self.tile_m))

    def cols(self) -> Iterator[slice]:
        return (slice(j, min(j + self.tile_n, self.N)) for j in range(0, self.N, self.tile_n))

    def buffers(self, i: slice, j: slice) -> list[Tensor]:
        """Two tiles [rows, columns] of memory."""
        m, n = i.stop - i.start, j.stop - j.start
        return [flat[: m * n].view(m, n) for flat in self._buffers]

    def row_operand(self, i: slice) -> Tensor:
        """[rows, D]: x_i."""
        return self.exact(self.x[i])

    def scaled(self, row_operand: Tensor) -> Tensor:
        """What ``product`` takes."""
        return row_operand if self.fast else row_operand * self.scale

    def product(self, scaled: Tensor, j: slice, out: Tensor) -> Tensor:
        """S but for its biases, of ``scaled`` rows and the columns j."""
        if self.fast:  # the scale would be rounded into an operand
            with bf16_products(True):
                return torch.addmm(out, scaled, self.y[j].T, beta=0, alpha=self.scale.item(), out=out)
        return torch.mm(scaled, self.y[j].T, out=out)

    def same(self, i: slice, j: slice) -> Tensor | None:
        """Where ids are equal, or None without ids."""
        if self.row_ids is None or self.col_ids is None:
            return None
        return self.row_ids[i, None] == self.col_ids[j]

    def bounded(self, limit: float) -> bool:
        """Whether all |S| lie below ``limit`` by Cauchy-Schwarz. It reads values, so only on the CPU."""
        if self.y.device.type != "cpu":
            return False
        longest = max(torch.linalg.vector_norm(self.row_operand(i), dim=1).max().item() for i in self.rows())
        bound = abs(self.scale.item()) * longest * torch.linalg.vector_norm(self.y, dim=1).max().item()
        for bias in (self.row_bias, self.col_bias):
            bound += 0.0 if bias is None else bias.abs().max().item()
        return bound <= limit
