"""pairwise_sigmoid on GPUs, three products in one sweep over square waves of pairs, without atomics.

A kernel makes tiles of logits, leaves their losses and sums as one partial per tile, and writes the coefficients dloss/dlogit
into a workspace about the size of the L2 cache. A second kernel multiplies the workspace with y and, transposed, with x in one
launch, accumulating in float32.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import dot_tile, grouped_tile, multiply_tile, operand, places, precision, processors, same_ids, upcast

# Tiles along a side of a wave: at most 4608 rows and columns of 16-bit coefficients, 41 MB.
WAVE_TILES = range(16, 37)
# float16 coefficients lie in (-1, 1); scaled by this they keep their digits down to 1e-9.
FLOAT16_FACTOR = 2.0**15
# Of 128 factors 1 + a <= 2 all must be 2 for their product to overflow; the logarithm of this is 128 log 2 all the same.
LARGEST = tl.constexpr(3.4028234663852886e38)


def config(dtype: torch.dtype, vectors: bool) -> dict[str, int]:
    """Block sizes and launch options of the logits kernel; ``vectors``: with biases, weights or ids, which fill registers."""
    common = {"GROUP": 8, "num_warps": 8}
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64 if vectors else 128, "BLOCK_K": 32, "num_stages": 2, **common}
    side = 64 if vectors else 128
    return {"BLOCK_M": side, "BLOCK_N": side, "BLOCK_K": 64, "num_stages": 3, **common}


def product_config() -> dict[str, int]:
    """The same of the products of 16-bit coefficients with features."""
    return {"BLOCK_M": 128, "BLOCK_D": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}


@triton.jit
def _factor_and_sum(p, q, p_next, q_next):
    """p: (1 + a)(1 + b) - 1, which keeps every digit of small a and b; q: a sum."""
    return p * p_next + (p + p_next), q + q_next


@triton.jit
def _log1p(a):
    """log(1 + a) for a >= 0 to the last digits, also where 1 + a rounds to 1."""
    w = 1.0 + a
    return tl.where(w == 1.0, a, tl.log(w) * (a / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit(do_not_specialize=["M", "N", "offset"])
def _logits_kernel(
    x_ptr, stride_x, y_ptr, stride_y, scale_ptr, bias_ptr,
    row_bias_ptr, col_bias_ptr, row_weight_ptr, col_weight_ptr, row_ids_ptr, col_ids_ptr,
    loss_ptr, dscale_ptr, dbias_ptr, G_ptr, row_sum_ptr, col_sum_ptr, row_loss_ptr, col_loss_ptr,
    M, N, D, offset, stride_G,
    HAS_OFFSET: tl.constexpr, EXCLUDE: tl.constexpr, WEIGHTED: tl.constexpr, MAKE_G: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of [M, N] pairs. G [whole tiles, whole tiles] = FACTOR * dloss/dlogit, zero outside of M x N."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, GROUP)
    # Places within the tile are 32-bit: 64-bit ones of a whole tile would fill the registers.
    first_m, first_n = i_m.to(tl.int64) * BLOCK_M, i_n.to(tl.int64) * BLOCK_N
    in_m, in_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_row = in_m < tl.minimum(M - first_m, BLOCK_M).to(tl.int32)
    in_col = in_n < tl.minimum(N - first_n, BLOCK_N).to(tl.int32)
    rows, cols = tl.minimum(first_m + in_m, M - 1), tl.minimum(first_n + in_n, N - 1)
    products = dot_tile(x_ptr, stride_x, y_ptr, stride_y, first_m, first_n, M, N, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)

    t = products * tl.load(scale_ptr) + tl.load(bias_ptr)
    if row_bias_ptr is not None:
        t += tl.load(row_bias_ptr + rows)[:, None]
    if col_bias_ptr is not None:
        t += tl.load(col_bias_ptr + cols)[None, :]
    positive = tl.zeros((BLOCK_M, BLOCK_N), tl.int1)
    if HAS_OFFSET:
        # Bounded to where the diagonal can touch this tile, so that 32 bits hold it.
        shift = tl.maximum(tl.minimum(first_m + offset - first_n, BLOCK_N), -BLOCK_M).to(tl.int32)
        positive = (in_m + shift)[:, None] == in_n[None, :]
    counted = in_row[:, None] & in_col[None, :]
    if row_ids_ptr is not None:
        same = same_ids(tl.load(row_ids_ptr + rows), tl.load(col_ids_ptr + cols))
        if EXCLUDE:
            counted = counted & (positive | (same == 0))
        else:
            positive = positive | same
    # A pair that does not count has -inf, whose loss and gradient are 0.
    u = tl.where(counted, tl.where(positive, -t, t), -float("inf"))

    # a = exp(-|u|): softplus(u) = max(u, 0) + log(1 + a), and sigmoid(u) is 1 / (1 + a) or a / (1 + a).
    a = tl.exp2(tl.abs(u) * -1.4426950408889634)
    # A division takes so many registers that the tile would spill.
    r = tl.rsqrt(1.0 + a)
    r *= r
    # Either side from a itself: 1 minus a sigmoid near 1 would lose its digits.
    g = tl.where(u >= 0.0, r, a * r)
    g = tl.where(positive, -g, g)
    tile = i_m.to(tl.int64) * tiles_n + i_n
    o_row = i_n.to(tl.int64) * M + first_m + in_m
    o_col = i_m.to(tl.int64) * N + first_n + in_n
    row_weight = tl.full((BLOCK_M,), 1.0, tl.float32)
    if WEIGHTED:
        row_weight = tl.load(row_weight_ptr + rows)
        col_weight = tl.load(col_weight_ptr + cols)
        losses = tl.maximum(u, 0.0) + _log1p(a)
        if col_loss_ptr is not None:
            tl.store(col_loss_ptr + o_col, tl.sum(losses * row_weight[:, None], 0), mask=in_col)
        loss = tl.sum(losses * col_weight[None, :], 1)
        if row_loss_ptr is not None:
            tl.store(row_loss_ptr + o_row, loss, mask=in_row)
        g *= row_weight[:, None] * col_weight[None, :]
    else:
        # One logarithm per row instead of one per pair: the product of the 1 + a, and the sum of the rest.
        factor, loss = tl.reduce((a, tl.maximum(u, 0.0)), 1, _factor_and_sum)
        loss += _log1p(tl.where(factor > LARGEST, LARGEST, factor))
    tl.store(loss_ptr + tile, tl.sum(loss * row_weight, 0))
    if MAKE_G:
        total = tl.sum(g, 1)
        tl.store(dscale_ptr + tile, tl.sum(tl.sum(g * products, 1), 0))
        tl.store(dbias_ptr + tile, tl.sum(total, 0))
        if row_sum_ptr is not None:
            tl.store(row_sum_ptr + o_row, total, mask=in_row)
        if col_sum_ptr is not None:
            tl.store(col_sum_ptr + o_col, tl.sum(g, 0), mask=in_col)
        if G_ptr is not None:
            p_G = G_ptr + first_m * stride_G + first_n + in_m[:, None] * stride_G + in_n[None, :]
            tl.store(p_G, (g * FACTOR).to(G_ptr.dtype.element_ty))


@triton.jit
def _add_product(
    a_ptr, stride_am, stride_ak, b_ptr, stride_b, out_ptr, M, K, D, pid,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of out [M, D] += a [M, K] @ b [K, D]; a may be read to the next whole tile, and holds zeros there along K."""
    i_m, i_d = grouped_tile(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(D, BLOCK_D), GROUP)
    offs_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = multiply_tile(a_ptr, stride_am, stride_ak, b_ptr, stride_b, offs_m, offs_d, K, D, BLOCK_K, UPCAST)
    inside = (offs_m < M)[:, None] & (offs_d < D)[None, :]
    p_out = out_ptr + (i_m.to(tl.int64) * BLOCK_M * D + i_d * BLOCK_D) + places(D, BLOCK_M, BLOCK_D)
    tl.store(p_out, acc + tl.load(p_out, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["M", "N"])
def _products_kernel(
    G_ptr, x_ptr, y_ptr, dx_ptr, dy_ptr, M, N, D, stride_G, stride_x, stride_y,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dx [M, D] += G y and dy [N, D] += G^T x in one launch, so that the tiles of both fill the chip together.

    M and N are not 0. Of two loops that might not turn, ptxas could not tell the accumulators apart, and would wait for every product.
    """
    tl.assume(M > 0)
    tl.assume(N > 0)
    pid = tl.program_id(0)
    programs_x = tl.cdiv(M, BLOCK_M) * tl.cdiv(D, BLOCK_D) if dx_ptr is not None else 0
    if pid < programs_x:
        if dx_ptr is not None:
            _add_product(G_ptr, stride_G, 1, y_ptr, stride_y, dx_ptr, M, N, D, pid, UPCAST, BLOCK_M, BLOCK_D, BLOCK_K, GROUP)
    else:
        if dy_ptr is not None:
            _add_product(G_ptr, 1, stride_G, x_ptr, stride_x, dy_ptr, N, M, D, pid - programs_x, UPCAST, BLOCK_M, BLOCK_D, BLOCK_K, GROUP)


def _wave(M: int, N: int, width: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of pairs in a wave: square where M and N allow, of the size whose products leave the fewest processors idle."""
    options = product_config()
    unit, tiles_d = options["BLOCK_M"], triton.cdiv(width, options["BLOCK_D"])
    at_once = processors(device)

    def busy(tiles: int) -> float:
        programs = 2 * tiles * tiles_d
        return programs / (triton.cdiv(programs, at_once) * at_once)

    side = max(WAVE_TILES, key=busy)
    tiles_m, tiles_n = triton.cdiv(M, unit), triton.cdiv(N, unit)
    rows = min(tiles_m, max(side, side * side // tiles_n))
    cols = min(tiles_n, side * side // rows)
    return rows * unit, cols * unit


def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    exclude: bool,
    offset: int | None,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The loss and the gradients of it that ``needs`` names, in the order of the first eight arguments; others have no elements."""
    M, N, width = x.shape[0], y.shape[0], x.shape[1]
    need_x, need_y, need_scale, need_bias, need_row_bias, need_col_bias, need_row_weight, need_col_weight = needs
    features, make_g = need_x or need_y, any(needs[:6])
    weighted = row_weight is not None or col_weight is not None
    vectors = weighted or any(v is not None for v in (row_bias, col_bias, row_ids))
    x, y = operand(x, dtype), operand(y, dtype)
    options, product_options = config(dtype, vectors), product_config()
    BLOCK_M, BLOCK_N = options["BLOCK_M"], options["BLOCK_N"]

    def new(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape if wanted else 0, dtype=dtype, device=x.device)

    one = torch.ones((), dtype=torch.float32, device=x.device)
    row_peak = col_peak = one
    if weighted:
        # Coefficients of 16 bits hold weights relative to the largest.
        row_weight, row_peak = _normalised(row_weight, M, one)
        col_weight, col_peak = _normalised(col_weight, N, one)
    row_bias, col_bias = (None if v is None else v.float().contiguous() for v in (row_bias, col_bias))
    row_ids, col_ids = (None if v is None else v.contiguous() for v in (row_ids, col_ids))

    dx, dy = new(need_x, M, width), new(need_y, N, width)
    drow_bias, drow_weight = new(need_row_bias, M), new(need_row_weight, M)
    dcol_bias, dcol_weight = new(need_col_bias, N), new(need_col_weight, N)
    loss, dscale, dbias = (new(wanted, triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)) for wanted in (True, make_g, make_g))
    if M * N > 0:
        wave_m, wave_n = _wave(M, N, width, x.device)
        factor = FLOAT16_FACTOR if dtype == torch.float16 else 1.0
        G = torch.empty((wave_m, wave_n) if features else 0, dtype=dtype, device=x.device)
        done = 0
        with torch.cuda.device_of(x):
            for i, j in itertools.product(range(0, M, wave_m), range(0, N, wave_n)):
                rows, cols = slice(i, min(i + wave_m, M)), slice(j, min(j + wave_n, N))
                m, n = rows.stop - i, cols.stop - j
                tiles_m, tiles_n = triton.cdiv(m, BLOCK_M), triton.cdiv(n, BLOCK_N)
                part = slice(done, done + tiles_m * tiles_n)
                done = part.stop
                of_row, of_col = (rows, tiles_n, m), (cols, tiles_m, n)
                totals = ((drow_bias, *of_row), (dcol_bias, *of_col), (drow_weight, *of_row), (dcol_weight, *of_col))
                partials = [x.new_empty(parts, length, dtype=torch.float32) if len(total) else None for total, _, parts, length in totals]
                of_rows = [None if v is None else v[rows] for v in (row_bias, row_weight, row_ids)]
                of_cols = [None if v is None else v[cols] for v in (col_bias, col_weight, col_ids)]
                _logits_kernel[(tiles_m * tiles_n,)](
                    x[rows], x.stride(0), y[cols], y.stride(0),
                    scale, bias, *(v for pair in zip(of_rows, of_cols, strict=True) for v in pair),
                    loss[part], dscale[part] if make_g else None, dbias[part] if make_g else None, G if features else None, *partials,
                    m, n, x.shape[1], 0 if offset is None else offset + i - j, wave_n,
                    HAS_OFFSET=offset is not None, EXCLUDE=exclude, WEIGHTED=weighted, MAKE_G=make_g, FACTOR=factor,
                    PRECISION=precision(), UPCAST=upcast(), **options,
                )  # fmt: skip
                for (total, where, _, _), partial in zip(totals, partials, strict=True):
                    if partial is not None:
                        total[where] += partial.sum(0)
                if features and dtype == torch.float32:
                    if need_x:
                        dx[rows].addmm_(G[:m, :n], y[cols, :width])
                    if need_y:
                        dy[cols].addmm_(G[:m, :n].T, x[rows, :width])
                elif features:
                    unit, tiles_d = product_options["BLOCK_M"], triton.cdiv(width, product_options["BLOCK_D"])
                    programs = (triton.cdiv(m, unit) * need_x + triton.cdiv(n, unit) * need_y) * tiles_d
                    _products_kernel[(programs,)](
                        G, x[rows], y[cols], dx[rows] if need_x else None, dy[cols] if need_y else None,
                        m, n, width, wave_n, x.stride(0), y.stride(0), UPCAST=upcast(), **product_options,
                    )  # fmt: skip
        alpha = scale * (row_peak * col_peak / factor)
        dx, dy = dx.mul_(alpha), dy.mul_(alpha)
    peak = row_peak * col_peak
    value, dscale, dbias = (
        sums.sum(dtype=torch.float64).float() * peak if need else new(False)
        for sums, need in ((loss, True), (dscale, need_scale), (dbias, need_bias))
    )
    return value, dx, dy, dscale, dbias, drow_bias * peak, dcol_bias * peak, drow_weight * col_peak, dcol_weight * row_peak


def _normalised(weight: Tensor | None, length: int, one: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` divided by its largest magnitude, and that magnitude."""
    if weight is None or length == 0:
        return one.expand(length).contiguous(), one
    peak = weight.float().abs().amax()
    peak = torch.where(peak > 0, peak, one)
    return weight.float() / peak, peak
