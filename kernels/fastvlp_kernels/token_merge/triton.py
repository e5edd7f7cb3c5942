"""ToMe's matching and merging on GPUs: no sort, no atomics, no copy between host and device.

Three kernels match: similarities in tiles, with a running maximum per token; ranks by counting; and the list of the tokens of each row,
whose places are counted too. One kernel merges, reading every token and writing every row once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _ragged_triton
from .._triton import operand, upcast

# More than any segment has: by threshold, all candidates may go.
ALL = 2.0**40


def match_config(dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and launch options of the similarities."""
    if dtype == torch.float32:
        return {"BLOCK_A": 32, "BLOCK_B": 32, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_A": 64, "BLOCK_B": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}


def rank_config() -> dict[str, int]:
    """The same of the counting kernels."""
    return {"BLOCK": 64, "BLOCK_A": 64, "num_warps": 4, "num_stages": 2}


def merge_config(width: int) -> dict[str, int]:
    """The same of the kernels over rows of ``width`` features."""
    block = min(256, triton.next_power_of_2(max(width, 1)))
    return {"BLOCK_R": 2048 // block, "BLOCK_C": block, "num_warps": 4, "num_stages": 2}


@triton.jit(do_not_specialize=["protected"])
def _similarity_kernel(
    metric_ptr, cu_ptr, best_ptr, partner_ptr, D, stride, protected,
    UPCAST: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """best and partner [T], written at tokens of even place: the largest cosine with a token of odd place, and that token's place.

    D: a multiple of BLOCK_D.
    """
    segment = tl.program_id(0)
    start = tl.load(cu_ptr + segment).to(tl.int64)
    n = (tl.load(cu_ptr + segment + 1) - start).to(tl.int32)
    if tl.program_id(1) * BLOCK_A * 2 >= n:
        return
    place_a = 2 * (tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A))
    in_a = place_a < n
    p_a = metric_ptr + (start + place_a) * stride
    best = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    partner = tl.zeros((BLOCK_A,), tl.int32)
    for first in range(0, n // 2, BLOCK_B):
        place_b = 2 * (first + tl.arange(0, BLOCK_B)) + 1
        in_b = place_b < n
        p_b = metric_ptr + (start + place_b) * stride
        product = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        square_a = tl.zeros((BLOCK_A,), tl.float32)
        square_b = tl.zeros((BLOCK_B,), tl.float32)
        for d in range(0, D, BLOCK_D):
            offs = d + tl.arange(0, BLOCK_D)
            b_a = tl.load(p_a[:, None] + offs[None, :], mask=in_a[:, None], other=0.0)
            b_b = tl.load(p_b[None, :] + offs[:, None], mask=in_b[None, :], other=0.0)
            square_a += tl.sum(b_a.to(tl.float32) * b_a.to(tl.float32), 1)
            square_b += tl.sum(b_b.to(tl.float32) * b_b.to(tl.float32), 0)
            if UPCAST:
                b_a = b_a.to(tl.float32)
                b_b = b_b.to(tl.float32)
            # Exact products of float32: TF32 would match other tokens than the CPU does.
            product = tl.dot(b_a, b_b, product, input_precision="ieee")
        # Normalised after the product, so that the metric is read once and nothing of its size is written.
        fine_a = (square_a > 0) & (square_a < float("inf"))
        fine_b = (square_b > 0) & (square_b < float("inf"))
        scale_a = tl.where(fine_a, 1 / tl.sqrt(square_a), 0.0)
        scale_b = tl.where(fine_b, 1 / tl.sqrt(square_b), 0.0)
        cosine = tl.where(fine_a[:, None] & fine_b[None, :], product * scale_a[:, None] * scale_b[None, :], 0.0)
        cosine = tl.where((in_b & (place_b >= protected))[None, :], cosine, float("-inf"))
        largest, where = tl.max(cosine, 1, return_indices=True)
        partner = tl.where(largest > best, 2 * (first + where.to(tl.int32)) + 1, partner)
        best = tl.maximum(best, largest)
    tl.store(best_ptr + start + place_a, best, mask=in_a)
    tl.store(partner_ptr + start + place_a, partner, mask=in_a)


@triton.jit(do_not_specialize=["protected", "threshold"])
def _rank_kernel(
    best_ptr, partner_ptr, cu_ptr, most_ptr, target_ptr, rank_ptr, merged_ptr, protected, threshold,
    BY_THRESHOLD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """target [T], written at tokens of even place: the place of the token that it merges into, or -1; merged [S]: how many do."""
    segment = tl.program_id(0)
    start = tl.load(cu_ptr + segment).to(tl.int64)
    n = (tl.load(cu_ptr + segment + 1) - start).to(tl.int32)
    most = tl.load(most_ptr + segment)
    merged = 0
    for first in range(0, (n + 1) // 2, BLOCK):
        place = 2 * (first + tl.arange(0, BLOCK))
        free = (place < n) & (place >= protected)
        mine = tl.load(best_ptr + start + place, mask=free, other=float("-inf"))
        rank = tl.zeros((BLOCK,), tl.int32)
        for other in range(0, (n + 1) // 2, BLOCK_A):
            rival = 2 * (other + tl.arange(0, BLOCK_A))
            rival_free = (rival < n) & (rival >= protected)
            theirs = tl.load(best_ptr + start + rival, mask=rival_free, other=float("-inf"))
            # Ranked by counting who comes before, ties by place: quadratic in a segment's tokens, and still cheaper than a sort on GPUs.
            before = (theirs[None, :] > mine[:, None]) | ((theirs[None, :] == mine[:, None]) & (rival[None, :] < place[:, None]))
            rank += tl.sum((before & rival_free[None, :]).to(tl.int32), 1)
        gone = free & (rank < most)
        if BY_THRESHOLD:
            gone = gone & (mine >= threshold)
        target = tl.where(gone, tl.load(partner_ptr + start + place, mask=gone, other=0), -1)
        tl.store(target_ptr + start + place, target, mask=place < n)
        if rank_ptr is not None:
            tl.store(rank_ptr + start + place, rank, mask=free)
        merged += tl.sum(gone.to(tl.int32), 0)
    tl.store(merged_ptr + segment, merged)


@triton.jit
def _list_kernel(
    target_ptr, rank_ptr, cu_ptr, new_ptr, source_ptr, order_ptr, starts_ptr,
    KEEP_ORDER: tl.constexpr, BLOCK: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """The plan: source and order [T], starts of all rows that hold a token."""
    segment = tl.program_id(0)
    start = tl.load(cu_ptr + segment).to(tl.int64)
    n = (tl.load(cu_ptr + segment + 1) - start).to(tl.int32)
    if tl.program_id(1) * BLOCK >= n:
        return
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    target = tl.load(target_ptr + start + place, mask=inside & (place % 2 == 0), other=-1)
    gone = target >= 0
    key = tl.where(gone, target, place)
    left = tl.zeros((BLOCK,), tl.int32)  # tokens before the key that went
    listed = tl.zeros((BLOCK,), tl.int32)  # tokens that went and are listed before this one
    merged = 0
    for first in range(0, (n + 1) // 2, BLOCK_A):
        other = 2 * (first + tl.arange(0, BLOCK_A))
        to = tl.load(target_ptr + start + other, mask=other < n, other=-1)
        went = to >= 0
        left += tl.sum((went[None, :] & (other[None, :] < key[:, None])).to(tl.int32), 1)
        earlier = gone[:, None] & (to[None, :] == key[:, None]) & (other[None, :] < place[:, None])
        listed += tl.sum((went[None, :] & ((to[None, :] < key[:, None]) | earlier)).to(tl.int32), 1)
        merged += tl.sum(went.to(tl.int32), 0)
    if KEEP_ORDER:
        row = key - left
    else:
        odd = key % 2 == 1
        listed = tl.where(odd, listed, 0)
        if rank_ptr is not None:
            even_row = tl.load(rank_ptr + start + place, mask=inside & (place % 2 == 0), other=0) - merged
        else:
            even_row = key // 2 - left
        row = tl.where(odd, (n + 1) // 2 - merged + key // 2, even_row)
    first_row = tl.load(new_ptr + segment).to(tl.int64)
    # Every token counts its own place in the list, so that no two write to one and none waits for another.
    position = start + row + listed + gone.to(tl.int32)
    tl.store(source_ptr + start + place, first_row + row, mask=inside)
    tl.store(order_ptr + position, start + place, mask=inside)
    tl.store(starts_ptr + first_row + row, position, mask=inside & ~gone)


@triton.jit(do_not_specialize=["R"])
def _merge_kernel(
    x_ptr, size_ptr, order_ptr, starts_ptr, out_ptr, size_out_ptr, R, C, stride,
    MODE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [R, C] and size_out [R]: the weighted mean, the sum or the maximum of each row's tokens."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (cols < C)[None, :]
    first = tl.load(starts_ptr + rows, mask=rows < R, other=0)
    count = tl.load(starts_ptr + rows + 1, mask=rows < R, other=0) - first
    some = count > 0
    token = tl.load(order_ptr + first, mask=some, other=0)
    acc = tl.load(x_ptr + token[:, None] * stride + cols[None, :], mask=some[:, None] & in_c, other=0.0).to(tl.float32)
    if size_ptr is not None:
        total = tl.load(size_ptr + token, mask=some, other=0.0).to(tl.float32)
    else:
        total = some.to(tl.float32)
    if MODE == "mean":
        # A row of one token keeps it to the bit, without a product and a quotient.
        acc = tl.where((count > 1)[:, None], acc * total[:, None], acc)
    # As far as the fullest row of the block has tokens; the others are masked.
    for k in range(1, tl.max(count, 0)):
        more = k < count
        token = tl.load(order_ptr + first + k, mask=more, other=0)
        extra = tl.load(x_ptr + token[:, None] * stride + cols[None, :], mask=more[:, None] & in_c, other=0.0).to(tl.float32)
        if size_ptr is not None:
            weight = tl.load(size_ptr + token, mask=more, other=0.0).to(tl.float32)
        else:
            weight = more.to(tl.float32)
        total += weight
        if MODE == "amax":
            # NaN is the maximum, as in PyTorch.
            larger = more[:, None] & ((extra > acc) | (extra != extra))
            acc = tl.where(larger, extra, acc)
        elif MODE == "mean":
            acc += tl.where(more[:, None], extra * weight[:, None], 0.0)
        else:
            acc += extra
    if MODE == "mean":
        # Sizes may add up to 0, where the mean is 0 and not NaN.
        acc = tl.where((count > 1)[:, None], acc / tl.where(total > 0, total, 1.0)[:, None], acc)
    tl.store(out_ptr + rows[:, None] * C + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=(rows < R)[:, None] & in_c)
    if tl.program_id(1) == 0:
        tl.store(size_out_ptr + rows, total, mask=rows < R)


@triton.jit(do_not_specialize=["T"])
def _spread_kernel(
    grad_ptr, grad_size_ptr, x_ptr, size_ptr, out_ptr, size_out_ptr, source_ptr, starts_ptr, dx_ptr, dsize_ptr, T, C, stride_grad, stride,
    MEAN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx [T, C] and dsize [T] of means and sums: each token reads the gradient of its row."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = tokens < T
    row = tl.load(source_ptr + tokens, mask=inside, other=0)
    scale = tl.full((BLOCK_R,), 1.0, tl.float32)
    share = tl.zeros((BLOCK_R,), tl.float32)
    if MEAN:
        several = tl.load(starts_ptr + row + 1, mask=inside, other=0) - tl.load(starts_ptr + row, mask=inside, other=0) > 1
        total = tl.load(size_out_ptr + row, mask=inside, other=0.0)
        share = tl.where(several & (total > 0), 1 / total, 0.0)
        if size_ptr is not None:
            weight = tl.load(size_ptr + tokens, mask=inside, other=0.0).to(tl.float32)
        else:
            weight = tl.full((BLOCK_R,), 1.0, tl.float32)
        scale = tl.where(several, share * weight, 1.0)
    dot = tl.zeros((BLOCK_R,), tl.float32)
    for c in range(0, C, BLOCK_C):
        cols = c + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (cols < C)[None, :]
        g = tl.load(grad_ptr + row[:, None] * stride_grad + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if dx_ptr is not None:
            tl.store(dx_ptr + tokens[:, None] * C + cols[None, :], (g * scale[:, None]).to(dx_ptr.dtype.element_ty), mask=mask)
        if MEAN and dsize_ptr is not None:
            x = tl.load(x_ptr + tokens[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(out_ptr + row[:, None] * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            dot += tl.sum(g * (x - mean), 1)
    if dsize_ptr is not None:
        dsize = tl.load(grad_size_ptr + row, mask=inside, other=0.0) + tl.where(share > 0, dot * share, 0.0)
        tl.store(dsize_ptr + tokens, dsize.to(dsize_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R"])
def _first_maximum_kernel(
    grad_ptr, x_ptr, out_ptr, order_ptr, starts_ptr, dx_ptr, R, C, stride_grad, stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dx [T, C] of maxima: the first token of a row that has the maximum takes its gradient."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < R)[:, None] & (cols < C)[None, :]
    first = tl.load(starts_ptr + rows, mask=rows < R, other=0)
    count = tl.load(starts_ptr + rows + 1, mask=rows < R, other=0) - first
    g = tl.load(grad_ptr + rows[:, None] * stride_grad + cols[None, :], mask=inside, other=0.0)
    largest = tl.load(out_ptr + rows[:, None] * C + cols[None, :], mask=inside, other=0.0)
    wanted = inside
    for k in range(0, tl.max(count, 0)):
        more = k < count
        token = tl.load(order_ptr + first + k, mask=more, other=0)
        mask = inside & more[:, None]
        x = tl.load(x_ptr + token[:, None] * stride + cols[None, :], mask=mask, other=0.0)
        hit = wanted & mask & (x == largest)
        tl.store(dx_ptr + token[:, None] * C + cols[None, :], tl.where(hit, g, 0.0).to(dx_ptr.dtype.element_ty), mask=mask)
        # Equal maxima must not share the gradient, nor each take all of it.
        wanted = wanted & ~hit


def match(
    metric: Tensor, cu_seqlens: Tensor, longest: int, r: float, share: bool, each: Tensor | None, threshold: float | None,
    protected: int, keep_order: bool, ghost: int, rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """source [T], order [T], starts [rows + 1] and the new cu_seqlens. longest: the longest segment, or more."""
    T, S, device = metric.shape[0], cu_seqlens.shape[0] - 1, metric.device
    metric = operand(metric, metric.dtype)

    def new(length: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(length, dtype=dtype, device=device)

    best, partner, target = new(T, torch.float32), new(T, torch.int32), new(T, torch.int32)
    rank = new(T, torch.int32) if not keep_order and protected == 0 else None
    merged, source, order = new(S, torch.int64), new(T, torch.int64), new(T, torch.int64)
    # Rows behind the last one start at the end, and so hold no token.
    starts = torch.full((rows + 1,), T, dtype=torch.int64, device=device)
    by_threshold = threshold is not None
    with torch.cuda.device_of(metric):
        number, share = (ALL, False) if by_threshold else (r, share)
        most = _ragged_triton.counts(cu_seqlens, number, share, each, True, protected, ghost == 2)
        if T:
            options, counting = match_config(metric.dtype), rank_config()
            _similarity_kernel[(S, triton.cdiv(longest, 2 * options["BLOCK_A"]))](
                metric, cu_seqlens, best, partner, metric.shape[1], metric.stride(0), protected, UPCAST=upcast(), **options
            )
            _rank_kernel[(S,)](
                best, partner, cu_seqlens, most, target, rank, merged, protected, threshold if by_threshold else 0.0,
                BY_THRESHOLD=by_threshold, **counting,
            )  # fmt: skip
        else:
            merged.zero_()
        new_starts = _ragged_triton.starts(cu_seqlens, merged, True, ghost, rows)
        if T:
            _list_kernel[(S, triton.cdiv(longest, counting["BLOCK"]))](
                target, rank, cu_seqlens, new_starts, source, order, starts, KEEP_ORDER=keep_order, **counting
            )
    return source, order, starts, new_starts


def merge(x: Tensor, size: Tensor | None, order: Tensor, starts: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """x [R, C] in its dtype and size [R] in float32."""
    C, R = x.shape[1], starts.shape[0] - 1
    x, size = x if x.stride(1) == 1 else x.contiguous(), None if size is None else size.contiguous()
    out, size_out = x.new_empty(R, C), x.new_empty(R, dtype=torch.float32)
    if R:
        options = merge_config(C)
        grid = (triton.cdiv(R, options["BLOCK_R"]), max(1, triton.cdiv(C, options["BLOCK_C"])))
        with torch.cuda.device_of(x):
            _merge_kernel[grid](x, size, order, starts, out, size_out, R, C, x.stride(0), MODE=mode, **options)
    return out, size_out


def merge_backward(
    grad: Tensor, grad_size: Tensor, x: Tensor, size: Tensor | None, out: Tensor, size_out: Tensor, source: Tensor, order: Tensor,
    starts: Tensor, mode: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of x and size; [0] where ``needs`` says no."""
    (T, C), R = x.shape, starts.shape[0] - 1
    x, grad = (t if t.stride(1) == 1 else t.contiguous() for t in (x, grad))
    size, grad_size = None if size is None else size.contiguous(), grad_size.contiguous()
    dx = x.new_empty(x.shape if needs[0] else 0)
    dsize = (size_out if size is None else size).new_empty(T if needs[1] else 0)
    if T:
        options = merge_config(C)
        with torch.cuda.device_of(x):
            if mode == "amax" and needs[0]:
                grid = (triton.cdiv(R, options["BLOCK_R"]), max(1, triton.cdiv(C, options["BLOCK_C"])))
                _first_maximum_kernel[grid](grad, x, out, order, starts, dx, R, C, grad.stride(0), x.stride(0), **options)
            if mode != "amax" or needs[1]:
                _spread_kernel[(triton.cdiv(T, options["BLOCK_R"]),)](
                    grad, grad_size, x, size, out, size_out, source, starts, dx if needs[0] and mode != "amax" else None,
                    dsize if needs[1] else None, T, C, grad.stride(0), x.stride(0), MEAN=mode == "mean", **options,
                )  # fmt: skip
    return dx, dsize
