"""Pieces that the Triton kernels of the losses share. Only ``triton.py`` files import this module."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ._backend import interpreting

# Widths are padded to this, so that no product masks its inner dimension and rows start on 16-byte boundaries.
WIDTH_MULTIPLE = 64


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile (m, n) of a linear program id: GROUP rows of tiles are walked column by column and so share their operands in L2."""
    width = GROUP * tiles_n
    first = (pid // width) * GROUP
    # The last group may have fewer rows of tiles.
    height = min(tiles_m - first, GROUP)
    inside = pid % width
    return first + inside % height, inside // height


@triton.jit
def span(cu_ptr, segment, T):
    """Where a segment starts and its length, within the T tokens that there are, whatever the device holds."""
    start = tl.minimum(tl.maximum(tl.load(cu_ptr + segment).to(tl.int32), 0), T)
    end = tl.minimum(tl.load(cu_ptr + segment + 1).to(tl.int32), T)
    return start, tl.maximum(end - start, 0)


@triton.jit
def tile_of(cu_ptr, tile, S, blocks, SEARCH: tl.constexpr, BLOCK: tl.constexpr):
    """The segment of a tile and the tile's place in it."""
    if SEARCH:
        low = tile * 0
        high = low + S
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(cu_ptr + middle).to(tl.int32) // BLOCK + middle <= tile
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        return low, tl.maximum(tile - tl.load(cu_ptr + low).to(tl.int32) // BLOCK - low, 0)
    return tile // blocks, tile % blocks


@triton.jit
def dot_tile(
    x_ptr, stride_x, y_ptr, stride_y, first_m, first_n, M, N, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, BLOCK_N] of <x_i, y_j> from row first_m of x [M, D] and first_n of y [N, D]; D: a multiple of BLOCK_K.

    Rows beyond M and N are the last ones again.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows beyond the end read the last one again: no masks in the loop, and the caller drops what they give.
    rows = tl.minimum(first_m.to(tl.int64) + tl.arange(0, BLOCK_M), M - 1)
    cols = tl.minimum(first_n.to(tl.int64) + tl.arange(0, BLOCK_N), N - 1)
    p_x = x_ptr + rows[:, None] * stride_x + offs_k[None, :]
    p_y = y_ptr + cols[None, :] * stride_y + offs_k[:, None]
    for _ in range(0, D, BLOCK_K):
        b_x = tl.load(p_x)
        b_y = tl.load(p_y)
        if UPCAST:
            b_x = b_x.to(tl.float32)
            b_y = b_y.to(tl.float32)
        acc = tl.dot(b_x, b_y, acc, input_precision=PRECISION)
        p_x += BLOCK_K
        p_y += BLOCK_K
    return acc


@triton.jit
def same_ids(b_row_ids, b_col_ids):
    """[BLOCK_M, BLOCK_N]: where ids are equal; ids below zero match nothing."""
    return (b_row_ids[:, None] == b_col_ids[None, :]) & (b_row_ids[:, None] >= 0)


@triton.jit
def places(stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the elements of a tile are from its first. 32-bit numbers: 64-bit ones of a whole tile would fill the registers."""
    return tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def multiply_tile(a_ptr, stride_am, stride_ak, b_ptr, stride_b, offs_m, offs_n, K, width, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr):
    """float32 a[offs_m] @ b[:, offs_n] for b [K, width]; a is read up to a whole block, and holds zeros beyond K.

    What is to be added is added behind the loop: where something else than zeros defines the accumulator of asynchronous products, ptxas
    waits for each of them.
    """
    acc = tl.zeros((offs_m.shape[0], offs_n.shape[0]), tl.float32)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    p_a = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
    p_b = b_ptr + offs_k[:, None] * stride_b + offs_n[None, :]
    for k in range(0, K, BLOCK_K):
        b_a = tl.load(p_a)
        b_b = tl.load(p_b, mask=(offs_k < K - k)[:, None] & (offs_n < width)[None, :], other=0.0)
        if UPCAST:
            b_a = b_a.to(tl.float32)
            b_b = b_b.to(tl.float32)
        acc = tl.dot(b_a, b_b, acc)
        p_a += BLOCK_K * stride_ak
        p_b += BLOCK_K * stride_b
    return acc


def precision() -> str:
    """How ``tl.dot`` multiplies float32 operands, by torch.get_float32_matmul_precision()."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def upcast() -> bool:
    """Whether operands of ``tl.dot`` become float32: Triton's interpreter returns garbage for bfloat16 products."""
    return interpreting()


def architecture(device: torch.device) -> int:
    """Major compute capability; Hopper's where the kernels are interpreted."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; one where the kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` [rows, width] as kernels read it: in ``dtype``, unit stride, the width padded with zeros to a multiple of 64."""
    x = x.detach().to(dtype)
    missing = -x.shape[1] % WIDTH_MULTIPLE
    if missing:
        return pad(x, (0, missing))
    # Triton loads 16 bytes at a time only where it can prove that each row starts on such a boundary.
    if x.stride(1) != 1 or x.stride(0) % 16:
        x = x.contiguous()
    return x
