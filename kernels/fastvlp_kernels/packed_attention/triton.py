"""Packed attention on GPUs, forward: a program per tile of a segment's queries and head. Short segments: ``triton_short``.

Tiles begin where segments begin, so that a short segment costs one small program and no product with its neighbours. Which segment a
program has follows from the longest length; where that is not known, or few segments are that long, by a binary search: segment s owns
the slots from cu[s] // BLOCK + s on, which are enough for its tiles whatever the lengths are. Lengths are read on the device alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import precision, span, tile_of, upcast
from . import triton_short
from .triton_backward import key_mass
from .triton_tile import (
    LOG2E,
    Side,
    attend,
    fill,
    finish,
    key_options,
    key_terms,
    limits,
    new,
    operands,
    padded,
    rows_of,
    tile,
    types_of,
)  # fmt: skip


def config(dtype: torch.dtype, width: int, queries: Side, keys: Side, typed: bool = False) -> dict[str, int]:
    """Block sizes and launch options of the forward pass for heads of ``width``; types of tokens take registers."""
    if dtype == torch.float32:
        rows, columns = rows_of(queries.typical, 32), rows_of(keys.typical, 32)
        return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": 8 if typed else 4, "num_stages": 2}
    wide = width > 64
    rows = rows_of(queries.typical, 128 if queries.typical > 512 else 64)
    columns = rows_of(keys.typical, 32 if wide and rows == 128 else 64)
    if rows * columns <= 2048 and not wide:
        warps = 1 if rows * columns <= 512 else 2
    else:
        warps = 8 if rows == 128 or (wide and rows == 64) else 4
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps, "num_stages": 2 if wide else 3}


@triton.jit(do_not_specialize=["S", "Tq", "Tk", "blocks", "bias_stride"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, size_ptr, bias_ptr, prefix_ptr, seen_ptr, kind_ptr, out_ptr, lse_ptr,
    S, Tq, Tk, H, group, blocks, scale, bias_stride, stride_q, stride_k, stride_v, head_q, head_k, head_v,
    CAUSAL: tl.constexpr, SEARCH: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [Tq, H, E] and lse [H, Tq], the logarithms to base 2 of the sums (+inf for a query without keys)."""
    # Heads are neighbours: they read the same tokens, which lie in one row, while these are in the cache.
    head = tl.program_id(0) % H
    segment, block = tile_of(cu_q_ptr, tl.program_id(0) // H, S, blocks, SEARCH, BLOCK_M)
    first_q, n = span(cu_q_ptr, segment, Tq)
    first_k, m = span(cu_k_ptr, segment, Tk)
    in_m, in_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    q_ptr += tl.multiple_of(head.to(tl.int64) * head_q, ALIGN)
    k_ptr += tl.multiple_of((head // group).to(tl.int64) * head_k, ALIGN)
    v_ptr += tl.multiple_of((head // group).to(tl.int64) * head_v, ALIGN)
    out_ptr += head.to(tl.int64) * E
    lse_ptr += head.to(tl.int64) * Tq
    if bias_ptr is not None:
        bias_ptr += head.to(tl.int64) * bias_stride
    # To base 2 from here on: exp2 is one instruction.
    scale *= LOG2E
    if not SEARCH:
        # A segment longer than the caller promised would be cut silently: NaN tells instead.
        scale = tl.where(n > blocks * BLOCK_M, float("nan"), scale)
        fill(out_ptr, first_q, n, block, blocks, H * E, E, BLOCK_E, BLOCK_M)
        fill(lse_ptr, first_q, n, block, blocks, 1, 1, 1, BLOCK_M)
    row = block * BLOCK_M
    if row < n:
        rows = row + in_m
        q = tile(q_ptr, first_q + row, in_m, rows < n, stride_q, D, BLOCK_D, UPCAST)
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        last = m
        if CAUSAL:
            limit = limits(prefix_ptr, segment, rows, n, m)
            # Tiles of keys that no query of this tile sees are never read.
            last = tl.minimum(m, tl.max(limit, 0))
        if kind_ptr is not None:
            seen = types_of(seen_ptr, first_q + row, in_m, rows < n)
        for key in range(0, last, BLOCK_N):
            keys = key + in_n
            k = tile(k_ptr, first_k + key, in_n, keys < m, stride_k, D, BLOCK_D, UPCAST)
            v = tile(v_ptr, first_k + key, in_n, keys < m, stride_v, E, BLOCK_E, UPCAST)
            term, size = key_terms(size_ptr, bias_ptr, first_k + key, in_n, keys < m)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + term[None, :]
            if CAUSAL:
                s = tl.where(keys[None, :] < limit[:, None], s, float("-inf"))
            if kind_ptr is not None:
                kind = types_of(kind_ptr, first_k + key, in_n, keys < m)
                s = tl.where((seen[:, None] & kind[None, :]) != 0, s, float("-inf"))
            highest, total, acc = attend(s, v, size_ptr, size, highest, total, acc, PRECISION)
        finish(out_ptr, lse_ptr, highest, total, acc, first_q + row, in_m, rows < n, H, E, BLOCK_E)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int | None, max_k: int | None, key_size: Tensor | None,
    key_bias: Tensor | None, prefix_len: Tensor | None, causal: bool, scale: float, with_mass: bool, whole: bool,
    seen: Tensor | None = None, kind: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [Tq, H, e], lse [H * Tq] to base 2, mass [Tk] or [0]. ``whole``: cu_q and cu_k are known to end at Tq and Tk."""
    (Tq, H, D), E = q.shape, v.shape[2]
    queries, keys = Side(cu_q, Tq, max_q), Side(cu_k, k.shape[0], max_k)
    out = new(q, whole, Tq, H, E)
    lse = torch.empty(H * Tq, dtype=torch.float32, device=q.device)
    if Tq and queries.segments:
        (qs, ks, vs), align = operands(q, k, v)
        size, bias, bias_stride = key_options(k, key_size, key_bias)
        tensors = (qs, ks, vs, cu_q, cu_k, size, bias, prefix_len, seen, kind, out, lse)
        sizes = (queries.segments, Tq, keys.tokens, H, H // k.shape[1])
        terms = (scale, bias_stride, *(x.stride(axis) for axis in (0, 1) for x in (qs, ks, vs)))
        fixed = {"CAUSAL": causal, "ALIGN": align, "PRECISION": precision(), "UPCAST": upcast(),
                 "D": D, "E": E, "BLOCK_D": padded(D), "BLOCK_E": padded(E)}  # fmt: skip
        short = triton_short.config(q.dtype, max(D, E), queries, keys, causal, any(t is not None for t in (size, bias, kind)))
        with torch.cuda.device_of(q):
            if short is not None:
                parts = triton_short.parts(queries, H, short["BLOCK_M"])
                triton_short._short_kernel[(queries.segments * parts * H,)](*tensors, *sizes[1:], parts, *terms, **fixed, **short)
            else:
                options = config(q.dtype, max(D, E), queries, keys, kind is not None)
                tiles, blocks, search = queries.tiles(options["BLOCK_M"])
                _forward_kernel[(tiles * H,)](*tensors, *sizes, blocks, *terms, SEARCH=search, **fixed, **options)
    if not with_mass:
        return out, lse, torch.empty(0, dtype=torch.float32, device=q.device)
    return out, lse, key_mass(q, k, lse, queries, keys, key_size, key_bias, prefix_len, causal, scale, seen, kind)
