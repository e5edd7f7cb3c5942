"""Products with float32 accumulation across calls, for gradients that are summed over waves of a workspace."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import descriptors, grouped_tile, multiply_add, source, upcast

CONFIG = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}


@triton.jit
def _product_kernel(
    a_ptr, stride_am, stride_ak, b_ptr, stride_b, total_ptr, out_ptr, alpha_ptr, beside_ptr, along_ptr,
    M, N, K, width_b, stride_total, stride_out, stride_beside,
    TRANSPOSED: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """total (+)= a @ b; at the end out = alpha * total and, for each tile of columns, along [., M] = <beside_i, total_i>.

    a is read in whole blocks; up to a block of K it holds zeros. Without strides a, or TRANSPOSED its transpose, and b are descriptors.
    """
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    offs_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    p_total = total_ptr + offs_m[:, None] * stride_total + offs_n[None, :] if total_ptr is not None else None
    if FIRST:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        acc = tl.load(p_total, mask=inside, other=0.0)
    if stride_b is None:
        for k in range(0, K, BLOCK_K):
            b_a = a_ptr.load([k, i_m * BLOCK_M]).T if TRANSPOSED else a_ptr.load([i_m * BLOCK_M, k])
            b_b = b_ptr.load([k, i_n * BLOCK_N])
            if UPCAST:
                b_a = b_a.to(tl.float32)
                b_b = b_b.to(tl.float32)
            acc = tl.dot(b_a, b_b, acc)
    else:
        acc = multiply_add(acc, a_ptr, stride_am, stride_ak, b_ptr, stride_b, offs_m, offs_n, K, width_b, BLOCK_K, UPCAST)
    if LAST:
        p_out = out_ptr + offs_m[:, None] * stride_out + offs_n[None, :]
        tl.store(p_out, (acc * tl.load(alpha_ptr)).to(out_ptr.dtype.element_ty), mask=inside)
        if beside_ptr is not None:
            b_beside = tl.load(beside_ptr + offs_m[:, None] * stride_beside + offs_n[None, :], mask=inside, other=0.0)
            tl.store(along_ptr + i_n.to(tl.int64) * M + offs_m, tl.sum(acc * b_beside.to(tl.float32), 1), mask=offs_m < M)
    else:
        tl.store(p_total, acc, mask=inside)


def multiply(
    a: Tensor, b: Tensor, alpha: Tensor, out: Tensor, total: Tensor | None = None, first: bool = True, last: bool = True,
    along: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """total (+)= a @ b in float32 and, in the ``last`` call, out = alpha * total.

    Args:
        a: [M, K], a view of a workspace whose sides are multiples of 128 and which holds zeros up to the next multiple of 64
            of K; either stride may be 1.
        b: [K, N or more, a multiple of 64] with unit column stride. alpha: 0-d float32. out: [M, N], any floating dtype.
        total: float32 [M, N], needed unless the only call is the first and the last.
        along: in the last call with 16-bit operands, (beside [M, N or more], sums float32 [M], to which <beside_i, total_i> is added).
    """
    N = out.shape[1]
    if a.dtype == torch.float32:
        product = torch.mm(a, b[:, :N])
        if total is not None:
            product = total.copy_(product) if first else total.add_(product)
        if last:
            out.copy_(product * alpha)
        return
    tiles_n = triton.cdiv(N, CONFIG["BLOCK_N"])
    beside, sums = (None, None) if along is None else along
    parts = None if sums is None else sums.new_empty(tiles_n, len(sums))
    BLOCK_M, BLOCK_N, BLOCK_K = CONFIG["BLOCK_M"], CONFIG["BLOCK_N"], CONFIG["BLOCK_K"]
    transposed = a.stride(1) != 1
    tma = descriptors(a.T if transposed else a, b)
    if tma is None:
        read_a: tuple[Any, int | None, int | None] = (a, a.stride(0), a.stride(1))
    else:
        read_a = (*(source(a.T, BLOCK_K, BLOCK_M, tma) if transposed else source(a, BLOCK_M, BLOCK_K, tma)), None)
    _product_kernel[(triton.cdiv(a.shape[0], BLOCK_M) * tiles_n,)](
        *read_a, *source(b, BLOCK_K, BLOCK_N, tma), total, out, alpha, beside, parts, a.shape[0], N, a.shape[1], b.shape[1],
        0 if total is None else total.stride(0), out.stride(0), 0 if beside is None else beside.stride(0),
        TRANSPOSED=transposed, FIRST=first, LAST=last, UPCAST=upcast(), **CONFIG,
    )  # fmt: skip
    if sums is not None and parts is not None:
        sums += parts.sum(0)
