"""Packed attention on GPUs, backward, of short segments: dQ, dK, dV and the bias gradients of a segment and key head in one program.

The program holds all keys, so it makes every probability once, sums P * dP itself, and needs neither the output nor atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .triton import LOG2E, Side, fill, key_terms, limits, rows_of, span, store, tile
from .triton_short import STACKED, finite, stacked, window


def config(dtype: torch.dtype, width: int, queries: Side, keys: Side) -> dict[str, Any] | None:
    """Block sizes and launch options for heads of ``width``, or None where keys are too many for one program."""
    wide = width > 64
    if dtype == torch.float32:
        return None
    if window(queries, keys):
        return {"STACK": True, "BLOCK_M": 32, "BLOCK_N": STACKED, "num_warps": 8 if wide else 4, "num_stages": 1}
    columns = keys.whole(64 if wide else 128)
    if not columns:
        return None
    rows = rows_of(queries.typical, 32)
    warps = 8 if columns == 128 or (columns == 64 and wide) else 1 if rows * columns <= 256 and not wide else 4
    return {"STACK": False, "BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps, "num_stages": 1}


@triton.jit(do_not_specialize=["S", "Tq", "Tk", "steps", "window", "longest", "bias_stride"])
def _short_backward_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, size_ptr, bias_ptr, prefix_ptr, dq_ptr, dk_ptr, dv_ptr, dbias_ptr,
    S, Tq, Tk, H, group, steps, window, longest,
    scale, bias_stride, stride_g, stride_q, stride_k, stride_v, head_g, head_q, head_k, head_v,
    CAUSAL: tl.constexpr, STACK: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq [Tq, H, D], dk [Tk, H / group, D], dv [.., E] and dbias [H, Tk], each if wanted. Scores are [keys, queries] here."""
    kv_heads = H // group
    head_kv = tl.program_id(0) % kv_heads
    place = tl.program_id(0) // kv_heads
    in_m, in_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k_ptr += tl.multiple_of(head_kv.to(tl.int64) * head_k, ALIGN)
    v_ptr += tl.multiple_of(head_kv.to(tl.int64) * head_v, ALIGN)
    if STACK:
        first_q = place * window
        first_k = first_q
        n = tl.minimum(BLOCK_N, Tq - first_q)
        m = n
    else:
        first_q, n = span(cu_q_ptr, place, Tq)
        first_k, m = span(cu_k_ptr, place, Tk)
    k = tile(k_ptr, first_k, in_n, in_n < m, stride_k, D, BLOCK_D, UPCAST)
    v = tile(v_ptr, first_k, in_n, in_n < m, stride_v, E, BLOCK_E, UPCAST)
    if STACK:
        own = stacked(cu_q_ptr, prefix_ptr, S, Tq, steps, first_q, window, longest, in_n, CAUSAL)[0]
        k, bad_k = finite(k)
        v, bad_v = finite(v)
        bad = bad_k + bad_v
    else:
        own = in_n < m
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
            mine = rows < n
            if STACK:
                mine, begin, end, long = stacked(cu_q_ptr, prefix_ptr, S, Tq, steps, first_q, window, longest, rows, CAUSAL)
                seen = (in_n[:, None] >= begin[None, :]) & (in_n[:, None] < end[None, :])
            q_at = q_ptr + tl.multiple_of(head.to(tl.int64) * head_q, ALIGN)
            g_at = grad_ptr + tl.multiple_of(head.to(tl.int64) * head_g, ALIGN)
            q = tile(q_at, first_q + row, in_m, mine, stride_q, D, BLOCK_D, UPCAST)
            g = tile(g_at, first_q + row, in_m, mine, stride_g, E, BLOCK_E, UPCAST)
            lse = tl.load(lse_ptr + head.to(tl.int64) * Tq + (first_q + row) + in_m, mask=mine, other=float("inf"))
            if STACK:
                q, bad_q = finite(q)
                g, bad_g = finite(g)
                lse += bad_q + bad_g
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) + term[:, None]
            if CAUSAL and not STACK:
                s = tl.where(in_n[:, None] < limits(prefix_ptr, place, rows, n, m)[None, :], s, float("-inf"))
            p = tl.exp2(s - lse[None, :])
            if size_ptr is not None:
                p *= size[:, None]
            if STACK:
                p = tl.where(seen, p + bad[:, None], 0.0)
            if dv_ptr is not None:
                dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
            if STACK:
                dp = tl.where(seen, dp, 0.0)
            ds = p * (dp - tl.sum(p * dp, 0)[None, :])
            if STACK:
                ds = tl.where(seen, ds, 0.0)
            if dbias_ptr is not None:
                sums += tl.sum(ds, 1)
            if dk_ptr is not None:
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            if dq_ptr is not None:
                dq = tl.dot(tl.trans(ds.to(k.dtype)), k, input_precision=PRECISION) * scale
                store(dq_ptr + head.to(tl.int64) * D, dq, first_q + row, in_m, mine, H * D, D, BLOCK_D)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + head.to(tl.int64) * Tk + first_k + in_n, sums, mask=own)
            if not STACK:
                fill(dbias_ptr + head.to(tl.int64) * Tk, first_k, m, 0, 1, 1, 1, 1, BLOCK_N)
    if dk_ptr is not None:
        store(dk_ptr + head_kv.to(tl.int64) * D, dk * scale, first_k, in_n, own, kv_heads * D, D, BLOCK_D)
    if dv_ptr is not None:
        store(dv_ptr + head_kv.to(tl.int64) * E, dv, first_k, in_n, own, kv_heads * E, E, BLOCK_E)
    if not STACK:
        if dk_ptr is not None:
            fill(dk_ptr + head_kv.to(tl.int64) * D, first_k, m, 0, 1, kv_heads * D, D, BLOCK_D, BLOCK_N)
        if dv_ptr is not None:
            fill(dv_ptr + head_kv.to(tl.int64) * E, first_k, m, 0, 1, kv_heads * E, E, BLOCK_E, BLOCK_N)
