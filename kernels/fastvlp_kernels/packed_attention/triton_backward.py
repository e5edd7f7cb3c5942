"""Packed attention on GPUs, backward and the mass of keys: no atomics, every element has one program that owns it.

``_query_kernel`` makes dQ and the rows' sums of P * dP, then ``_key_kernel``, whose programs own a tile of keys, their dK, dV and bias
gradients (or their mass). Of short segments ``triton_short`` makes all in one program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import precision, span, tile_of, upcast
from . import triton_short
from .triton_tile import LOG2E, Side, fill, key_options, key_terms, limits, new, operands, padded, rows_of, store, tile, types_of


def query_config(dtype: torch.dtype, width: int, queries: Side, keys: Side) -> dict[str, int]:
    """Block sizes and launch options of the kernel that owns queries."""
    if dtype == torch.float32:
        return {"BLOCK_M": rows_of(queries.typical, 32), "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}
    wide, rows = width > 64, rows_of(queries.typical, 64)
    columns = rows_of(keys.typical, 64 if rows < 64 else 32)
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": 8 if wide and rows == 64 and columns == 32 else 4, "num_stages": 2}


def key_config(dtype: torch.dtype, width: int, queries: Side, keys: Side, typed: bool = False) -> dict[str, int]:
    """Block sizes and launch options of the kernel that owns keys; types of tokens, for which Ampere has no registers, read no ahead."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": rows_of(keys.typical, 32), "num_warps": 8, "num_stages": 1}
    wide, columns = width > 64, rows_of(keys.typical, 64)
    warps = 8 if wide and columns == 64 else 4
    return {"BLOCK_M": rows_of(queries.typical, 32), "BLOCK_N": columns, "num_warps": warps, "num_stages": 1 if wide or typed else 2}


@triton.jit(do_not_specialize=["S", "Tq", "Tk", "blocks", "bias_stride"])
def _query_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, size_ptr, bias_ptr, prefix_ptr, seen_ptr, kind_ptr,
    dq_ptr, delta_ptr,
    S, Tq, Tk, H, group, blocks, scale, bias_stride, stride_g, stride_q, stride_k, stride_v, head_g, head_q, head_k, head_v,
    CAUSAL: tl.constexpr, SEARCH: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta [H, Tq], the sums of P * dP over keys, and dq [Tq, H, D] if wanted."""
    head = tl.program_id(0) % H
    segment, block = tile_of(cu_q_ptr, tl.program_id(0) // H, S, blocks, SEARCH, BLOCK_M)
    first_q, n = span(cu_q_ptr, segment, Tq)
    first_k, m = span(cu_k_ptr, segment, Tk)
    in_m, in_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    grad_ptr += tl.multiple_of(head.to(tl.int64) * head_g, ALIGN)
    q_ptr += tl.multiple_of(head.to(tl.int64) * head_q, ALIGN)
    k_ptr += tl.multiple_of((head // group).to(tl.int64) * head_k, ALIGN)
    v_ptr += tl.multiple_of((head // group).to(tl.int64) * head_v, ALIGN)
    out_ptr += head.to(tl.int64) * E
    lse_ptr += head.to(tl.int64) * Tq
    delta_ptr += head.to(tl.int64) * Tq
    if bias_ptr is not None:
        bias_ptr += head.to(tl.int64) * bias_stride
    if dq_ptr is not None:
        dq_ptr += head.to(tl.int64) * D
    if dq_ptr is not None and not SEARCH:
        fill(dq_ptr, first_q, n, block, blocks, H * D, D, BLOCK_D, BLOCK_M)
    row = block * BLOCK_M
    if row < n:
        rows = row + in_m
        g = tile(grad_ptr, first_q + row, in_m, rows < n, stride_g, E, BLOCK_E, UPCAST)
        out = tile(out_ptr, first_q + row, in_m, rows < n, H * E, E, BLOCK_E, UPCAST)
        # sum_j P_ij dP_ij equals <dO_i, O_i>: one pass over the queries instead of one more over all pairs.
        delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
        tl.store(delta_ptr + (first_q + row) + in_m, delta, mask=rows < n)
        if dq_ptr is not None:
            q = tile(q_ptr, first_q + row, in_m, rows < n, stride_q, D, BLOCK_D, UPCAST)
            # +inf beside the rows makes their probabilities 0, so that they add nothing.
            lse = tl.load(lse_ptr + (first_q + row) + in_m, mask=rows < n, other=float("inf"))
            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            last = m
            if CAUSAL:
                limit = limits(prefix_ptr, segment, rows, n, m)
                last = tl.minimum(m, tl.max(limit, 0))
            if kind_ptr is not None:
                seen = types_of(seen_ptr, first_q + row, in_m, rows < n)
            for key in range(0, last, BLOCK_N):
                keys = key + in_n
                k = tile(k_ptr, first_k + key, in_n, keys < m, stride_k, D, BLOCK_D, UPCAST)
                v = tile(v_ptr, first_k + key, in_n, keys < m, stride_v, E, BLOCK_E, UPCAST)
                term, size = key_terms(size_ptr, bias_ptr, first_k + key, in_n, keys < m)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + term[None, :]
                if CAUSAL:
                    s = tl.where(keys[None, :] < limit[:, None], s, float("-inf"))
                if kind_ptr is not None:
                    kind = types_of(kind_ptr, first_k + key, in_n, keys < m)
                    s = tl.where((seen[:, None] & kind[None, :]) != 0, s, float("-inf"))
                p = tl.exp2(s - lse[:, None])
                if size_ptr is not None:
                    p *= size[None, :]
                # P is made again from the saved log-sum-exp: nothing of n x m was stored.
                ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
                acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
            store(dq_ptr, acc * scale, first_q + row, in_m, rows < n, H * D, D, BLOCK_D)


@triton.jit(do_not_specialize=["S", "Tq", "Tk", "blocks", "bias_stride"])
def _key_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, cu_q_ptr, cu_k_ptr, size_ptr, bias_ptr, prefix_ptr, seen_ptr, kind_ptr,
    dk_ptr, dv_ptr, dbias_ptr, mass_ptr,
    S, Tq, Tk, H, group, blocks, scale, bias_stride, stride_g, stride_q, stride_k, stride_v, head_g, head_q, head_k, head_v,
    CAUSAL: tl.constexpr, SEARCH: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk [Tk, H / group, D], dv [.., E], dbias and mass [H, Tk], each if wanted."""
    kv_heads = H // group
    head_kv = tl.program_id(0) % kv_heads
    segment, block = tile_of(cu_k_ptr, tl.program_id(0) // kv_heads, S, blocks, SEARCH, BLOCK_N)
    first_q, n = span(cu_q_ptr, segment, Tq)
    first_k, m = span(cu_k_ptr, segment, Tk)
    in_m, in_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k_ptr += tl.multiple_of(head_kv.to(tl.int64) * head_k, ALIGN)
    if v_ptr is not None:
        v_ptr += tl.multiple_of(head_kv.to(tl.int64) * head_v, ALIGN)
    key = block * BLOCK_N
    if key < m:
        keys = key + in_n
        k = tile(k_ptr, first_k + key, in_n, keys < m, stride_k, D, BLOCK_D, UPCAST)
        if v_ptr is not None:
            v = tile(v_ptr, first_k + key, in_n, keys < m, stride_v, E, BLOCK_E, UPCAST)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        begin = 0
        if CAUSAL:
            # Before the first query that sees a key of this tile; with a prefix it may be that all do.
            begin = tl.maximum(key + n - m, 0) // BLOCK_M * BLOCK_M
            if prefix_ptr is not None:
                begin = tl.where(key < tl.load(prefix_ptr + segment).to(tl.int32), 0, begin)
        # All query heads that share this key head, in one program: their sum needs no atomics and no memory.
        for member in range(0, group):
            head = head_kv * group + member
            at = head.to(tl.int64) * Tq + first_q
            bias_at = bias_ptr
            if bias_ptr is not None:
                bias_at += head.to(tl.int64) * bias_stride
            term, size = key_terms(size_ptr, bias_at, first_k + key, in_n, keys < m)
            sums = tl.zeros((BLOCK_N,), tl.float32)
            for row in range(begin, n, BLOCK_M):
                rows = row + in_m
                q_at = q_ptr + tl.multiple_of(head.to(tl.int64) * head_q, ALIGN)
                q = tile(q_at, first_q + row, in_m, rows < n, stride_q, D, BLOCK_D, UPCAST)
                lse = tl.load(lse_ptr + (at + row) + in_m, mask=rows < n, other=float("inf"))
                # Transposed from the start, since dK and dV have the keys as rows.
                s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) + term[:, None]
                if CAUSAL:
                    s = tl.where(keys[:, None] < limits(prefix_ptr, segment, rows, n, m)[None, :], s, float("-inf"))
                if kind_ptr is not None:
                    kind = types_of(kind_ptr, first_k + key, in_n, keys < m)
                    seen = types_of(seen_ptr, first_q + row, in_m, rows < n)
                    s = tl.where((kind[:, None] & seen[None, :]) != 0, s, float("-inf"))
                p = tl.exp2(s - lse[None, :])
                if size_ptr is not None:
                    p *= size[:, None]
                if mass_ptr is not None:
                    sums += tl.sum(p, 1)
                else:
                    g_at = grad_ptr + tl.multiple_of(head.to(tl.int64) * head_g, ALIGN)
                    g = tile(g_at, first_q + row, in_m, rows < n, stride_g, E, BLOCK_E, UPCAST)
                    if dv_ptr is not None:
                        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
                    if v_ptr is not None:
                        dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
                        delta = tl.load(delta_ptr + (at + row) + in_m, mask=rows < n, other=0.0)
                        ds = p * (dp - delta[None, :])
                        if dbias_ptr is not None:
                            sums += tl.sum(ds, 1)
                        if dk_ptr is not None:
                            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            if dbias_ptr is not None:
                tl.store(dbias_ptr + head.to(tl.int64) * Tk + (first_k + key) + in_n, sums, mask=keys < m)
                if not SEARCH:
                    fill(dbias_ptr + head.to(tl.int64) * Tk, first_k, m, block, blocks, 1, 1, 1, BLOCK_N)
            if mass_ptr is not None:
                tl.store(mass_ptr + head.to(tl.int64) * Tk + (first_k + key) + in_n, sums, mask=keys < m)
                if not SEARCH:
                    fill(mass_ptr + head.to(tl.int64) * Tk, first_k, m, block, blocks, 1, 1, 1, BLOCK_N)
        if dk_ptr is not None:
            store(dk_ptr + head_kv.to(tl.int64) * D, dk * scale, first_k + key, in_n, keys < m, kv_heads * D, D, BLOCK_D)
        if dv_ptr is not None:
            store(dv_ptr + head_kv.to(tl.int64) * E, dv, first_k + key, in_n, keys < m, kv_heads * E, E, BLOCK_E)
        if dk_ptr is not None and not SEARCH:
            fill(dk_ptr + head_kv.to(tl.int64) * D, first_k, m, block, blocks, kv_heads * D, D, BLOCK_D, BLOCK_N)
        if dv_ptr is not None and not SEARCH:
            fill(dv_ptr + head_kv.to(tl.int64) * E, first_k, m, block, blocks, kv_heads * E, E, BLOCK_E, BLOCK_N)


def key_mass(
    q: Tensor, k: Tensor, lse: Tensor, queries: Side, keys: Side, key_size: Tensor | None, key_bias: Tensor | None,
    prefix_len: Tensor | None, causal: bool, scale: float, seen: Tensor | None, kind: Tensor | None,
) -> Tensor:
    """float32 [Tk]: the probabilities of every key, summed over queries and heads."""
    (Tq, H, D), Tk = q.shape, keys.tokens
    # Zeros, since keys behind the last segment have no program.
    mass = torch.zeros(H, Tk, dtype=torch.float32, device=q.device)
    if Tq and Tk and queries.segments:
        (qs, ks), align = operands(q, k)
        size, bias, bias_stride = key_options(k, key_size, key_bias)
        options = key_config(q.dtype, D, queries, keys, kind is not None)
        tiles, blocks, search = keys.tiles(options["BLOCK_N"])
        with torch.cuda.device_of(q):
            _key_kernel[(tiles * k.shape[1],)](
                None, qs, ks, None, lse, None, queries.cu, keys.cu, size, bias, prefix_len, seen, kind,
                None, None, None, mass, queries.segments, Tq, Tk, H, H // k.shape[1], blocks, scale, bias_stride,
                0, qs.stride(0), ks.stride(0), 0, 0, qs.stride(1), ks.stride(1), 0, CAUSAL=causal, SEARCH=search, ALIGN=align,
                PRECISION=precision(), UPCAST=upcast(), D=D, E=D, BLOCK_D=padded(D), BLOCK_E=padded(D), **options,
            )  # fmt: skip
    # Heads are added here, in one order; inside the kernel it would take atomics.
    return mass.sum(0)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int | None,
    max_k: int | None, key_size: Tensor | None, key_bias: Tensor | None, prefix_len: Tensor | None, causal: bool, scale: float,
    needs: list[bool], whole: bool, seen: Tensor | None = None, kind: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and key_bias; [0] where ``needs`` says no. ``whole``: cu_q and cu_k are known to end at Tq and Tk."""
    (Tq, H, D), E, Tk = q.shape, v.shape[2], k.shape[0]
    queries, keys = Side(cu_q, Tq, max_q), Side(cu_k, Tk, max_k)
    dq, dk, dv = (new(x, whole, *(x.shape if need else (0,))) for x, need in zip((q, k, v), needs, strict=False))
    dbias = new(q, whole, *((H, Tk) if needs[3] else (0,)), dtype=torch.float32)
    if queries.segments and Tq + Tk:
        (gs, qs, ks, vs), align = operands(grad, q, k, v)
        size, bias, bias_stride = key_options(k, key_size, key_bias)
        through_scores = needs[0] or needs[1] or needs[3]
        made = (dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None, dbias if needs[3] else None)
        terms = (scale, bias_stride, *(x.stride(axis) for axis in (0, 1) for x in (gs, qs, ks, vs)))
        fixed = {"CAUSAL": causal, "ALIGN": align, "PRECISION": precision(), "UPCAST": upcast(),
                 "D": D, "E": E, "BLOCK_D": padded(D), "BLOCK_E": padded(E)}  # fmt: skip
        sizes = (queries.segments, Tq, Tk, H, H // k.shape[1])
        short = triton_short.backward_config(q.dtype, max(D, E), queries, keys) if through_scores else None
        with torch.cuda.device_of(q):
            if short is not None:
                triton_short._short_backward_kernel[(queries.segments * k.shape[1],)](
                    gs, qs, ks, vs, lse, cu_q, cu_k, size, bias, prefix_len, seen, kind, *made, *sizes[1:], *terms, **fixed, **short
                )
            else:
                delta = torch.empty(H * Tq if through_scores else 0, dtype=torch.float32, device=q.device)
                if through_scores:
                    rows = query_config(q.dtype, max(D, E), queries, keys)
                    tiles, blocks, search = queries.tiles(rows["BLOCK_M"])
                    _query_kernel[(tiles * H,)](
                        gs, qs, ks, vs, out, lse, cu_q, cu_k, size, bias, prefix_len, seen, kind, made[0], delta,
                        *sizes, blocks, *terms, SEARCH=search, **fixed, **rows,
                    )  # fmt: skip
                if needs[1] or needs[2] or needs[3]:
                    options = key_config(q.dtype, max(D, E), queries, keys, kind is not None)
                    tiles, blocks, search = keys.tiles(options["BLOCK_N"])
                    _key_kernel[(tiles * k.shape[1],)](
                        gs, qs, ks, vs if through_scores else None, lse, delta, cu_q, cu_k, size, bias, prefix_len, seen, kind,
                        *made[1:], None, *sizes, blocks, *terms, SEARCH=search, **fixed, **options,
                    )  # fmt: skip
    if key_bias is not None and needs[3]:
        dbias = (dbias.sum(0) if key_bias.ndim == 1 else dbias).to(key_bias.dtype)
    return dq, dk, dv, dbias
