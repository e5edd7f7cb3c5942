"""Packed attention on GPUs of short segments: a program reads the keys of a segment and head once and keeps them on chip.

In backward it makes every probability once, sums P * dP itself, and needs neither the output nor atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .._triton import span
from .triton_tile import LOG2E, Side, attend, fill, finish, key_terms, limits, rows_of, store, tile, types_of

PROGRAMS = 512  # with fewer, GPUs have idle processors: the queries of a segment are shared out between programs


def config(dtype: torch.dtype, width: int, queries: Side, keys: Side, causal: bool, terms: bool) -> dict[str, Any] | None:
    """Block sizes and launch options for heads of ``width``, or None where keys are too many for one program."""
    wide = width > 64
    if dtype == torch.float32:
        return None
    # A causal loop leaves out the tiles that no query sees, which is more than what reading keys once saves. More keys than these,
    # with ``terms`` (sizes or biases) to add to their scores, do not fit into the registers of all GPUs.
    whole = keys.whole(128 if wide or causal else 192 if terms else 256)
    if not whole:
        return None
    tiles = {192: 3, 256: 2}.get(whole, 1)
    # 64 rows of several tiles of keys spill on Hopper or Blackwell.
    rows, columns = rows_of(queries.typical, 64 if tiles == 1 else 32), whole // tiles
    if wide:
        warps = 8 if causal and columns == 128 else 4
    else:
        warps = 4 if tiles > 1 or rows * columns > 2048 else 2 if rows * columns > 512 else 1
    one = queries.longest is not None and queries.longest <= rows
    return {"ONE": one, "TILES": tiles, "BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps, "num_stages": 1}


def parts(queries: Side, heads: int, rows: int) -> int:
    """How many programs of forward share the queries of a segment and head, which ``rows`` of them make a tile."""
    # Few segments with many queries would leave processors idle; each further program reads the keys once more.
    wanted = max(triton.cdiv(PROGRAMS, queries.segments * heads), triton.cdiv(queries.typical, 512))
    return max(1, min(wanted, triton.cdiv(queries.typical, rows)))


@triton.jit(do_not_specialize=["Tq", "Tk", "parts", "bias_stride"])
def _short_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, size_ptr, bias_ptr, prefix_ptr, seen_ptr, kind_ptr, out_ptr, lse_ptr,
    Tq, Tk, H, group, parts, scale, bias_stride, stride_q, stride_k, stride_v, head_q, head_k, head_v,
    CAUSAL: tl.constexpr, ONE: tl.constexpr, TILES: tl.constexpr, ALIGN: tl.constexpr,
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
        # A program without queries reads no keys.
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
        # Read again, so that the terms of all keys are not kept in registers from one tile of queries to the next.
        m = span(cu_k_ptr, segment, Tk)[1]
        if CAUSAL:
            limit = limits(prefix_ptr, segment, rows, n, m)
        if kind_ptr is not None:
            seen = types_of(seen_ptr, first_q + row, in_m, inside)
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        for i in tl.static_range(TILES):
            keys = i * BLOCK_N + in_n
            term, size = key_terms(size_ptr, bias_ptr, first_k + i * BLOCK_N, in_n, keys < m)
            s = tl.dot(q, tl.trans(ks[i]), input_precision=PRECISION) * scale + term[None, :]
            if CAUSAL:
                s = tl.where(keys[None, :] < limit[:, None], s, float("-inf"))
            if kind_ptr is not None:
                kind = types_of(kind_ptr, first_k + i * BLOCK_N, in_n, keys < m)
                s = tl.where((seen[:, None] & kind[None, :]) != 0, s, float("-inf"))
            highest, total, acc = attend(s, vs[i], size_ptr, size, highest, total, acc, PRECISION)
        finish(out_ptr, lse_ptr, highest, total, acc, first_q + row, in_m, inside, H, E, BLOCK_E)
    if ONE:
        fill(out_ptr, first_q, n, 0, 1, H * E, E, BLOCK_E, BLOCK_M)
        fill(lse_ptr, first_q, n, 0, 1, 1, 1, 1, BLOCK_M)


def backward_config(dtype: torch.dtype, width: int, queries: Side, keys: Side) -> dict[str, Any] | None:
    """Block sizes and launch options for heads of ``width``, or None where keys are too many for one program."""
    wide = width > 64
    if dtype == torch.float32:
        return None
    columns = keys.whole(64 if wide else 128)
    if not columns:
        return None
    rows = rows_of(queries.typical, 32)
    warps = 8 if columns == 128 or (columns == 64 and wide) else 1 if rows * columns <= 256 and not wide else 4
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps, "num_stages": 1}


@triton.jit(do_not_specialize=["Tq", "Tk", "bias_stride"])
def _short_backward_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, size_ptr, bias_ptr, prefix_ptr, seen_ptr, kind_ptr,
    dq_ptr, dk_ptr, dv_ptr, dbias_ptr,
    Tq, Tk, H, group, scale, bias_stride, stride_g, stride_q, stride_k, stride_v, head_g, head_q, head_k, head_v,
    CAUSAL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq [Tq, H, D], dk [Tk, H / group, D], dv [.., E] and dbias [H, Tk], each if wanted. Scores are [keys, queries] here."""
    kv_heads = H // group
    head_kv = tl.program_id(0) % kv_heads
    segment = tl.program_id(0) // kv_heads
    in_m, in_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k_ptr += tl.multiple_of(head_kv.to(tl.int64) * head_k, ALIGN)
    v_ptr += tl.multiple_of(head_kv.to(tl.int64) * head_v, ALIGN)
    first_q, n = span(cu_q_ptr, segment, Tq)
    first_k, m = span(cu_k_ptr, segment, Tk)
    k = tile(k_ptr, first_k, in_n, in_n < m, stride_k, D, BLOCK_D, UPCAST)
    v = tile(v_ptr, first_k, in_n, in_n < m, stride_v, E, BLOCK_E, UPCAST)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for member in range(0, group):
        head = head_kv * group + member
        bias_at = bias_ptr
        if bias_ptr is not None:
            bias_at += head.to(tl.int64) * bias_stride
        term, size = key_terms(size_ptr, bias_at, first_k, in_n, in_n < m)
        sums = tl.zeros((BLOCK_N,), tl.float32)
        for row in range(0, n, BLOCK_M):
            rows = row + in_m
            q_at = q_ptr + tl.multiple_of(head.to(tl.int64) * head_q, ALIGN)
            g_at = grad_ptr + tl.multiple_of(head.to(tl.int64) * head_g, ALIGN)
            q = tile(q_at, first_q + row, in_m, rows < n, stride_q, D, BLOCK_D, UPCAST)
            g = tile(g_at, first_q + row, in_m, rows < n, stride_g, E, BLOCK_E, UPCAST)
            lse = tl.load(lse_ptr + head.to(tl.int64) * Tq + (first_q + row) + in_m, mask=rows < n, other=float("inf"))
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) + term[:, None]
            if CAUSAL:
                s = tl.where(in_n[:, None] < limits(prefix_ptr, segment, rows, n, m)[None, :], s, float("-inf"))
            if kind_ptr is not None:
                kind = types_of(kind_ptr, first_k, in_n, in_n < m)
                seen = types_of(seen_ptr, first_q + row, in_m, rows < n)
                s = tl.where((kind[:, None] & seen[None, :]) != 0, s, float("-inf"))
            p = tl.exp2(s - lse[None, :])
            if size_ptr is not None:
                p *= size[:, None]
            if dv_ptr is not None:
                dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
            ds = p * (dp - tl.sum(p * dp, 0)[None, :])
            if dbias_ptr is not None:
                sums += tl.sum(ds, 1)
            if dk_ptr is not None:
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            if dq_ptr is not None:
                dq = tl.dot(tl.trans(ds.to(k.dtype)), k, input_precision=PRECISION) * scale
                store(dq_ptr + head.to(tl.int64) * D, dq, first_q + row, in_m, rows < n, H * D, D, BLOCK_D)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + head.to(tl.int64) * Tk + first_k + in_n, sums, mask=in_n < m)
            fill(dbias_ptr + head.to(tl.int64) * Tk, first_k, m, 0, 1, 1, 1, 1, BLOCK_N)
    if dk_ptr is not None:
        store(dk_ptr + head_kv.to(tl.int64) * D, dk * scale, first_k, in_n, in_n < m, kv_heads * D, D, BLOCK_D)
        fill(dk_ptr + head_kv.to(tl.int64) * D, first_k, m, 0, 1, kv_heads * D, D, BLOCK_D, BLOCK_N)
    if dv_ptr is not None:
        store(dv_ptr + head_kv.to(tl.int64) * E, dv, first_k, in_n, in_n < m, kv_heads * E, E, BLOCK_E)
        fill(dv_ptr + head_kv.to(tl.int64) * E, first_k, m, 0, 1, kv_heads * E, E, BLOCK_E, BLOCK_N)
