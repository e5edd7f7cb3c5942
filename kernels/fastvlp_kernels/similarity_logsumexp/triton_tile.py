"""Tiles of S and of its gradient, as the kernels of similarity_logsumexp share them."""

import torch
import triton
import triton.language as tl

from .._triton import architecture, dot_tile
from .arguments import Inputs


def config(a: Inputs, backward: bool = False) -> dict[str, int]:
    """Block sizes and launch options; each per-column vector costs 32 registers a thread, so tiles shrink where ids or vectors are.

    On Blackwell, the exponentials of all pairs and of the positives besides, times their gradients, are one too many for 128 columns.
    """
    if a.dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8, "num_warps": 8, "num_stages": 2}
    vectors = any(v is not None for v in (a.row_bias, a.col_bias, a.row_scale, a.col_scale))
    BLOCK_M = 64 if vectors or a.row_ids is not None else 128
    four_gradients = backward and a.both and architecture(a.x.device) > 9
    BLOCK_N = 64 if vectors and a.row_ids is not None or four_gradients else 128
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}


@triton.jit
def finite(maximum):
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def similarity_tile(
    x_ptr, stride_x, y_ptr, stride_y, scale_ptr, row_bias_ptr, col_bias_ptr, row_scale_ptr, col_scale_ptr,
    first_m, first_n, rows, cols, M, N, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Products [BLOCK_M, BLOCK_N], the same as S, and row and column scales (1 where there are none)."""
    products = dot_tile(x_ptr, stride_x, y_ptr, stride_y, first_m, first_n, M, N, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
    b_row_scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    b_col_scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    S = products * tl.load(scale_ptr)
    if row_scale_ptr is not None:
        b_row_scale = tl.load(row_scale_ptr + rows)
        S *= b_row_scale[:, None]
    if col_scale_ptr is not None:
        b_col_scale = tl.load(col_scale_ptr + cols)
        S *= b_col_scale[None, :]
    if row_bias_ptr is not None:
        S += tl.load(row_bias_ptr + rows)[:, None]
    if col_bias_ptr is not None:
        S += tl.load(col_bias_ptr + cols)[None, :]
    return products, S, b_row_scale, b_col_scale


@triton.jit
def flow(S, row_lse_ptr, col_lse_ptr, g_row_ptr, g_col_ptr, rows, cols):
    """exp(S - row_lse) * g_row + exp(S - col_lse) * g_col."""
    dS = tl.zeros_like(S)
    if g_row_ptr is not None:
        dS += tl.exp(S - tl.load(row_lse_ptr + rows)[:, None]) * tl.load(g_row_ptr + rows)[:, None]
    if g_col_ptr is not None:
        dS += tl.exp(S - tl.load(col_lse_ptr + cols)[None, :]) * tl.load(g_col_ptr + cols)[None, :]
    return dS
