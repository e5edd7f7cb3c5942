"""maxsim on GPUs: tiles of products over all tokens, whose maxima per segment are merged over tiles without atomics.

A tile may hold parts of any number of segments of either side; nothing is padded. For each segment of y that it meets it leaves a
maximum per row, for each segment of x one per column. Numbering tiles and segments together gives these a place: from one pair (tile,
segment) that meet to the next either the tile or the segment advances, so tile + segment is a different slot for each, and the slots
of a segment lie together. Backward makes the maxima again with their places, from these a workspace of dS, and two products.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._product import multiply
from .._triton import dot_tile, grouped_tile, operand, precision, upcast

# Segments shorter than this on average get small tiles: the maxima cost one pass over a tile per segment.
SHORT = 16
PARTIAL_BYTES = {"forward": 64 << 20, "backward": 256 << 20}
WORKSPACE_BYTES = 128 << 20
# Rows of dS that are multiplied together: enough tiles of the product to fill the chip.
WORKSPACE_ROWS = 8192
NOWHERE = tl.constexpr(2**31 - 1)


def config(dtype: torch.dtype, short_x: bool, short_y: bool) -> dict[str, int]:
    """Block sizes and launch options of the tiles."""
    common = {"GROUP": 8, "num_warps": 8}
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 32 if short_y else 64, "BLOCK_K": 32, "num_stages": 2, **common}
    return {"BLOCK_M": 64 if short_x else 128, "BLOCK_N": 32 if short_y else 128, "BLOCK_K": 64, "num_stages": 3, **common}


@triton.jit(do_not_specialize=["M", "N", "Tx", "Ty"])
def _tile_kernel(
    x_ptr, y_ptr, cu_x_ptr, cu_y_ptr, owner_x_ptr, owner_y_ptr, row_max_ptr, row_place_ptr, col_max_ptr, col_place_ptr,
    Tx, Ty, M, N, D, stride_x, stride_y,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """row_max [slots of (tile, segment) of y, Tx] and col_max [slots of x, Ty], and where the first of each lies, if wanted."""
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(Tx, BLOCK_M), tl.cdiv(Ty, BLOCK_N), GROUP)
    first_m, first_n = i_m * BLOCK_M, i_n * BLOCK_N
    end_m, end_n = tl.load(cu_x_ptr + M), tl.load(cu_y_ptr + N)
    if (first_m >= end_m) | (first_n >= end_n):
        return
    # Beyond the last token stands that token again, which changes no maximum.
    last_m, last_n = tl.minimum(first_m + BLOCK_M, end_m) - 1, tl.minimum(first_n + BLOCK_N, end_n) - 1
    t_m, t_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    rows, cols = tl.minimum(t_m, last_m), tl.minimum(t_n, last_n)
    S = dot_tile(x_ptr, stride_x, y_ptr, stride_y, first_m, first_n, end_m, end_n, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
    # Hardware maxima pass over NaN; +inf stands for it until the sums.
    S = tl.where(S == S, S, float("inf"))
    if row_max_ptr is not None:
        for n in range(tl.load(owner_y_ptr + first_n), tl.load(owner_y_ptr + last_n) + 1):
            inside = (cols >= tl.load(cu_y_ptr + n)) & (cols < tl.load(cu_y_ptr + n + 1))
            part = tl.where(inside[None, :], S, -float("inf"))
            best = tl.max(part, 1)
            at = (i_n + n).to(tl.int64) * Tx + t_m
            tl.store(row_max_ptr + at, best, mask=t_m <= last_m)
            if row_place_ptr is not None:
                place = tl.min(tl.where(part == best[:, None], cols[None, :], NOWHERE), 1)
                tl.store(row_place_ptr + at, place, mask=t_m <= last_m)
    if col_max_ptr is not None:
        for m in range(tl.load(owner_x_ptr + first_m), tl.load(owner_x_ptr + last_m) + 1):
            inside = (rows >= tl.load(cu_x_ptr + m)) & (rows < tl.load(cu_x_ptr + m + 1))
            part = tl.where(inside[:, None], S, -float("inf"))
            best = tl.max(part, 0)
            at = (i_m + m).to(tl.int64) * Ty + t_n
            tl.store(col_max_ptr + at, best, mask=t_n <= last_n)
            if col_place_ptr is not None:
                place = tl.min(tl.where(part == best[None, :], rows[:, None], NOWHERE), 0)
                tl.store(col_place_ptr + at, place, mask=t_n <= last_n)


@triton.jit
def _slots(cu_ptr, a, TILE: tl.constexpr):
    """The first slot of segment a and the last; an empty segment has none, and the last lies before the first."""
    start, end = tl.load(cu_ptr + a), tl.load(cu_ptr + a + 1)
    last = tl.where(end > start, (end - 1) // TILE, start // TILE - 1)
    return (start // TILE + a).to(tl.int64), (last + a).to(tl.int64)


@triton.jit(do_not_specialize=["B", "stride", "stride_a", "stride_b"])
def _sum_kernel(
    max_ptr, cu_a_ptr, cu_b_ptr, out_ptr, B, stride, stride_a, stride_b, MEAN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """out[a, b] = sum or mean over the tokens of segment b of the maximum over the slots of segment a."""
    a, b = tl.program_id(0) // B, tl.program_id(0) % B
    first, last = _slots(cu_a_ptr, a, TILE)
    start, end = tl.load(cu_b_ptr + b), tl.load(cu_b_ptr + b + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    if last >= first:
        for token in range(start, end, BLOCK):
            offs = token + tl.arange(0, BLOCK)
            best = tl.full((BLOCK,), -float("inf"), tl.float32)
            for slot in range(first, last + 1):
                # 0 behind the end, which adds nothing to the sum.
                best = tl.maximum(best, tl.load(max_ptr + slot * stride + offs, mask=offs < end, other=0.0))
            # +inf stood for NaN, which passes through no maximum of the hardware.
            total += tl.where(best == float("inf"), float("nan"), best)
    value = tl.sum(total, 0)
    if MEAN:
        # An empty segment has the mean 0.
        value /= tl.maximum(end - start, 1).to(tl.float32)
    tl.store(out_ptr + a.to(tl.int64) * stride_a + b.to(tl.int64) * stride_b, value)


@triton.jit(do_not_specialize=["length", "blocks"])
def _first_kernel(max_ptr, place_ptr, cu_a_ptr, length, blocks, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The place of the highest of the slots of segment a, the first among equals, into its first slot."""
    a = tl.program_id(0) // blocks
    first, last = _slots(cu_a_ptr, a, TILE)
    if last > first:
        offs = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = offs < length
        at = first * length + offs
        best = tl.load(max_ptr + at, mask=inside)
        place = tl.load(place_ptr + at, mask=inside)
        for slot in range(first + 1, last + 1):
            other = tl.load(max_ptr + slot * length + offs, mask=inside)
            # Greater and not equal, so that among equals the first one stays.
            place = tl.where(other > best, tl.load(place_ptr + slot * length + offs, mask=inside), place)
            best = tl.maximum(best, other)
        tl.store(place_ptr + at, place, mask=inside)


@triton.jit(do_not_specialize=["M", "N", "Tx", "Ty", "row_start", "col_start", "tiles_n"])
def _coefficients_kernel(
    row_place_ptr, col_place_ptr, g_row_ptr, g_col_ptr, cu_x_ptr, cu_y_ptr, owner_x_ptr, owner_y_ptr, G_ptr,
    Tx, Ty, M, N, row_start, col_start, tiles_n, stride_G,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of dS into the workspace G; zero outside of the segments."""
    i_m, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    in_m, in_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, cols = row_start + in_m, col_start + in_n
    here_m, here_n = rows < tl.load(cu_x_ptr + M), cols < tl.load(cu_y_ptr + N)
    here = here_m[:, None] & here_n[None, :]
    m, n = tl.load(owner_x_ptr + rows, mask=here_m, other=0), tl.load(owner_y_ptr + cols, mask=here_n, other=0)
    pair = m.to(tl.int64)[:, None] * N + n[None, :]
    G = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if row_place_ptr is not None:
        slot = (tl.load(cu_y_ptr + n) // TILE_N + n).to(tl.int64)
        place = tl.load(row_place_ptr + slot[None, :] * Tx + rows[:, None], mask=here, other=-1)
        G += tl.load(g_row_ptr + pair, mask=here & (place == cols[None, :]), other=0.0)
    if col_place_ptr is not None:
        slot = (tl.load(cu_x_ptr + m) // TILE_M + m).to(tl.int64)
        place = tl.load(col_place_ptr + slot[:, None] * Ty + cols[None, :], mask=here, other=-1)
        G += tl.load(g_col_ptr + pair, mask=here & (place == rows[:, None]), other=0.0)
    p_G = G_ptr + in_m.to(tl.int64)[:, None] * stride_G + in_n[None, :]
    tl.store(p_G, G.to(G_ptr.dtype.element_ty))


class _Side(NamedTuple):
    """Features as kernels read them, where the segments start, and the segment of every token."""

    features: Tensor  # [T, width]
    cu: Tensor  # int32 [S+1]
    owner: Tensor  # int32 [T]
    tile: int

    @property
    def slots(self) -> int:
        return triton.cdiv(len(self.features), self.tile) + len(self.cu) - 1


def _side(features: Tensor, cu: Tensor, tile: int) -> _Side:
    # Offsets that lie outside would be read outside.
    cu = cu.clamp(0, len(features))
    tokens = torch.arange(len(features), dtype=torch.int32, device=cu.device)
    owner = torch.searchsorted(cu[1:], tokens, right=True, out_int32=True).clamp_(max=len(cu) - 2)
    return _Side(features, cu, owner, tile)


def _waves(x: Tensor, cu_x: Tensor, y: _Side, tile: int, longest: int | None, limit: int) -> Iterator[tuple[slice, _Side, Tensor | None]]:
    """Runs of segments of x that leave no more than ``limit`` partial maxima, and which rows of x they are (None: all).

    Lengths are known to the device alone: a wave has as many rows as its segments could have, of which the last may be of no segment.
    """
    M, Tx = len(cu_x) - 1, len(x)
    count = M
    if longest is not None:
        count = max(1, limit // (y.slots * longest + len(y.features) * (longest // tile + 2)))
    if longest is None or count >= M or count * longest >= Tx:
        yield slice(0, M), _side(x, cu_x, tile), None
        return
    for first in range(0, M, count):
        segments = slice(first, min(first + count, M))
        cu = cu_x[first : segments.stop + 1]
        rows = cu[0] + torch.arange((segments.stop - first) * longest, device=x.device)
        yield segments, _side(x.index_select(0, rows.clamp(max=Tx - 1)), cu - cu[0], tile), rows


def _unless_longer(cu_x: Tensor, longest: int | None) -> Tensor | float:
    """1, or NaN where a segment is longer than ``longest``, which would leave tokens out of waves unseen."""
    if longest is None or len(cu_x) < 2:
        return 1.0
    return torch.where(cu_x.diff().amax() > longest, torch.nan, 1.0)


def _tiles(a: _Side, y: _Side, to_y: bool, to_x: bool, places: bool, options: dict[str, int]) -> list[Tensor | None]:
    """row_max, row_place, col_max, col_place; None where not wanted."""
    Tx, Ty = len(a.features), len(y.features)
    shapes = ((y.slots, Tx), to_y, torch.float32), ((y.slots, Tx), to_y and places, torch.int32), \
             ((a.slots, Ty), to_x, torch.float32), ((a.slots, Ty), to_x and places, torch.int32)  # fmt: skip
    results = [torch.empty(shape, dtype=dtype, device=y.cu.device) if wanted else None for shape, wanted, dtype in shapes]
    grid = (triton.cdiv(Tx, a.tile) * triton.cdiv(Ty, y.tile),)
    _tile_kernel[grid](
        a.features, y.features, a.cu, y.cu, a.owner, y.owner, *results, Tx, Ty, len(a.cu) - 1, len(y.cu) - 1, a.features.shape[1],
        a.features.stride(0), y.features.stride(0), PRECISION=precision(), UPCAST=upcast(), **options,
    )  # fmt: skip
    return results


def _options(x: Tensor, y: Tensor, cu_x: Tensor, cu_y: Tensor, dtype: torch.dtype) -> dict[str, int]:
    return config(dtype, *(len(t) < SHORT * (len(cu) - 1) for t, cu in ((x, cu_x), (y, cu_y))))


def forward(
    x: Tensor, y: Tensor, cu_x: Tensor, cu_y: Tensor, max_seqlen_x: int | None, mean: bool, to_y: bool, to_x: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x_to_y and y_to_x [M, N]; a direction that is not wanted has no elements."""
    M, N = len(cu_x) - 1, len(cu_y) - 1
    options = _options(x, y, cu_x, cu_y, dtype)
    x_to_y, y_to_x = (torch.zeros((M, N) if wanted else (0, 0), dtype=torch.float32, device=x.device) for wanted in (to_y, to_x))
    if min(M, N, len(x), len(y)) == 0:
        return x_to_y, y_to_x
    with torch.cuda.device_of(x):
        b = _side(operand(y, dtype), cu_y, options["BLOCK_N"])
        limit = PARTIAL_BYTES["forward"] // 4
        for segments, a, _ in _waves(operand(x, dtype), cu_x, b, options["BLOCK_M"], max_seqlen_x, limit):
            row_max, _, col_max, _ = _tiles(a, b, to_y, to_x, False, options)
            m = segments.stop - segments.start
            for out, maxima, over, along, strides in ((x_to_y, row_max, b, a, (1, N)), (y_to_x, col_max, a, b, (N, 1))):
                if maxima is not None:
                    _sum_kernel[(m * N,)](
                        maxima, over.cu, along.cu, out[segments], len(along.cu) - 1, len(along.features), *strides,
                        MEAN=mean, TILE=over.tile, BLOCK=128, num_warps=1,
                    )  # fmt: skip
        valid = _unless_longer(cu_x, max_seqlen_x)
    return x_to_y.mul_(valid), y_to_x.mul_(valid)


def _coefficients(g: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """Upstream gradients in float32, divided by the lengths of a mean."""
    if g is None or lengths is None:
        return None if g is None else g.float().contiguous()
    return (g.float() / lengths.clamp(min=1)).contiguous()


def backward(
    g_x_to_y: Tensor | None, g_y_to_x: Tensor | None, x: Tensor, y: Tensor, cu_x: Tensor, cu_y: Tensor, max_seqlen_x: int | None,
    mean: bool, dtype: torch.dtype, need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y in their dtypes; no elements where not needed."""
    (Tx, D), Ty = x.shape, len(y)
    options = _options(x, y, cu_x, cu_y, dtype)
    # What is of no segment and of no wave goes into one row more.
    dx = torch.zeros((Tx + 1, D) if need_x else 0, dtype=x.dtype, device=x.device)
    dy = torch.zeros((Ty, D) if need_y else 0, dtype=y.dtype, device=x.device)
    if min(len(cu_x) - 1, len(cu_y) - 1, Tx, Ty) == 0:
        return dx[:Tx], dy
    g_row = _coefficients(g_x_to_y, cu_x.diff()[:, None] if mean else None)
    g_col = _coefficients(g_y_to_x, cu_y.diff() if mean else None)
    norm = _norm([g for g in (g_row, g_col) if g is not None], dtype) * _unless_longer(cu_x, max_seqlen_x)
    g_row, g_col = (None if g is None else g / norm for g in (g_row, g_col))
    total_y = torch.zeros((Ty, D) if need_y else 0, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        b = _side(operand(y, dtype), cu_y, options["BLOCK_N"])
        limit = PARTIAL_BYTES["backward"] // 8
        for segments, a, where in _waves(operand(x, dtype), cu_x, b, options["BLOCK_M"], max_seqlen_x, limit):
            row_max, row_place, col_max, col_place = _tiles(a, b, g_row is not None, g_col is not None, True, options)
            for maxima, places, over in ((row_max, row_place, b), (col_max, col_place, a)):
                if maxima is not None:
                    length = maxima.shape[1]
                    blocks = triton.cdiv(length, 1024)
                    _first_kernel[((len(over.cu) - 1) * blocks,)](maxima, places, over.cu, length, blocks, TILE=over.tile, BLOCK=1024)
            g_row_, g_col_ = (None if g is None else g[segments] for g in (g_row, g_col))
            total_x = _products(a, b, row_place, col_place, g_row_, g_col_, total_y, D, need_x, need_y)
            if not need_x:
                continue
            total_x = total_x.mul_(norm).to(x.dtype)
            if where is None:
                dx[:Tx] = total_x
            else:
                of_wave = torch.arange(len(where), device=x.device) < a.cu[-1]
                dx.index_copy_(0, where.where(of_wave, Tx), total_x)
    if need_y:
        dy.copy_(total_y.mul_(norm))
    return dx[:Tx], dy


def _products(
    a: _Side, b: _Side, row_place: Tensor | None, col_place: Tensor | None, g_row: Tensor | None, g_col: Tensor | None,
    total_y: Tensor, D: int, need_x: bool, need_y: bool,
) -> Tensor:
    """dS y for the rows of ``a``, float32; dS^T x is added to ``total_y``."""
    Tx, Ty = len(a.features), len(b.features)
    total_x = torch.zeros((Tx, D) if need_x else 0, dtype=torch.float32, device=b.cu.device)
    height = min(WORKSPACE_ROWS, triton.cdiv(Tx, 128) * 128)
    # A ninth of the columns at most, so that the workspace is never a large part of all products.
    columns = max(128, min(WORKSPACE_BYTES // (height * a.features.element_size()), Ty // 9) // 128 * 128)
    G = torch.empty(height, columns, dtype=a.features.dtype, device=b.cu.device)
    one = torch.ones((), dtype=torch.float32, device=b.cu.device)
    for i, j in itertools.product(range(0, Tx, height), range(0, Ty, columns)):
        m, n = min(height, Tx - i), min(columns, Ty - j)
        tiles_m, tiles_n = triton.cdiv(m, 128) * 2, triton.cdiv(n, 128) * 2
        _coefficients_kernel[(tiles_m * tiles_n,)](
            row_place, col_place, g_row, g_col, a.cu, b.cu, a.owner, b.owner, G, Tx, Ty, len(a.cu) - 1, len(b.cu) - 1, i, j, tiles_n,
            columns, TILE_M=a.tile, TILE_N=b.tile, BLOCK_M=64, BLOCK_N=64,
        )  # fmt: skip
        part = G[:m, :n]
        if need_x:
            into = total_x[i : i + m]
            multiply(part, b.features[j : j + n], one, into, into, first=False, last=False)
        if need_y:
            into = total_y[j : j + n]
            multiply(part.T, a.features[i : i + m], one, into, into, first=False, last=False)
    return total_x


def _norm(grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    """What coefficients are divided by before they are rounded, so that float16 neither overflows nor underflows."""
    one = torch.ones((), dtype=torch.float32, device=grads[0].device)
    if dtype == torch.float32:
        return one
    norm = torch.stack([grad.abs().max() for grad in grads]).max()
    norm = norm / 4096 if dtype == torch.float16 else norm
    return torch.where(norm > 0, norm, one)
