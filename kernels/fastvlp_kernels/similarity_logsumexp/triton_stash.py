"""A stash of exponentials: three products instead of four, for tiles of S that the forward leaves to the backward in bfloat16.

A tile is kept as exp(S) where that is in range; the others are computed again. Positives are not among what is rounded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import grouped_tile
from .arguments import Inputs
from .triton_tile import config, flow, similarity_tile

# Behind the elements of a tile: 0 in float32 if it is kept, else infinity, and padding to 16 bytes.
TAIL = tl.constexpr(8)


def stash_shape(a: Inputs, stash_bytes: int) -> tuple[int, int]:
    """The stash: [tiles, elements of a tile and its mark], the first tiles of the sweep.

    [0, 0] without a budget, for operands other than bfloat16, and with ids, biases or scales of rows and columns.
    """
    extras = (a.row_bias, a.col_bias, a.row_scale, a.col_scale, a.row_ids)
    # Only where a product is dear and an exponential can be rounded: bfloat16 without vectors.
    if stash_bytes == 0 or a.dtype != torch.bfloat16 or any(extra is not None for extra in extras):
        return 0, 0
    options = config(a)
    BLOCK_M, BLOCK_N = options["BLOCK_M"], options["BLOCK_N"]
    size = BLOCK_M * BLOCK_N + TAIL.value
    return min(triton.cdiv(len(a.x), BLOCK_M) * triton.cdiv(len(a.y), BLOCK_N), stash_bytes // (2 * size)), size


def pointers(stash: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """The stash as kernels take it: its elements, the same memory as float32, and its number of tiles."""
    return (None, None, 0) if stash is None or len(stash) == 0 else (stash, stash.view(torch.float32), len(stash))


@triton.jit
def keep(E, stash_ptr, stash_t_ptr, place, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Leave exp(S), of which positives are no part."""
    t_m, t_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    size: tl.constexpr = BLOCK_M * BLOCK_N + TAIL
    tl.store(stash_ptr + place * size + t_m[:, None] * BLOCK_N + t_n[None, :], E.to(stash_ptr.dtype.element_ty))
    tl.store(stash_t_ptr + place * (size // 2) + BLOCK_M * BLOCK_N // 2, 0.0)


@triton.jit
def keep_none(stash_t_ptr, place, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Mark a tile as one to compute again."""
    tl.store(stash_t_ptr + place * ((BLOCK_M * BLOCK_N + TAIL) // 2) + BLOCK_M * BLOCK_N // 2, float("inf"))


@triton.jit
def stashed_kernel(
    x_ptr, stride_x, y_ptr, stride_y, scale_ptr, row_lse_ptr, col_lse_ptr, g_row_ptr, g_col_ptr, of_own_ptr, norm_ptr,
    stash_ptr, stash_t_ptr, stash_tiles, first_tile, G_ptr, M, N, D, offset, stride_G,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of G [in whole tiles] = dS / norm, from the stash or, where that has none, from the product."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, GROUP)
    t_m, t_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    first_m, first_n = i_m.to(tl.int64) * BLOCK_M, i_n.to(tl.int64) * BLOCK_N
    in_row, in_col = t_m < (M - first_m).to(tl.int32), t_n < (N - first_n).to(tl.int32)
    rows, cols = tl.minimum(first_m + t_m, M - 1), tl.minimum(first_n + t_n, N - 1)
    size: tl.constexpr = BLOCK_M * BLOCK_N + TAIL
    place = first_tile + i_m.to(tl.int64) * tiles_n + i_n
    mark = tl.load(stash_t_ptr + place * (size // 2) + BLOCK_M * BLOCK_N // 2, mask=place < stash_tiles, other=float("inf"))
    if mark < float("inf"):
        u = tl.zeros((BLOCK_M,), tl.float32)
        v = tl.zeros((BLOCK_N,), tl.float32)
        if g_row_ptr is not None:
            u = tl.exp(-tl.load(row_lse_ptr + rows)) * tl.load(g_row_ptr + rows)
        if g_col_ptr is not None:
            v = tl.exp(-tl.load(col_lse_ptr + cols)) * tl.load(g_col_ptr + cols)
        E = tl.load(stash_ptr + place * size + t_m[:, None] * BLOCK_N + t_n[None, :]).to(tl.float32)
        dS = E * (u[:, None] + v[None, :])
    else:
        _, S, _, _ = similarity_tile(
            x_ptr, stride_x, y_ptr, stride_y, scale_ptr, None, None, None, None, first_m, first_n, rows, cols, M, N, D,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        dS = flow(S, row_lse_ptr, col_lse_ptr, g_row_ptr, g_col_ptr, rows, cols)
    if of_own_ptr is not None:
        diagonal = tl.minimum(tl.maximum(first_m + offset - first_n, -BLOCK_M), BLOCK_N).to(tl.int32)
        dS = tl.where((t_m + diagonal)[:, None] == t_n[None, :], tl.load(of_own_ptr + rows)[:, None], dS)
    dS = tl.where(in_row[:, None] & in_col[None, :], dS, 0.0) * (1.0 / tl.load(norm_ptr))
    tl.store(G_ptr + (first_m + t_m)[:, None] * stride_G + (first_n + t_n)[None, :], dS.to(G_ptr.dtype.element_ty))
