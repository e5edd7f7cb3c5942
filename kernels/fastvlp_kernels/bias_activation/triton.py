"""bias_activation on GPUs: tiles of tokens and features, without atomics.

Backward, a program walks down its share of the tokens for a block of features and keeps the bias's sums; those of the shares are added in
one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import processors

PROGRAMS = 4  # of backward, for each processor


def config(width: int) -> dict[str, int]:
    """Block sizes and launch options for ``width`` features that are computed from as many, or from pairs."""
    block = min(1024, max(64, triton.next_power_of_2(width)))
    # 16 elements for each of the 128 threads, whatever the width.
    return {"ROWS": 2048 // block, "BLOCK": block, "num_warps": 4, "num_stages": 1}


@triton.jit
def _read(x_ptr, bias_ptr, stride, rows, cols, inside, in_col):
    """float32 [ROWS, BLOCK] of x + bias."""
    hidden = tl.load(x_ptr + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        hidden += tl.load(bias_ptr + cols, mask=in_col, other=0.0).to(tl.float32)[None, :]
    return hidden


@triton.jit
def _normal(x):
    """The chance that a normal number is below x, within 7.5e-8 (Abramowitz and Stegun 1964, 26.2.17), and its density there.

    CUDA's error function and the exponential beside it would take twice the instructions, and more time than reading memory does.
    """
    density = tl.exp2(x * x * -0.7213475204444817) * 0.3989422804014327
    t = 1.0 / (1.0 + 0.2316419 * tl.abs(x))
    tail = density * t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    return tl.where(x < 0, tail, 1.0 - tail), density


# T changes with every ragged batch; Triton would compile again where it is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["T"])
def _forward_kernel(x_ptr, bias_ptr, out_ptr, T, H, stride, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of out [T, H]; of geglu x is [T, 2 H], values before gates."""
    # int64 from the start, as T * H may pass 2^31.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_col = cols < H
    inside = (rows < T)[:, None] & in_col[None, :]
    hidden = _read(x_ptr, bias_ptr, stride, rows, cols, inside, in_col)
    if KIND == "relu2":
        out = tl.where(hidden < 0, 0.0, hidden)  # not maximum, which would lose NaN
        out *= out
    elif KIND == "geglu":
        gate = _read(x_ptr + H, bias_ptr if bias_ptr is None else bias_ptr + H, stride, rows, cols, inside, in_col)
        out = hidden * gate * _normal(gate)[0]
    else:
        out = hidden * _normal(hidden)[0]
    tl.store(out_ptr + rows[:, None] * H + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "share"])
def _backward_kernel(
    grad_ptr, x_ptr, bias_ptr, dx_ptr, dbias_ptr, T, H, share, stride_grad, stride,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx [T, H] (geglu: [T, 2 H]) and the sums [shares, H] (or [shares, 2 H]) of a share of the tokens, each if wanted."""
    first = tl.program_id(0).to(tl.int64) * share
    last = tl.minimum(first + share, T)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_col = cols < H
    width = 2 * H if KIND == "geglu" else H
    # One sum for each row of a tile until the end, so that the loop reduces nothing across threads.
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    gate_sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        inside = (rows < last)[:, None] & in_col[None, :]
        g = tl.load(grad_ptr + rows[:, None] * stride_grad + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        hidden = _read(x_ptr, bias_ptr, stride, rows, cols, inside, in_col)
        at = rows[:, None] * width + cols[None, :]
        if KIND == "geglu":
            gate = _read(x_ptr + H, bias_ptr if bias_ptr is None else bias_ptr + H, stride, rows, cols, inside, in_col)
            below, density = _normal(gate)
            slope = g * hidden * (below + gate * density)
            gate_sums += slope
            if dx_ptr is not None:
                tl.store(dx_ptr + at + H, slope.to(dx_ptr.dtype.element_ty), mask=inside)
            slope = g * gate * below
        elif KIND == "relu2":
            slope = 2.0 * g * tl.where(hidden < 0, 0.0, hidden)
        else:
            below, density = _normal(hidden)
            slope = g * (below + hidden * density)
        sums += slope
        if dx_ptr is not None:
            tl.store(dx_ptr + at, slope.to(dx_ptr.dtype.element_ty), mask=inside)
    if dbias_ptr is not None:
        out = dbias_ptr + tl.program_id(0).to(tl.int64) * width + cols
        tl.store(out, tl.sum(sums, 0), mask=in_col)
        if KIND == "geglu":
            tl.store(out + H, tl.sum(gate_sums, 0), mask=in_col)


def forward(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """[T, H] (geglu: [T, H / 2]) in the dtype of x."""
    x, bias = x if x.stride(1) == 1 else x.contiguous(), None if bias is None else bias.contiguous()
    T, H = x.shape[0], x.shape[1] // 2 if kind == "geglu" else x.shape[1]
    out, options = x.new_empty(T, H), config(H)
    if T:
        with torch.cuda.device_of(x):
            grid = (triton.cdiv(T, options["ROWS"]), triton.cdiv(H, options["BLOCK"]))
            _forward_kernel[grid](x, bias, out, T, H, x.stride(0), KIND=kind, **options)
    return out


def backward(grad: Tensor, x: Tensor, bias: Tensor | None, kind: str, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of x and, in float32, of the bias; [0] where ``needs`` says no."""
    x, bias = x if x.stride(1) == 1 else x.contiguous(), None if bias is None else bias.contiguous()
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    (T, width), H = x.shape, grad.shape[1]
    dx = x.new_empty((T, width) if needs[0] else (0,))
    if T == 0:
        return dx, x.new_zeros(width if needs[1] else 0, dtype=torch.float32)
    options = config(H)
    blocks = triton.cdiv(H, options["BLOCK"])
    shares = triton.cdiv(PROGRAMS * processors(x.device), blocks)
    # Whole tiles, so that none reaches into the tokens of the next program.
    share = triton.cdiv(triton.cdiv(T, shares), options["ROWS"]) * options["ROWS"]
    shares = triton.cdiv(T, share)
    sums = x.new_empty((shares, width) if needs[1] else (0, 0), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward_kernel[(shares, blocks)](
            grad, x, bias, dx if needs[0] else None, sums if needs[1] else None, T, H, share, grad.stride(0), x.stride(0),
            KIND=kind, **options,
        )  # fmt: skip
    return dx, sums.sum(0)
