"""A learned grid of positions at other sizes, by bilinear interpolation with antialiasing as two small matrices per size; rotations."""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


@functools.lru_cache(maxsize=4096)
def taps(grid: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[size, grid]: the weights of ``interpolate(mode="bilinear", antialias=True, align_corners=False)`` on one axis; made once.

    A triangle around (i + 1/2) * grid / size, as wide as the distance of the outputs but at least of the inputs, that sums to 1.
    """
    width = max(grid / size, 1.0)
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * (grid / size)
    # A triangle as wide as the grid's step where it grows, and wider where it shrinks: the antialiasing.
    weight = (1 - (torch.arange(grid) + 0.5 - centre[:, None]).abs() / width).clamp_min(0)
    return (weight / weight.sum(1, keepdim=True)).to(device, dtype)


def resize(grid: Tensor, sizes: Sequence[tuple[int, int]], dtype: torch.dtype) -> Tensor:
    """``grid`` [G, G', C] at each of the ``sizes`` (rows, columns), in lexicographic order, end to end: [N, C] in ``dtype``."""
    G, width, C = grid.shape
    parts = [grid.new_empty((0, C), dtype=dtype)]
    # The sizes are sorted: those of one height share the product over rows.
    for m, group in itertools.groupby(sizes, lambda size: size[0]):
        high = (taps(G, m, grid.device, dtype) @ grid.to(dtype).flatten(1)).unflatten(1, (width, C))
        parts += [(taps(width, n, grid.device, dtype) @ high).flatten(0, 1) for _, n in group]
    return torch.cat(parts)


def resize_backward(gradient: Tensor, grid: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """The gradient of the grid from that of ``resize``, in the dtype of ``gradient`` [N, C]."""
    G, width, C = grid.shape
    out, start = gradient.new_zeros(G, width * C), 0
    for m, group in itertools.groupby(sizes, lambda size: size[0]):
        high = gradient.new_zeros(m, width, C)
        for _, n in group:
            high += taps(width, n, gradient.device, gradient.dtype).T @ gradient[start : start + m * n].unflatten(0, (m, n))
            start += m * n
        out.addmm_(taps(G, m, gradient.device, gradient.dtype).T, high.flatten(1))
    return out.view(G, width, C)


@functools.lru_cache(maxsize=256)
def turns(base: float, places: int, channels: int, back: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[places, C / 2], made once: cosine and sine, in turn, of place * base^(-4 i / C) for the pairs i of half the channels."""
    speed = base ** (torch.arange(channels // 4, dtype=torch.float64) * (-4 / channels))
    angle = torch.arange(places, dtype=torch.float64)[:, None] * speed
    return torch.stack((angle.cos(), -angle.sin() if back else angle.sin()), 2).flatten(1).to(device, dtype)


def turn_(x: Tensor, pos: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs of neighbouring channels of x [T, C] in place: those of the first half by the row, of the second by the column."""
    factors = torch.view_as_complex(table.unflatten(1, (-1, 2)))[pos[:, 1:]].flatten(1)
    torch.view_as_complex(x.unflatten(1, (-1, 2))).mul_(factors)
    return x
