"""Patch embedding on GPUs: products whose operand is read out of the images themselves (implicit im2col), patch by patch.

uint8 pixels are exact in bfloat16 and float16 and enter the products as they are; the mean is subtracted afterwards, times the rounded
weights, so that it cancels to the bit. Other pixels are centred in registers before they are rounded.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import WIDTH_MULTIPLE, grouped_tile, operand, precision, upcast
from .cpu import Tables, Turn, per_value

PROGRAMS = 256  # that a reduction over tokens is split into, at least
BLOCK_T = 128  # tokens of one step of `locate` and of the sums of tables


def config(dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and launch options of the products; M: tokens (forward) or channels, N: channels or values, K: values or tokens."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


@triton.jit(do_not_specialize=["S", "total"])
def _locate_kernel(images_ptr, keep_ptr, where_ptr, pos_ptr, S, total, P: tl.constexpr, BLOCK: tl.constexpr):
    """where int64 [total, 3] and pos int32 [total, 3]; see ``cpu.locate``."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < total
    patch = tl.load(keep_ptr + token, mask=inside, other=0) if keep_ptr is not None else token
    # The last image whose first patch is no later.
    low, high = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32) + S
    bits = S
    while bits > 0:
        middle = (low + high) // 2
        after = tl.load(images_ptr + middle) > patch
        high = tl.where(after, middle, high)
        low = tl.where(after, low, middle)
        bits = bits // 2
    place = patch - tl.load(images_ptr + low)
    columns = tl.load(images_ptr + 2 * S + low)
    # A picture without columns has no patches, and must not divide by 0 all the same.
    row = place // tl.maximum(columns, 1)
    col = place - row * columns
    stride = columns * (3 * P)
    tl.store(where_ptr + token * 3, tl.load(images_ptr + S + low) + row * P * stride + col * (3 * P), mask=inside)
    tl.store(where_ptr + token * 3 + 1, stride, mask=inside)
    tl.store(where_ptr + token * 3 + 2, tl.load(images_ptr + 3 * S + low) + place, mask=inside)
    tl.store(pos_ptr + token * 3, tl.zeros((BLOCK,), tl.int32), mask=inside)
    tl.store(pos_ptr + token * 3 + 1, row.to(tl.int32), mask=inside)
    tl.store(pos_ptr + token * 3 + 2, col.to(tl.int32), mask=inside)


@triton.jit
def _values(
    pixels_ptr, mean_ptr, where_ptr, tokens, k, T, LINE: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr
):
    """float32 [tokens, k]: values k of the patches, less the mean where one is given. Tokens from T on: those of the first patch."""
    origin = tl.load(where_ptr + tokens * 3, mask=tokens < T, other=0)
    stride = tl.load(where_ptr + tokens * 3 + 1, mask=tokens < T, other=0).to(tl.int32)
    # Lines of patches start at multiples of their length.
    origin, stride = tl.multiple_of(origin, ALIGN), tl.multiple_of(stride, ALIGN)
    at = pixels_ptr + origin[:, None] + ((k // LINE)[None, :] * stride[:, None] + (k % LINE)[None, :])
    if EVEN:
        values = tl.load(at)
    else:
        values = tl.load(at, mask=(k < WIDTH)[None, :], other=0)
    values = values.to(tl.float32)
    if mean_ptr is not None:
        values -= tl.load(mean_ptr + k)[None, :]
    return values


@triton.jit
def _turned(x, pos_ptr, turns_ptr, tokens, cols, T, C):
    """x [tokens, cols], its pairs of columns turned: those of the first half of C by the row of pos, of the second by the column."""
    row = tl.load(pos_ptr + tokens * 3 + 1, mask=tokens < T, other=0)
    col = tl.load(pos_ptr + tokens * 3 + 2, mask=tokens < T, other=0)
    first = cols < C // 2
    at = tl.where(first[None, :], row[:, None], col[:, None]) * (C // 2) + tl.where(first, cols, cols - C // 2)[None, :]
    turn = tl.load(turns_ptr + at, mask=(cols < C)[None, :], other=0.0)
    pairs: tl.constexpr = (x.shape[0], x.shape[1] // 2, 2)
    cos, sin = tl.split(tl.reshape(turn, pairs))
    real, imaginary = tl.split(tl.reshape(x, pairs))
    return tl.reshape(tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos), x.shape)


@triton.jit(do_not_specialize=["T"])
def _turn_kernel(x_ptr, pos_ptr, turns_ptr, out_ptr, T, C, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """out [T, C] = x, turned."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at, inside = tokens[:, None] * C + cols[None, :], (tokens < T)[:, None] & (cols < C)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, _turned(x, pos_ptr, turns_ptr, tokens, cols, T, C).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    pixels_ptr, mean_ptr, where_ptr, weight_ptr, bias_ptr, index_ptr, table_ptr, index2_ptr, table2_ptr, pos_ptr, turns_ptr, out_ptr,
    T, C, stride_weight, stride_index, factor,
    LINE: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [T, C] = factor * patches @ weight' + bias + table[index] + table2[index2], turned. weight [C, WIDTH padded with zeros]."""
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.cdiv(C, BLOCK_N), 8)
    tokens = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Channels behind C read the last one again, which spares the loop a mask; they are never stored.
    p_weight = weight_ptr + tl.minimum(cols, C - 1).to(tl.int64)[None, :] * stride_weight
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, WIDTH, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        b_x = _values(pixels_ptr, mean_ptr, where_ptr, tokens, k, T, LINE, WIDTH, WIDTH % BLOCK_K == 0, ALIGN)
        b_w = tl.load(p_weight + k[:, None])
        b_x = b_x.to(b_w.dtype)
        if UPCAST:
            b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
    acc = acc * factor + tl.load(bias_ptr + cols, mask=cols < C, other=0.0)[None, :]
    inside = (tokens < T)[:, None] & (cols < C)[None, :]
    if table_ptr is not None:
        row = tl.load(index_ptr + tokens * stride_index, mask=tokens < T, other=0).to(tl.int64)
        acc += tl.load(table_ptr + row[:, None] * C + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if table2_ptr is not None:
        if turns_ptr is not None:
            tl.debug_barrier()
        row = tl.load(index2_ptr + tokens * stride_index, mask=tokens < T, other=0).to(tl.int64)
        acc += tl.load(table2_ptr + row[:, None] * C + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if turns_ptr is not None:
        # Without barriers rows of both tables and angles would be loaded at once, into more registers than there are.
        tl.debug_barrier()
        acc = _turned(acc, pos_ptr, turns_ptr, tokens, cols, T, C)
    tl.store(out_ptr + tokens[:, None] * C + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _weight_kernel(
    pixels_ptr, mean_ptr, where_ptr, grad_ptr, out_ptr, T, C,
    LINE: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [parts, C, WIDTH]: grad' @ patches over every parts-th block of tokens."""
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(C, BLOCK_M), tl.cdiv(WIDTH, BLOCK_N), 8)
    channels, k = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(tl.program_id(1) * BLOCK_K, T, tl.num_programs(1) * BLOCK_K):
        tokens = first + tl.arange(0, BLOCK_K).to(tl.int64)
        b_x = _values(pixels_ptr, mean_ptr, where_ptr, tokens, k, T, LINE, WIDTH, WIDTH % BLOCK_N == 0, ALIGN)
        inside = (tokens < T)[:, None] & (channels < C)[None, :]
        b_g = tl.load(grad_ptr + tokens[:, None] * C + channels[None, :], mask=inside, other=0.0)
        b_x = b_x.to(b_g.dtype)
        if UPCAST:
            b_x, b_g = b_x.to(tl.float32), b_g.to(tl.float32)
        # Patches on the left: sm_80 has no asynchronous copy of bytes for a right operand.
        acc = tl.dot(tl.trans(b_x), b_g, acc, input_precision=PRECISION)
    at = (tl.program_id(1).to(tl.int64) * C + channels[:, None]) * WIDTH + k[None, :]
    tl.store(out_ptr + at, tl.trans(acc), mask=(channels < C)[:, None] & (k < WIDTH)[None, :])


@triton.jit
def _table_kernel(grad_ptr, order_ptr, starts_ptr, out_ptr, C, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """out [parts, R, C]: the sum of every parts-th block of the tokens of each index. order: the tokens sorted by it."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    end = tl.load(starts_ptr + row + 1)
    for first in range(tl.load(starts_ptr + row) + part * BLOCK_T, end, tl.num_programs(2) * BLOCK_T):
        at = first + tl.arange(0, BLOCK_T)
        token = tl.load(order_ptr + at, mask=at < end, other=0)
        inside = (at < end)[:, None] & (cols < C)[None, :]
        acc += tl.sum(tl.load(grad_ptr + token[:, None] * C + cols[None, :], mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(out_ptr + (part * tl.num_programs(0) + row) * C + cols, acc, mask=cols < C)


def locate(images: Tensor, keep: Tensor | None, total: int, patch_size: int) -> tuple[Tensor, Tensor]:
    """``cpu.locate`` in one launch."""
    where, pos = (torch.empty(total, 3, dtype=kind, device=images.device) for kind in (torch.int64, torch.int32))
    if total:
        with torch.cuda.device_of(images):
            grid = (triton.cdiv(total, BLOCK_T),)
            _locate_kernel[grid](images, keep, where, pos, images.shape[1], total, P=patch_size, BLOCK=BLOCK_T)
    return where, pos


def _launch(pixels: Tensor, patch_size: int, mean: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, bool, dict[str, Any]]:
    """The mean of each value, padded with zeros; whether kernels subtract it from the pixels; and what all products are launched with."""
    line = 3 * patch_size
    centre = per_value(mean, patch_size, torch.empty(0, dtype=torch.float32, device=pixels.device))
    options: dict[str, Any] = config(dtype) | {"LINE": line, "WIDTH": line * patch_size, "PRECISION": precision(), "UPCAST": upcast()}
    # A view that starts at an odd byte has no aligned lines.
    options["ALIGN"] = 16 if line % 16 == 0 and pixels.data_ptr() % 16 == 0 else 1
    padded = torch.nn.functional.pad(centre, (0, -len(centre) % max(options["BLOCK_N"], WIDTH_MULTIPLE)))
    return padded, pixels.dtype != torch.uint8 or dtype == torch.float32, options


def forward(
    pixels: Tensor, where: Tensor, weight: Tensor, bias: Tensor | None, tables: Tables, turn: Turn, patch_size: int,
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """out [T, C] in ``dtype``. mean, std: of the pixels as they are stored."""
    (T, _), (C, width) = where.shape, weight.shape
    out = weight.new_empty(T, C, dtype=dtype)
    if T == 0:
        return out
    pixels = pixels.contiguous()
    centre, inside, options = _launch(pixels, patch_size, mean, dtype)
    # Of the stored pixels' unit only a factor is left, so that float16 weights do not become subnormal.
    factor = 1 / 255 if pixels.dtype == torch.uint8 else 1.0
    folded = operand(weight.float() / per_value([factor * value for value in std], patch_size, centre), dtype)
    constant = torch.zeros(C, dtype=torch.float32, device=out.device) if bias is None else bias.float().contiguous()
    if not inside:
        # In float64, since the mean's part is large beside what is left when it is taken off.
        constant = constant - factor * (folded[:, :width].double() @ centre[:width].double()).float()
    chosen = [(index, table.contiguous()) for index, table in tables] + [(None, None)] * (2 - len(tables))
    grid = (triton.cdiv(T, options["BLOCK_M"]) * triton.cdiv(C, options["BLOCK_N"]),)
    with torch.cuda.device_of(pixels):
        _forward_kernel[grid](
            pixels, centre if inside else None, where, folded, constant, *chosen[0], *chosen[1], *(turn or (None, None)), out,
            T, C, folded.stride(0), where.stride(0), factor,
            **options,
        )  # fmt: skip
    return out


def weight_backward(
    grad: Tensor, pixels: Tensor, where: Tensor, weight: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """The gradient of ``weight``, in its dtype. grad: [T, C], contiguous."""
    (T, C), width = grad.shape, weight.shape[1]
    if T == 0:
        return torch.zeros_like(weight)
    pixels = pixels.contiguous()
    centre, inside, options = _launch(pixels, patch_size, mean, grad.dtype)
    tiles = triton.cdiv(C, options["BLOCK_M"]) * triton.cdiv(width, options["BLOCK_N"])
    parts = min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(T, options["BLOCK_K"]))
    out = torch.empty(parts, C, width, dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(pixels):
        _weight_kernel[(tiles, parts)](pixels, centre if inside else None, where, grad, out, T, C, **options)
    total = out.sum(0)
    if not inside:
        total -= torch.outer(grad.sum(0, dtype=torch.float32), centre[:width])
    return total.div_(per_value(std, patch_size, centre)).to(weight.dtype)


def table_backward(grad: Tensor, index: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, C] in ``dtype``: the sum of the gradients [T, C] of the tokens of each index."""
    C, block = grad.shape[1], min(128, triton.next_power_of_2(grad.shape[1]))
    # Stable, so that the tokens of an index add in the same order in each run.
    found, order = index.sort(stable=True)
    starts = torch.searchsorted(found, torch.arange(rows + 1, device=index.device, dtype=found.dtype))
    blocks = triton.cdiv(C, block)
    parts = max(1, PROGRAMS * 4 // (rows * blocks)) if rows else 1
    out = torch.empty(parts, rows, C, dtype=torch.float32, device=grad.device)
    if rows:
        with torch.cuda.device_of(grad):
            _table_kernel[(rows, blocks, parts)](grad, order, starts, out, C, BLOCK_T=32, BLOCK_C=block)
    return out.sum(0).to(dtype)


def rotate(x: Tensor, pos: Tensor, table: Tensor) -> Tensor:
    """``cpu.rotate`` in one launch. x: contiguous."""
    (T, C), out = x.shape, torch.empty_like(x)
    block = min(128, triton.next_power_of_2(C))
    if T:
        with torch.cuda.device_of(x):
            _turn_kernel[(triton.cdiv(T, 32), triton.cdiv(C, block))](x, pos, table, out, T, C, BLOCK_T=32, BLOCK_C=block)
    return out
