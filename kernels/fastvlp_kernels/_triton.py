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
    height = min(tiles_m - first, GROUP)
    inside = pid % width
    return first + inside % height, inside // height


@triton.jit
def dot_tile(
    x_ptr,
    y_ptr,
    rows,
    cols,
    stride_x,
    stride_y,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N] of <x_i, y_j>. rows, cols: int64 and within the matrices; D: a multiple of BLOCK_K."""
    offs_k = tl.arange(0, BLOCK_K)
    p_x = x_ptr + rows[:, None] * stride_x + offs_k[None, :]
    p_y = y_ptr + cols[None, :] * stride_y + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
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


def precision() -> str:
    """How ``tl.dot`` multiplies float32 operands, by torch.get_float32_matmul_precision()."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def upcast() -> bool:
    """Whether operands of ``tl.dot`` become float32: Triton's interpreter returns garbage for bfloat16 products."""
    return interpreting()


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` [rows, width] as kernels read it: in ``dtype``, unit stride, the width padded with zeros to a multiple of 64."""
    x = x.detach().to(dtype)
    missing = -x.shape[1] % WIDTH_MULTIPLE
    if missing:
        return pad(x, (0, missing))
    if x.stride(1) != 1 or x.stride(0) % 16:
        x = x.contiguous()
    return x
