"""Packed attention on GPUs, forward: a program per tile of a segment's queries and head. Short segments: ``triton_short``.

Tiles begin where segments begin, so that a short segment costs one small program and no product with its neighbours. Which segment a
program has follows from the longest length; where that is not known, or few segments are that long, by a binary search: segment s owns
the slots from cu[s] // BLOCK + s on, which are enough for its tiles whatever the lengths are. Lengths are read on the device alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import precision, upcast

LOG2E = tl.constexpr(1.4426950408889634)
NO_STEP = 1 << 20
WHOLE_USE = 0.6  # least share of the columns of a tile that real keys fill, on average, for a tile of all keys


class Side(NamedTuple):
    """Where the segments of the queries or of the keys start, and what the host knows of their lengths."""

    cu: Tensor  # int32 or int64 [S+1]
    tokens: int
    longest: int | None

    @property
    def segments(self) -> int:
        return len(self.cu) - 1

    @property
    def typical(self) -> int:
        """The longest length where it is known, else twice the mean."""
        return self.longest if self.longest is not None else min(self.tokens, 2 * triton.cdiv(self.tokens, max(1, self.segments)))

    def tiles(self, block: int) -> tuple[int, int, bool]:
        """Number of tiles, tiles per segment, and whether segments must be searched."""
        slots = self.tokens // block + self.segments
        if self.longest is not None:
            blocks = max(1, triton.cdiv(self.longest, block))
            if self.segments * blocks <= 2 * slots:
                return self.segments * blocks, blocks, False
        return slots, NO_STEP, True

    def whole(self, most: int) -> int:
        """Columns of tiles that hold all keys of any segment and waste little, or 0."""
        if self.longest is None:
            return 0
        width = 192 if 128 < self.longest <= 192 else max(16, triton.next_power_of_2(self.longest))
        return width if width <= most and (width <= 64 or self.tokens >= WHOLE_USE * self.segments * width) else 0


def padded(width: int) -> int:
    """The power of two that a head width is padded to, on chip only."""
    return max(16, triton.next_power_of_2(width))


def rows_of(longest: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(longest)))


def config(dtype: torch.dtype, width: int, queries: Side, keys: Side) -> dict[str, int]:
    """Block sizes and launch options of the forward pass for heads of ``width``."""
    if dtype == torch.float32:
        rows, columns = rows_of(queries.typical, 32), rows_of(keys.typical, 32)
        return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": 8, "num_stages": 2}
    wide = width > 64
    rows = rows_of(queries.typical, 128 if queries.typical > 512 else 64)
    columns = rows_of(keys.typical, 32 if wide and rows == 128 else 64)
    if rows * columns <= 2048 and not wide:
        warps = 1 if rows * columns <= 512 else 2
    else:
        warps = 8 if rows == 128 or (wide and rows == 64) else 4
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps, "num_stages": 2 if wide else 3}


@triton.jit
def tile_of(cu_ptr, tile, S, blocks, SEARCH: tl.constexpr, BLOCK: tl.constexpr):
    """The segment of a tile and the tile's place in it."""
    if SEARCH:
        low = tile * 0
        high = low + S
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(cu_ptr + middle).to(tl.int32) // BLOCK + middle <= tile
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        return low, tl.maximum(tile - tl.load(cu_ptr + low).to(tl.int32) // BLOCK - low, 0)
    return tile // blocks, tile % blocks


@triton.jit
def span(cu_ptr, segment, T):
    """Where a segment starts and its length, within the T tokens that there are."""
    start = tl.minimum(tl.maximum(tl.load(cu_ptr + segment).to(tl.int32), 0), T)
    end = tl.minimum(tl.load(cu_ptr + segment + 1).to(tl.int32), T)
    return start, tl.maximum(end - start, 0)


@triton.jit
def tile(ptr, first, offs, inside, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """[rows, BLOCK] of the tokens first + offs, 0 outside. Only ``first`` is a 64-bit number: those of elements would fill registers."""
    cols = tl.arange(0, BLOCK)
    at = ptr + first.to(tl.int64) * stride + (offs[:, None] * stride + cols[None, :])
    x = tl.load(at, mask=inside[:, None] & (cols < WIDTH)[None, :], other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def store(ptr, value, first, offs, inside, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of ``tile``."""
    cols = tl.arange(0, BLOCK)
    at = ptr + first.to(tl.int64) * stride + (offs[:, None] * stride + cols[None, :])
    tl.store(at, value.to(ptr.dtype.element_ty), mask=inside[:, None] & (cols < WIDTH)[None, :])


@triton.jit
def fill(ptr, first, length, block, blocks, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """NaN behind the ``blocks`` tiles of a segment of ``length``: a longest length that is too small must not go unseen."""
    offs = tl.arange(0, ROWS)
    nothing = tl.full((ROWS, BLOCK), float("nan"), tl.float32)
    for rest in range((blocks + block) * ROWS, length, blocks * ROWS):
        store(ptr, nothing, first + rest, offs, rest + offs < length, stride, WIDTH, BLOCK)


@triton.jit
def key_terms(size_ptr, bias_ptr, first, offs, inside):
    """What is added to the scores of keys, in powers of 2 (-inf: the key is hidden), and their sizes."""
    term = tl.zeros(offs.shape, tl.float32)
    size = inside.to(tl.float32)
    if bias_ptr is not None:
        term += tl.load(bias_ptr + first + offs, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if size_ptr is not None:
        size = tl.load(size_ptr + first + offs, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside & ~(size <= 0), term, float("-inf")), size


@triton.jit
def limits(prefix_ptr, segment, rows, n, m):
    """Behind the last key that each query of a causal segment sees."""
    limit = rows + (m - n + 1)
    if prefix_ptr is not None:
        limit = tl.maximum(limit, tl.load(prefix_ptr + segment).to(tl.int32))
    return limit


@triton.jit
def attend(s, v, size_ptr, size, highest, total, acc, PRECISION: tl.constexpr):
    """The highest score of each row, its sum and its unnormalised result, after the keys with scores s [rows, keys] too."""
    higher = tl.maximum(highest, tl.max(s, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s - shift[:, None])
    if size_ptr is not None:
        p *= size[None, :]
    shrink = tl.exp2(highest - shift)
    return higher, total * shrink + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)


@triton.jit
def finish(out_ptr, lse_ptr, highest, total, acc, first, offs, inside, H, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Store the results of rows, 0 for those without keys, and their lse."""
    some = total != 0
    lse = tl.where(some, highest + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(lse_ptr + first + offs, lse, mask=inside)
    store(out_ptr, acc / tl.where(some, total, 1.0)[:, None], first, offs, inside, H * E, E, BLOCK_E)


@triton.jit(do_not_specialize=["S", "Tq", "Tk", "blocks", "bias_stride"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, size_ptr, bias_ptr, prefix_ptr, out_ptr, lse_ptr,
    S, Tq, Tk, H, group, blocks, scale, bias_stride, stride_q, stride_k, stride_v, head_q, head_k, head_v,
    CAUSAL: tl.constexpr, SEARCH: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [Tq, H, E] and lse [H, Tq], the logarithms to base 2 of the sums (+inf for a query without keys)."""
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
    scale *= LOG2E
    if not SEARCH:
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
            last = tl.minimum(m, tl.max(limit, 0))
        for key in range(0, last, BLOCK_N):
            keys = key + in_n
            k = tile(k_ptr, first_k + key, in_n, keys < m, stride_k, D, BLOCK_D, UPCAST)
            v = tile(v_ptr, first_k + key, in_n, keys < m, stride_v, E, BLOCK_E, UPCAST)
            term, size = key_terms(size_ptr, bias_ptr, first_k + key, in_n, keys < m)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + term[None, :]
            if CAUSAL:
                s = tl.where(keys[None, :] < limit[:, None], s, float("-inf"))
            highest, total, acc = attend(s, v, size_ptr, size, highest, total, acc, PRECISION)
        finish(out_ptr, lse_ptr, highest, total, acc, first_q + row, in_m, rows < n, H, E, BLOCK_E)


def operands(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """The tensors with features next to each other, and what divides their strides: 8 elements are 16 bytes of half precision."""
    dense = [x if x.stride(2) == 1 else x.contiguous() for x in tensors]
    aligned = all(stride % 8 == 0 for x in dense for stride in x.stride()[:2])
    return dense, 8 if aligned else 1


def key_options(k: Tensor, key_size: Tensor | None, key_bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Sizes and bias as kernels read them, and the stride from one head's bias to the next."""
    bias = None if key_bias is None else key_bias.contiguous()
    return None if key_size is None else key_size.contiguous(), bias, k.shape[0] if bias is not None and bias.ndim == 2 else 0


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int | None, max_k: int | None, key_size: Tensor | None,
    key_bias: Tensor | None, prefix_len: Tensor | None, causal: bool, scale: float, with_mass: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [Tq, H, e], lse [H * Tq] to base 2, mass [Tk] or [0]."""
    (Tq, H, D), E = q.shape, v.shape[2]
    queries, keys = Side(cu_q, Tq, max_q), Side(cu_k, k.shape[0], max_k)
    from . import triton_short

    out = q.new_empty(Tq, H, E)
    lse = torch.empty(H * Tq, dtype=torch.float32, device=q.device)
    if Tq and queries.segments:
        (qs, ks, vs), align = operands(q, k, v)
        size, bias, bias_stride = key_options(k, key_size, key_bias)
        tensors = (qs, ks, vs, cu_q.contiguous(), cu_k.contiguous(), size, bias, prefix_len, out, lse)
        sizes = (queries.segments, Tq, keys.tokens, H, H // k.shape[1])
        terms = (scale, bias_stride, *(x.stride(axis) for axis in (0, 1) for x in (qs, ks, vs)))
        fixed = {"CAUSAL": causal, "ALIGN": align, "PRECISION": precision(), "UPCAST": upcast(),
                 "D": D, "E": E, "BLOCK_D": padded(D), "BLOCK_E": padded(E)}  # fmt: skip
        short = triton_short.config(q.dtype, max(D, E), queries, keys, causal, size is not None or bias is not None)
        with torch.cuda.device_of(q):
            if short is not None:
                programs, known = triton_short.programs(queries, keys, H, short)
                triton_short._short_kernel[(programs * H,)](*tensors, *sizes, *known, *terms, **fixed, **short)
            else:
                options = config(q.dtype, max(D, E), queries, keys)
                tiles, blocks, search = queries.tiles(options["BLOCK_M"])
                _forward_kernel[(tiles * H,)](*tensors, *sizes, blocks, *terms, SEARCH=search, **fixed, **options)
    if not with_mass:
        return out, lse, torch.empty(0, dtype=torch.float32, device=q.device)
    from .triton_backward import key_mass

    return out, lse, key_mass(q, k, lse, queries, keys, key_size, key_bias, prefix_len, causal, scale)
