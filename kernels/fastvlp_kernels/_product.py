"""Products with float32 accumulation across calls, for gradients that are summed over waves of a workspace."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import grouped_tile, multiply_tile, places, upcast

CONFIG = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}


@triton.jit(do_not_specialize=["M", "N", "K"])
def _product_kernel(
    a_ptr, stride_am, stride_ak, b_ptr, stride_b, total_ptr, out_ptr, alpha_ptr, beside_ptr, along_ptr,
    M, N, K, width_b, stride_total, stride_out, stride_beside,
    FIRST: tl.constexpr, LAST: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """total (+)= a @ b; at the end out = alpha * total and, for each tile of columns, along [., M] = <beside_i, total_i>.

    a is read in whole blocks; up to a block of K it holds zeros.
    """
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    offs_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = multiply_tile(a_ptr, stride_am, stride_ak, b_ptr, stride_b, offs_m, offs_n, K, width_b, BLOCK_K, UPCAST)
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    first_m, first_n = i_m.to(tl.int64) * BLOCK_M, i_n * BLOCK_N
    if total_ptr is not None:
        p_total = total_ptr + (first_m * stride_total + first_n) + places(stride_total, BLOCK_M, BLOCK_N)
    if not FIRST:
        acc += tl.load(p_total, mask=inside, other=0.0)
    if LAST:
        p_out = out_ptr + (first_m * stride_out + first_n) + places(stride_out, BLOCK_M, BLOCK_N)
        tl.store(p_out, (acc * tl.load(alpha_ptr)).to(out_ptr.dtype.element_ty), mask=inside)
        if beside_ptr is not None:
            p_beside = beside_ptr + (first_m * stride_beside + first_n) + places(stride_beside, BLOCK_M, BLOCK_N)
            b_beside = tl.load(p_beside, mask=inside, other=0.0)
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
    # cuBLAS can add float32 products to what is there; of 16-bit operands it would round the running sum to 16 bits after each call.
    if a.dtype == torch.float32:
        if total is None:
            total = torch.mm(a, b[:, :N])
        else:
            torch.addmm(total, a, b[:, :N], beta=0 if first else 1, out=total)
        if last:
            torch.mul(total, alpha, out=out)
        return
    tiles_n = triton.cdiv(N, CONFIG["BLOCK_N"])
    beside, sums = (None, None) if along is None else along
    # One row per tile of columns, summed below: atomics would add in another order in each run.
    parts = None if sums is None else sums.new_empty(tiles_n, len(sums))
    _product_kernel[(triton.cdiv(a.shape[0], CONFIG["BLOCK_M"]) * tiles_n,)](
        a, a.stride(0), a.stride(1), b, b.stride(0), total, out, alpha, beside, parts, a.shape[0], N, a.shape[1], b.shape[1],
        0 if total is None else total.stride(0), out.stride(0), 0 if beside is None else beside.stride(0),
        FIRST=first, LAST=last, UPCAST=upcast(), **CONFIG,
    )  # fmt: skip
    if sums is not None and parts is not None:
        sums += parts.sum(0)
