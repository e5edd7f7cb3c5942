"""Swin Transformer V2's attention, over packed tokens with places and over windows."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp.layers.pairs import Pairs
from fastvlp_kernels._inputs import sum_dtype
from fastvlp_kernels.packed import Packed, check_packed
from fastvlp_kernels.packed_attention.runs import Run


class RelativePositions(NamedTuple):
    """The pairs of tokens of a batch by their offsets; make it once per batch, for all layers.

    Offset (r, c) of R x C places is row (r + R - 1) (2 C - 1) + c + C of a table of biases; row 0 is for pairs without an offset.
    """

    pairs: Pairs
    grid: tuple[int, int]

    @classmethod
    def of(cls, packed: Packed, grid: tuple[int, int] | None = None) -> RelativePositions:
        """Those of ``packed.pos``, whose frames are not told apart. Tokens of row -1 (text, registers) have no offsets.

        Args:
            grid: the numbers of rows and columns of the largest image; a place beyond counts as one on its border. None: reads them from
                ``packed.pos``, which on a CUDA device costs one sync.

        Raises:
            ValueError: the batch has no ``pos``, or the grid no places.
        """
        if packed.pos is None:
            raise ValueError(
                "RelativePositions: the batch has no pos; pass Packed.of(x, lengths, pos=...), (frame, row, column) of each token"
            )
        if grid is None:
            largest = packed.pos[:, 1:].amax(0).clamp_min(0).tolist() if packed.total else (0, 0)
            grid = (int(largest[0]) + 1, int(largest[1]) + 1)
        if min(grid) < 1:
            raise ValueError(f"RelativePositions: grid={grid}; it must be (rows, columns), at least 1 each")
        row, column = (places.clamp(0, most - 1).long() for places, most in zip(packed.pos[:, 1:].unbind(1), grid, strict=True))
        return cls._made(Pairs.of(packed.lengths, packed.x.device), row, column, grid, packed.pos[:, 1] >= 0)

    @classmethod
    def of_windows(cls, windows: int, grid: tuple[int, int], device: torch.device) -> RelativePositions:
        """Those of windows of ``grid`` tokens each, row by row."""
        n = grid[0] * grid[1]
        place = torch.arange(windows * n, device=device)
        pairs = Pairs(place // n, (Run(0, 0, 0, windows, n, n),), None, alike=True)
        return cls._made(pairs, place % n // grid[1], place % grid[1], grid, None)

    @classmethod
    def _made(cls, pairs: Pairs, row: Tensor, column: Tensor, grid: tuple[int, int], placed: Tensor | None) -> RelativePositions:
        # An offset's row in the table is a difference of two numbers, one of each token: no pair needs more than a subtraction.
        step = 2 * grid[1] - 1
        key = row * step + column
        query = key + (grid[0] - 1) * step + grid[1]

        def index(i: Tensor, j: Tensor) -> Tensor:
            rows = query[i] - key[j]
            return rows if placed is None else torch.where(placed[i] & placed[j], rows, 0)

        return cls(dataclasses.replace(pairs, index=index), grid)


class CosineAttention(nn.Module):
    """Scaled cosine attention with a log-spaced continuous position bias (Swin Transformer V2, https://arxiv.org/abs/2111.09883).

    softmax(min(exp(logit_scale), 100) cos(q_i, k_j) + 16 sigmoid(cpb_mlp(offset of i from j))), inside each segment. Where segments are the
    parts of shifted windows, no mask is needed. Its parameters and their names are those of timm's WindowAttention.

    Args:
        dim: C, a multiple of ``num_heads``. window_size: rows and columns of the window.
        pretrained_window_size: the window that scales the offsets; (0, 0): ``window_size``.
    """

    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        pretrained_window_size: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"CosineAttention: dim {dim} with {num_heads} heads; there must be at least 1, and they must divide the width")
        if min(window_size) < 1:
            raise ValueError(f"CosineAttention: window_size={window_size}; it must be (rows, columns), at least 1 each")
        self.num_heads, self.window_size = num_heads, window_size
        self.scaled_by = pretrained_window_size if pretrained_window_size[0] > 0 else window_size
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim)

    @overload
    def forward(self, x: Packed, relative: RelativePositions | None = None) -> Packed: ...
    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    def forward(self, x: Packed | Tensor, relative: RelativePositions | None = None) -> Packed | Tensor:
        """Packed [T, C] with ``pos`` -> the same segments, [T, C]; or windows [B, N, C] of N = rows * columns tokens -> [B, N, C].

        ``packed.size`` weighs the keys. A pair with a token of row -1 (text, registers) has bias 0.

        Args:
            relative: :meth:`RelativePositions.of` the batch, so that it is made once for all layers.

        Raises:
            ValueError: packed tokens without ``pos``, or windows of another size.
        """
        if isinstance(x, Packed):
            check_packed("CosineAttention", self.qkv.in_features, x=x)
            log_size = None if x.size is None else x.size.to(sum_dtype(x.x.dtype)).log()
            return x.replace(x=self._attend(x.x, RelativePositions.of(x) if relative is None else relative, log_size))
        if x.ndim != 3 or x.shape[1] != self.window_size[0] * self.window_size[1]:
            rows, columns = self.window_size
            raise ValueError(f"CosineAttention: x is {tuple(x.shape)}; windows must be [B, {rows * columns}, C], other tokens come Packed")
        windows = RelativePositions.of_windows(x.shape[0], self.window_size, x.device)
        return self._attend(x.flatten(0, 1), windows, None).view(x.shape)

    def _attend(self, x: Tensor, relative: RelativePositions, log_size: Tensor | None) -> Tensor:
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            # Swin V2's keys have no bias; with zeros in its place one product makes all three.
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        # Clamped before the exponential, as in timm, so that a scale beyond 100 has no gradient.
        scale = self.logit_scale.clamp_max(math.log(100)).exp().squeeze(-1)
        dtype = sum_dtype(v.dtype)
        q, k = F.normalize(q.to(dtype), dim=-1) * scale, F.normalize(k.to(dtype), dim=-1)
        out = relative.pairs.attend(q, k, v, 1.0, self._table(relative.grid), log_size)
        return cast(Tensor, self.proj(out.flatten(1)))

    def _table(self, grid: tuple[int, int]) -> Tensor:
        """[rows, H], the biases of all offsets, as RelativePositions numbers them."""
        weight = cast(Tensor, self.cpb_mlp[0].weight)
        with torch.autocast(weight.device.type, enabled=False):
            sides = []
            for size, by in zip(grid, self.scaled_by, strict=True):
                # 8 at the border of the window of pre-training, then compressed by a logarithm: larger windows extrapolate little.
                offsets = torch.arange(1 - size, size, device=weight.device, dtype=sum_dtype(weight.dtype)) * (8 / max(by - 1, 1))
                sides.append(offsets.sign() * (offsets.abs() + 1).log2() / 3)
            bias = 16 * torch.sigmoid(self.cpb_mlp(torch.cartesian_prod(*sides).to(weight.dtype)))
            # Row 0, zeros, is for pairs without an offset.
            return F.pad(bias.to(sum_dtype(weight.dtype)), (0, 0, 1, 0))
