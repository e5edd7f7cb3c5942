"""Packed attention on GPUs, forward, of short segments: a program reads the keys of a segment and head once and keeps them on chip.

Segments that would fill less than half as much of tiles of their own are stacked: a program has all segments that start in a window of
65 - longest tokens, which fit into one tile of 64 tokens as they lie in memory; scores between segments are masked.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .triton import LOG2E, Side, attend, fill, finish, key_terms, limits, rows_of, span, tile

STACKED = 64  # tokens of a tile of several segments
PROGRAMS = 512  # with fewer, GPUs have idle processors: the queries of a segment are shared out between programs


def config(dtype: torch.dtype, width: int, queries: Side, keys: Side, causal: bool, terms: bool) -> dict[str, Any] | None:
    """Block sizes and launch options for heads of ``width``, or None where keys are too many for one program."""
    wide = width > 64
    if dtype == torch.float32:
        return None
    if window(queries, keys):
        return {"STACK": True, "ONE": True, "TILES": 1, "BLOCK_M": STACKED, "BLOCK_N": STACKED, "num_warps": 4, "num_stages": 1}
    # A causal loop leaves out the tiles that no query sees, which is more than what reading keys once saves. More keys than these,
    # with ``terms`` (sizes or biases) to add to their scores, do not fit into the registers of all GPUs.
    whole = keys.whole(128 if wide or causal else 192 if terms else 256)
    if not whole:
        return None
    tiles = {192: 3, 256: 2}.get(whole, 1)
    rows, columns = rows_of(queries.typical, 64), whole // tiles
    if wide:
        warps = 8 if causal and columns == 128 else 4
    else:
        warps = 4 if rows * columns > 2048 else 2 if rows * columns > 512 else 1
    one = queries.longest is not None and queries.longest <= rows
    return {"STACK": False, "ONE": one, "TILES": tiles, "BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps, "num_stages": 1}


def window(queries: Side, keys: Side) -> int:
    """How many tokens apart tiles of stacked segments begin, or 0 where segments should not be stacked."""
    if queries.longest is None or not 0 < queries.longest <= STACKED // 2 or queries.cu.data_ptr() != keys.cu.data_ptr():
        return 0
    apart = STACKED + 1 - queries.longest
    rows = triton.cdiv(queries.tokens, apart) * STACKED
    return apart if 2 * rows < queries.segments * rows_of(queries.longest, STACKED) else 0


def stacking(queries: Side, keys: Side) -> tuple[int, int, int]:
    """What the kernels know of stacked segments: the steps in which one is found, the window, the longest segment."""
    return max(0, queries.segments - 1).bit_length(), window(queries, keys), queries.longest or 0


def programs(queries: Side, keys: Side, heads: int, options: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Programs per head; how many of them share a segment's queries, and ``stacking``."""
    known = stacking(queries, keys)
    if options["STACK"]:
        return triton.cdiv(queries.tokens, known[1]), (1, *known)
    parts = max(triton.cdiv(PROGRAMS, queries.segments * heads), triton.cdiv(queries.typical, 512))
    parts = max(1, min(parts, triton.cdiv(queries.typical, options["BLOCK_M"])))
    return queries.segments * parts, (parts, *known)


@triton.jit
def finite(x):
    """x with 0 for what is not finite, and per row 0, or NaN where something was not: NaN times a masked 0 would reach other segments."""
    zero = x.to(tl.float32) * 0.0
    return tl.where(zero == 0.0, x, 0.0).to(x.dtype), tl.sum(zero, 1)


@triton.jit
def stacked(cu_ptr, prefix_ptr, S, T, steps, first, window, longest, rows, CAUSAL: tl.constexpr):
    """For the tokens first + rows: whether the program has them, the first key that they see, what is behind the last, and 0.

    A segment that is longer than it may be has NaN instead of 0, and its tokens belong to the programs in whose windows they lie.
    """
    low = tl.zeros_like(rows)
    high = low + S
    for _ in range(0, steps):
        middle = (low + high) // 2
        before = tl.load(cu_ptr + middle).to(tl.int32) <= first + rows
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    begin = tl.load(cu_ptr + low).to(tl.int32) - first
    end = tl.minimum(tl.load(cu_ptr + low + 1).to(tl.int32), T) - first
    long = end - begin > longest
    mine = (rows < end) & tl.where(long, rows < window, (begin >= 0) & (begin < window))
    if CAUSAL:
        limit = rows + 1
        if prefix_ptr is not None:
            limit = tl.maximum(limit, begin + tl.load(prefix_ptr + low).to(tl.int32))
        end = tl.minimum(end, limit)
    return mine, begin, tl.where(mine, end, 0), tl.where(long, float("nan"), 0.0)


@triton.jit(do_not_specialize=["S", "Tq", "Tk", "parts", "steps", "window", "longest", "bias_stride"])
def _short_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, size_ptr, bias_ptr, prefix_ptr, out_ptr, lse_ptr,
    S, Tq, Tk, H, group, parts, steps, window, longest, scale, bias_stride, stride_q, stride_k, stride_v, head_q, head_k, head_v,
    CAUSAL: tl.constexpr, STACK: tl.constexpr, ONE: tl.constexpr, TILES: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [Tq, H, E] and lse [H, Tq] as of the kernel for long segments, from TILES * BLOCK_N keys. ONE: queries are one tile."""
    head = tl.program_id(0) % H
    place = tl.program_id(0) // H
    in_m, in_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    q_ptr += tl.multiple_of(head.to(tl.int64) * head_q, ALIGN)
    k_ptr += tl.multiple_of((head // group).to(tl.int64) * head_k, ALIGN)
    v_ptr += tl.multiple_of((head // group).to(tl.int64) * head_v, ALIGN)
    out_ptr += head.to(tl.int64) * E
    lse_ptr += head.to(tl.int64) * Tq
    if bias_ptr is not None:
        bias_ptr += head.to(tl.int64) * bias_stride
    scale *= LOG2E
    if STACK:
        first_q = place * window
        first_k = first_q
        n = tl.minimum(BLOCK_M, Tq - first_q)
        m = n
    else:
        segment = place // parts
        first_q, n = span(cu_q_ptr, segment, Tq)
        first_k, m = span(cu_k_ptr, segment, Tk)
        scale = tl.where(m > TILES * BLOCK_N, float("nan"), scale)
    if ONE:
        start = 0
        stop = BLOCK_M
        step = BLOCK_M
    else:
        start = place % parts * BLOCK_M
        m = tl.where(start < n, m, 0)
        stop = n
        step = parts * BLOCK_M
    ks, vs = (), ()  # type: tuple[Any, ...], tuple[Any, ...]
    for i in tl.static_range(TILES):
        keys = i * BLOCK_N + in_n
        ks += (tile(k_ptr, first_k + i * BLOCK_N, in_n, keys < m, stride_k, D, BLOCK_D, UPCAST),)
        vs += (tile(v_ptr, first_k + i * BLOCK_N, in_n, keys < m, stride_v, E, BLOCK_E, UPCAST),)
    for row in range(start, stop, step):
        rows = row + in_m
        inside = rows < n
        q = tile(q_ptr, first_q + row, in_m, inside, stride_q, D, BLOCK_D, UPCAST)
        if STACK:
            inside, begin, end, long = stacked(cu_q_ptr, prefix_ptr, S, Tq, steps, first_q, window, longest, rows, CAUSAL)
        else:
            # Read again, so that the terms of all keys are not kept in registers from one tile of queries to the next.
            m = span(cu_k_ptr, segment, Tk)[1]
            if CAUSAL:
                limit = limits(prefix_ptr, segment, rows, n, m)
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        for i in tl.static_range(TILES):
            keys = i * BLOCK_N + in_n
            v = vs[i]
            term, size = key_terms(size_ptr, bias_ptr, first_k + i * BLOCK_N, in_n, keys < m)
            if STACK:
                v, bad = finite(v)
                zero = size * 0.0
                term += bad + zero
                size = tl.where(zero == 0.0, size, 0.0)
            s = tl.dot(q, tl.trans(ks[i]), input_precision=PRECISION) * scale + term[None, :]
            if STACK:
                s = tl.where((keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None]), s + long[:, None], float("-inf"))
            elif CAUSAL:
                s = tl.where(keys[None, :] < limit[:, None], s, float("-inf"))
            highest, total, acc = attend(s, v, size_ptr, size, highest, total, acc, PRECISION)
        finish(out_ptr, lse_ptr, highest, total, acc, first_q + row, in_m, inside, H, E, BLOCK_E)
    if ONE and not STACK:
        fill(out_ptr, first_q, n, 0, 1, H * E, E, BLOCK_E, BLOCK_M)
        fill(lse_ptr, first_q, n, 0, 1, 1, 1, 1, BLOCK_M)
