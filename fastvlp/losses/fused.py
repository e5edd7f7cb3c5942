"""Sums over all pairs of any function of their similarity: S is made tile by tile, and the gradients in the same sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from fastvlp_kernels._inputs import needs_grad

from .autograd import apply, no_second_derivatives

# tile(blocks, rows, columns, needs): the sum over a tile and, for each matrix that needs it, the gradient of its block [rows, columns].
# Blocks may be overwritten.
Tile = Callable[[list[Tensor], slice, slice, list[bool]], tuple[Tensor, list[Tensor | None]]]
ROWS = 64  # at least, of a tile of whole rows: fewer leave the products waiting for memory


def fused_sum(
    tile: Tile,
    features: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    whole_rows: bool = False,
) -> Tensor:
    """The sum of ``tile`` over the tiles of matrices S_ij = scale * <x_i, y_j> + bias of one shape: 0-d, in the dtype of sums.

    Gradients of one number are known up to a factor as soon as it is: they are made with it, from three products a matrix, and kept alone.

    Args:
        features: matrices [., D], and ``scale`` and ``bias``, 0-d, in the dtype of sums. pairs: which features are x and y of each S.
        whole_rows: a tile spans all columns, and 64 rows or more; otherwise it has at most 2^18 pairs (2^24 on GPUs).
    """
    bias = scale.new_zeros(()) if bias is None else bias
    total: Tensor = apply(_Fused, tile, pairs, whole_rows, needs_grad(scale, bias, *features), scale, bias, *features)
    return total


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tile: Tile, pairs: Sequence[tuple[int, int]], whole_rows: bool, needs: list[bool], scale: Tensor, bias: Tensor,
        *features: Tensor,
    ) -> Tensor:  # fmt: skip
        total, gradients = _sweep(tile, pairs, whole_rows, needs, scale, bias, features)
        ctx.needs = needs
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @no_second_derivatives
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        made = iter(ctx.saved_tensors)
        return None, None, None, None, *(gradient * next(made) if need else None for need in ctx.needs)


def _sweep(
    tile: Tile, pairs: Sequence[tuple[int, int]], whole_rows: bool, needs: list[bool], scale: Tensor, bias: Tensor,
    features: tuple[Tensor, ...],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The sum, and its gradients for those of scale, bias and features that need one."""
    need_scale, need_bias, *need = needs
    made = [torch.zeros_like(side) if want else side.new_empty(0) for side, want in zip(features, need, strict=True)]
    wanted = [need_scale or need_bias or need[x] or need[y] for x, y in pairs]
    total, d_scale, d_bias = (scale.new_zeros((), dtype=torch.float64) for _ in range(3))
    M, N = len(features[pairs[0][0]]), len(features[pairs[0][1]])
    elements = 1 << (18 if scale.device.type == "cpu" else 24)  # of a tile: one that caches hold, or one that fills a GPU
    height, width = (max(ROWS, elements // N), N) if whole_rows else (isqrt(elements), isqrt(elements))
    for i in range(0, M, height):
        rows = slice(i, min(i + height, M))
        for j in range(0, N, width):
            cols = slice(j, min(j + width, N))
            sides = [(features[x][rows], features[y][cols]) for x, y in pairs]
            part, gradients = tile([torch.addmm(bias, x * scale, y.T) for x, y in sides], rows, cols, wanted)
            total += part
            for (x, y), (at_x, at_y), dS in zip(sides, pairs, gradients, strict=True):
                if dS is None:
                    continue
                if need_bias:
                    d_bias += dS.sum()
                # <x, dS y> and <y, dS^T x> are both d_scale: the product that is made for the features serves it.
                if need[at_x] or (need_scale and not need[at_y]):
                    of_x = dS @ y
                    if need[at_x]:
                        made[at_x][rows] += of_x
                    if need_scale:
                        d_scale += torch.linalg.vecdot(x, of_x).sum()
                if need[at_y]:
                    of_y = dS.T @ x
                    made[at_y][cols] += of_y
                    if need_scale and not need[at_x]:
                        d_scale += torch.linalg.vecdot(y, of_y).sum()
    scalars = [value.to(scale.dtype) for value, want in ((d_scale, need_scale), (d_bias, need_bias)) if want]
    return total.to(scale.dtype), scalars + [side.mul_(scale) for side, want in zip(made, need, strict=True) if want]
