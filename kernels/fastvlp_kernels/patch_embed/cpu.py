"""Patches gathered, normalised and multiplied in chunks that stay in the cache; plain torch, any device."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastvlp_kernels._inputs import sum_dtype

from .positions import turn_

ELEMENTS = 1 << 20  # of one chunk of patches: 4 MiB in float32; with 1 MiB the threads meet four times as often

Tables = Sequence[tuple[Tensor, Tensor]]  # an index [T] and the rows [R, C] that it selects
Turn = tuple[Tensor, Tensor] | None  # pos [T, 3] and ``positions.turns``


def locate(images: Tensor, keep: Tensor | None, total: int, patch_size: int) -> tuple[Tensor, Tensor]:
    """Where the patches are.

    Args:
        images: int64 [4, S]: each image's first patch, first pixel value, columns of patches, and first cell of its size.
        keep: int64 [total], ascending: which patches of all; None: every one.

    Returns:
        where: int64 [total, 3], each patch's first pixel value, the distance of two pixel rows, and its cell. pos: int32 [total, 3].
    """
    patch = torch.arange(total, device=images.device) if keep is None else keep
    first, pixel, columns, cell = images[:, torch.searchsorted(images[0], patch, right=True) - 1]
    place = patch - first
    row = torch.div(place, columns, rounding_mode="floor")
    col, stride = place - row * columns, columns * 3 * patch_size
    where = torch.stack((pixel + row * patch_size * stride + col * 3 * patch_size, stride, cell + place), 1)
    return where, torch.stack((torch.zeros_like(row), row, col), 1).int()


def per_value(channels: Sequence[float], patch_size: int, like: Tensor) -> Tensor:
    """One number for each of the channels -> one for each of the 3 P P values of a patch; not to be written to."""
    return _per_value(tuple(channels), patch_size, like.device, like.dtype)


@functools.lru_cache(maxsize=256)
def _per_value(channels: tuple[float, ...], patch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Made once for each device: a copy from the host's usual memory would wait for the device in every step.
    return torch.tensor(channels, dtype=dtype, device=device).repeat(patch_size**2)


def _chunks(pixels: Tensor, where: Tensor, patch_size: int, centre: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of patches and their values [rows, 3 P P] minus ``centre``, in one buffer."""
    T, width, line = where.shape[0], centre.shape[0], 3 * patch_size
    height = min(T, max(16, ELEMENTS // width))
    if T == 0:
        return
    buffer = centre.new_empty(height, width)
    # Every place at which a line of a patch could start, as a row of overlapping memory.
    lines = pixels.as_strided((pixels.numel() - line + 1, line), (1, 1))
    down = torch.arange(patch_size, device=pixels.device)
    for first in range(0, T, height):
        part = where[first : first + height]
        values = lines.index_select(0, (part[:, :1] + part[:, 1:2] * down).flatten())
        yield slice(first, first + len(part)), buffer[: len(part)].copy_(values.view(len(part), width)).sub_(centre)


def forward(
    pixels: Tensor, where: Tensor, weight: Tensor, bias: Tensor | None, tables: Tables, turn: Turn, patch_size: int,
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """out [T, C] in ``dtype``. mean, std: of the pixels as they are stored."""
    acc = sum_dtype(dtype)
    out = weight.new_empty(where.shape[0], weight.shape[0], dtype=dtype)
    # The deviation divides the weights once instead of every pixel; the mean stays with the pixels, where it loses no digits.
    folded = weight.to(acc) / per_value(std, patch_size, out.new_empty(0, dtype=acc))
    bias = out.new_zeros(weight.shape[0], dtype=acc) if bias is None else bias.to(acc)
    tables = [(index, table.to(acc)) for index, table in tables]
    for rows, values in _chunks(pixels, where, patch_size, per_value(mean, patch_size, folded)):
        part = torch.addmm(bias, values, folded.T, out=out[rows] if dtype == acc else None)
        for index, table in tables:
            part.add_(table.index_select(0, index[rows]))
        if turn is not None:
            turn_(part, turn[0][rows], turn[1])
        # Rounded once, after the positions are added.
        if dtype != acc:
            out[rows] = part
    return out


def weight_backward(
    grad: Tensor, pixels: Tensor, where: Tensor, weight: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """The gradient of ``weight``, in its dtype."""
    acc = sum_dtype(weight.dtype)
    total = grad.new_zeros(weight.shape, dtype=acc)
    for rows, values in _chunks(pixels, where, patch_size, per_value(mean, patch_size, total)):
        total.addmm_(grad[rows].to(acc).T, values)
    return total.div_(per_value(std, patch_size, total)).to(weight.dtype)


def table_backward(grad: Tensor, index: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, C] in ``dtype``: the sum of the gradients [T, C] of the tokens of each index."""
    return torch.ops.aten.embedding_dense_backward(grad.to(dtype), index, rows, -1, False)


def rotate(x: Tensor, pos: Tensor, table: Tensor) -> Tensor:
    """x [T, C], its pairs of channels turned by ``positions.turns``, in its dtype."""
    out = torch.empty_like(x)
    height = max(16, ELEMENTS // x.shape[1])
    for parts in zip(out.split(height), x.split(height), pos.split(height), strict=True):
        parts[0].copy_(turn_(parts[1].to(table.dtype, copy=True), parts[2], table))
    return out
