"""grouped_linear on GPUs: tiles of tokens of one type are read through their order and written back through it, without a sorted copy.

A type's slots of tiles follow from where its tokens start, so that nobody asks the device how many there are. Without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import operand, precision, span, tile_of, upcast

SHARES = 32  # of a type's tokens, in the sums of a bias's gradient


def config(dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and launch options of the products."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


@triton.jit(do_not_specialize=["T", "types"])
def _product_kernel(
    x_ptr, order_ptr, starts_ptr, weight_ptr, bias_ptr, out_ptr, T, types, N, K, stride_x, stride_type, stride_n, stride_k,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of out [T, N] = x [T, K] @ weight[type]' + bias[type]; rows of x hold zeros beyond K, up to whole blocks."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    kind, block = tile_of(starts_ptr, tl.program_id(0) // tiles_n, types, 0, True, BLOCK_M)
    first, n = span(starts_ptr, kind, T)
    row = block * BLOCK_M
    if row < n:
        t_m, t_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        cols = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows behind the last one are the last again.
        tokens = tl.load(order_ptr + first + tl.minimum(row + t_m, n - 1))
        p_x = x_ptr + tokens[:, None] * stride_x + t_k[None, :]
        p_w = weight_ptr + kind.to(tl.int64) * stride_type + cols[None, :] * stride_n + t_k[:, None] * stride_k
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            b_x = tl.load(p_x)
            b_w = tl.load(p_w, mask=(t_k < K - k)[:, None] & (cols < N)[None, :], other=0.0)
            if UPCAST:
                b_x = b_x.to(tl.float32)
                b_w = b_w.to(tl.float32)
            acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
            p_x += BLOCK_K
            p_w += BLOCK_K * stride_k
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + kind.to(tl.int64) * N + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        inside = (row + t_m < n)[:, None] & (cols < N)[None, :]
        tl.store(out_ptr + tokens[:, None] * N + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _weight_kernel(
    grad_ptr, x_ptr, order_ptr, starts_ptr, out_ptr, T, N, K, stride_grad, stride_x,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of out [types, N, K]: the tokens of one type, grad' x."""
    kind = tl.program_id(1)
    first, n = span(starts_ptr, kind, T)
    tiles_k = tl.cdiv(K, BLOCK_N)
    rows = (tl.program_id(0) // tiles_k) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    t_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for token in range(0, n, BLOCK_K):
        inside = token + t_k < n
        tokens = tl.load(order_ptr + first + token + t_k, mask=inside, other=0)
        b_g = tl.load(grad_ptr + tokens[:, None] * stride_grad + rows[None, :], mask=inside[:, None] & (rows < N)[None, :], other=0.0)
        b_x = tl.load(x_ptr + tokens[:, None] * stride_x + cols[None, :], mask=inside[:, None] & (cols < K)[None, :], other=0.0)
        if UPCAST:
            b_g = b_g.to(tl.float32)
            b_x = b_x.to(tl.float32)
        acc = tl.dot(tl.trans(b_g), b_x, acc, input_precision=PRECISION)
    # int64, as types * N * K may pass 2^31.
    out = out_ptr + kind.to(tl.int64) * N * K + rows[:, None] * K + cols[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (cols < K)[None, :])


@triton.jit(do_not_specialize=["T"])
def _bias_kernel(
    grad_ptr, order_ptr, starts_ptr, sums_ptr, T, N, stride_grad, SHARES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """sums [types, SHARES, N]: grad over every SHARES-th block of a type's tokens."""
    kind, share = tl.program_id(1) // SHARES, tl.program_id(1) % SHARES
    first, n = span(starts_ptr, kind, T)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for row in range(share * ROWS, n, SHARES * ROWS):
        inside = row + tl.arange(0, ROWS) < n
        tokens = tl.load(order_ptr + first + row + tl.arange(0, ROWS), mask=inside, other=0)
        acc += tl.load(grad_ptr + tokens[:, None] * stride_grad + cols[None, :], mask=inside[:, None] & (cols < N)[None, :], other=0.0).to(
            tl.float32
        )
    tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * N + cols, tl.sum(acc, 0), mask=cols < N)


def _product(x: Tensor, order: Tensor, starts: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K] times weight [types, N, K] of each token's type, of any strides."""
    T, (types, N, K), options = x.shape[0], weight.shape, config(x.dtype)
    out = x.new_empty(T, N)
    if T:
        x = operand(x, x.dtype)
        # All full tiles and a partial one for each type: a bound that is known without asking the device.
        tiles = (T // options["BLOCK_M"] + types) * triton.cdiv(N, options["BLOCK_N"])
        with torch.cuda.device_of(x):
            _product_kernel[(tiles,)](
                x, order, starts, weight, None if bias is None else bias.contiguous(), out, T, types, N, K, x.stride(0), *weight.stride(),
                PRECISION=precision(), UPCAST=upcast(), **options,
            )  # fmt: skip
    return out


def forward(x: Tensor, order: Tensor, starts: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, O] in the dtype of x."""
    return _product(x, order, starts, weight, bias)


def backward(
    grad: Tensor, x: Tensor, order: Tensor, starts: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and weight, and of the bias in float32; [0] where ``needs`` says no."""
    (types, N, K), T = weight.shape, x.shape[0]
    grad, x = (t if t.stride(1) == 1 else t.contiguous() for t in (grad, x))
    dx = _product(grad, order, starts, weight.transpose(1, 2), None) if needs[0] else x.new_empty(0)
    dweight = x.new_empty(weight.shape if needs[1] else (0,), dtype=weight.dtype)
    dbias = x.new_empty(0, dtype=torch.float32)
    with torch.cuda.device_of(x):
        if needs[1]:
            options = config(x.dtype)
            tiles = triton.cdiv(N, options["BLOCK_M"]) * triton.cdiv(K, options["BLOCK_N"])
            _weight_kernel[(tiles, types)](
                grad, x, order, starts, dweight, T, N, K, grad.stride(0), x.stride(0), PRECISION=precision(), UPCAST=upcast(), **options
            )
        if needs[2]:
            # The shares are added in one order afterwards; atomics would add in another one in each run.
            sums = x.new_empty(types, SHARES, N, dtype=torch.float32)
            _bias_kernel[(triton.cdiv(N, 256), types * SHARES)](
                grad, order, starts, sums, T, N, grad.stride(0), SHARES=SHARES, ROWS=8, BLOCK=256, num_warps=4, num_stages=2
            )
            dbias = sums.sum(1)
    return dx, dweight, dbias
