"""Patches of one image after the other, normalised and projected: the mathematics of ``patch_embed``."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlp_kernels._inputs import sum_dtype


def patch_embed(
    pixels: Tensor, sizes: list[list[int]], keep: Tensor | None, weight: Tensor, bias: Tensor | None, rows: Tensor | None,
    cols: Tensor | None, grid: Tensor | None, patch_size: int, mean: Sequence[float], std: Sequence[float], rotary: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tokens [T, C] in ``dtype`` and their positions int32 [T, 3]; differentiable."""
    P, acc = patch_size, sum_dtype(dtype)
    # mean and std are of pixels from 0 to 1.
    unit = 255 if pixels.dtype == torch.uint8 else 1
    shift, scale = (torch.tensor(values, dtype=acc, device=pixels.device) for values in (mean, std))
    tokens, places, start = [pixels.new_zeros((0, weight.shape[0]), dtype=acc)], [torch.zeros(0, 3, dtype=torch.int64)], 0
    for h, w in sizes:
        image = (pixels[start : start + 3 * h * w].to(acc).view(h, w, 3) / unit - shift) / scale
        start, m, n = start + 3 * h * w, h // P, w // P
        x = image.view(m, P, n, 3 * P).transpose(1, 2).reshape(m, n, 3 * P * P) @ weight.to(acc).T
        if bias is not None:
            x = x + bias.to(acc)
        if rows is not None and cols is not None:
            x = x + rows[:m, None].to(acc) + cols[:n].to(acc)
        if grid is not None and m * n:
            x = x + resized(grid.to(acc), m, n)
        if rotary is not None:
            x = turned(x, rotary)
        tokens.append(x.flatten(0, 1))
        places.append(torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), torch.arange(m), torch.arange(n)))
    x, pos = torch.cat(tokens).to(dtype), torch.cat(places).int().to(pixels.device)
    return (x, pos) if keep is None else (x[keep.to(x.device)], pos[keep.to(x.device)])


def resized(grid: Tensor, m: int, n: int) -> Tensor:
    """``grid`` [G, G', C] at m x n."""
    turned = n == 1  # PyTorch 2.13 on CPUs repeats the first row in a result of one column
    x, size = (grid.permute(2, 1, 0), (n, m)) if turned else (grid.permute(2, 0, 1), (m, n))
    x = F.interpolate(x[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    return x.permute(2, 1, 0) if turned else x.permute(1, 2, 0)


def turned(x: Tensor, base: float) -> Tensor:
    """x [m, n, C] with its pairs of channels turned as complex numbers, by the row in the first half and by the column in the second."""
    m, n, C = x.shape
    speed = base ** (torch.arange(C // 4, dtype=x.dtype, device=x.device) * (-4 / C))
    row, col = (torch.arange(places, dtype=x.dtype, device=x.device)[:, None] * speed for places in (m, n))
    angle = torch.cat((row[:, None].expand(-1, n, -1), col.expand(m, -1, -1)), 2)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(2, (-1, 2))) * torch.exp(1j * angle)).flatten(2)
