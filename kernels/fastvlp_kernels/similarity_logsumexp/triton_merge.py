"""Log-sum-exps of rows and columns from those of tiles, and the gradients of the pairs that these leave out."""

import triton
import triton.language as tl

from .triton_tile import finite


@triton.jit
def merge_kernel(
    part_max_ptr, part_sum_ptr, max_ptr, sum_ptr, own_ptr, reference_ptr, log_ptr, parts, length, own_offset, own_length,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge partial (reference, sum) [parts, length] into the running ones, and give the log-sum-exp with the own logits."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < length
    high = tl.load(max_ptr + offs, mask=inside, other=-float("inf"))
    total = tl.load(sum_ptr + offs, mask=inside, other=0.0)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        where = part.to(tl.int64)[:, None] * length + offs[None, :]
        given = (part < parts)[:, None] & inside[None, :]
        b_max = tl.load(part_max_ptr + where, mask=given, other=-float("inf"))
        b_sum = tl.load(part_sum_ptr + where, mask=given, other=0.0)
        highest = tl.maximum(high, tl.max(b_max, 0))
        shift = finite(highest)
        total = total * tl.exp(high - shift) + tl.sum(b_sum * tl.exp(b_max - shift[None, :]), 0)
        high = highest
    tl.store(max_ptr + offs, high, mask=inside)
    tl.store(sum_ptr + offs, total, mask=inside)
    # In float64, as exp(own - reference) + the others; float32 holds the result because the reference is taken from it.
    others = high.to(tl.float64) + tl.log(total.to(tl.float64))
    top = others
    own = tl.full((BLOCK,), -float("inf"), tl.float32)
    if own_ptr is not None:
        own_row = offs + own_offset
        own = tl.load(own_ptr + own_row, mask=inside & (own_row >= 0) & (own_row < own_length), other=-float("inf"))
        top = tl.maximum(others, own.to(tl.float64))
    shift = finite(top)
    rest = tl.log(tl.exp(others - shift) + tl.exp(own.to(tl.float64) - shift))
    reference = (shift + rest).to(tl.float32)
    log = ((shift - reference.to(tl.float64)) + rest).to(tl.float32)
    tl.store(reference_ptr + offs, reference, mask=inside)
    tl.store(log_ptr + offs, tl.where(reference == -float("inf"), 0.0, log), mask=inside)


@triton.jit
def _share(own, reference, log, g):
    """g * exp(own - log-sum-exp) in float64; 0 where nothing was summed."""
    p = tl.exp((own.to(tl.float64) - reference.to(tl.float64)) - log.to(tl.float64))
    return tl.where(reference == -float("inf"), 0.0, p * g.to(tl.float64))


@triton.jit
def own_kernel(
    own_ptr, alike_ptr, row_ref_ptr, row_log_ptr, col_ref_ptr, col_log_ptr, pos_row_ref_ptr, pos_row_log_ptr, pos_col_ref_ptr,
    pos_col_log_ptr, g_row_ptr, g_col_ptr, g_pos_row_ptr, g_pos_col_ptr, g_positive_ptr, of_own_ptr, M, N, offset, BLOCK: tl.constexpr,
):  # fmt: skip
    """dS of the pairs (i, i + offset), from float64: their probabilities nearly cancel the gradient of the positive."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < M
    cols = rows + offset
    there = inside & (cols >= 0) & (cols < N)
    total = tl.zeros((BLOCK,), tl.float64)
    if g_positive_ptr is not None:
        total += tl.load(g_positive_ptr + rows, mask=inside, other=0.0).to(tl.float64)
    own = tl.load(own_ptr + rows, mask=inside, other=-float("inf"))
    if g_row_ptr is not None:
        reference, log = tl.load(row_ref_ptr + rows, mask=there, other=0.0), tl.load(row_log_ptr + rows, mask=there, other=0.0)
        total += _share(own, reference, log, tl.load(g_row_ptr + rows, mask=there, other=0.0))
    if g_col_ptr is not None:
        reference, log = tl.load(col_ref_ptr + cols, mask=there, other=0.0), tl.load(col_log_ptr + cols, mask=there, other=0.0)
        total += _share(own, reference, log, tl.load(g_col_ptr + cols, mask=there, other=0.0))
    if alike_ptr is not None:
        alike = tl.load(alike_ptr + rows, mask=inside, other=-float("inf"))
        if g_pos_row_ptr is not None:
            reference, log = tl.load(pos_row_ref_ptr + rows, mask=there, other=0.0), tl.load(pos_row_log_ptr + rows, mask=there, other=0.0)
            total += _share(alike, reference, log, tl.load(g_pos_row_ptr + rows, mask=there, other=0.0))
        if g_pos_col_ptr is not None:
            reference, log = tl.load(pos_col_ref_ptr + cols, mask=there, other=0.0), tl.load(pos_col_log_ptr + cols, mask=there, other=0.0)
            total += _share(alike, reference, log, tl.load(g_pos_col_ptr + cols, mask=there, other=0.0))
    tl.store(of_own_ptr + rows, total.to(tl.float32), mask=inside)
