"""similarity_logsumexp on GPUs: tiles of S live in registers; log-sum-exps come from per-tile partial sums, without atomics.

Forward, one product: a tile of S leaves a maximum and a sum per row and per column; a second kernel merges them.
Backward, three products: a wave of rows of dS is recomputed into a workspace in the operands' dtype, then multiplied with y
and, transposed, with x, accumulating in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._logsumexp import LogSumExp
from .._product import multiply
from .._triton import grouped_tile, operand, precision, same_ids, upcast
from .arguments import Grads, Inputs, Needs, ResultGrads, Results, own_logits
from .triton_merge import merge_kernel, own_kernel
from .triton_stash import keep, keep_none, pointers, stashed_kernel
from .triton_tile import config, finite, flow, similarity_tile

# exp(S) itself serves rows and columns of a tile while their maxima lie this close to 0. Another reference that all share would cost
# digits of S - reference.
RANGE = tl.constexpr(62.0)
EXCLUDE, ONLY, BOTH, SUMS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
MODES = {"exclude": 1, "only": 2, "both": 3, "sums": 4}
PARTIAL_BYTES = 64 << 20
WORKSPACE_BYTES = 256 << 20


@triton.jit
def _store_partials(
    S, row_max_ptr, row_sum_ptr, col_max_ptr, col_sum_ptr, o_row, o_col, in_row, in_col,
    stash_ptr, stash_t_ptr, stash_tiles, place, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Per row and per column of a tile: a reference and the sum of exp(S - reference), from one exp where 0 serves all of them."""
    row_max = tl.max(S, 1)
    col_max = tl.max(S, 0)
    highest = tl.max(row_max, 0)
    lowest = tl.minimum(tl.min(row_max, 0), tl.min(col_max, 0))
    if (lowest >= -RANGE) & (highest <= RANGE):
        E = tl.exp(S)
        if stash_ptr is not None:
            if place < stash_tiles:
                keep(E, stash_ptr, stash_t_ptr, place, BLOCK_M, BLOCK_N)
        row_sum = tl.sum(E, 1)
        col_sum = tl.sum(E, 0)
        # The sums refer to 0 here, whatever the maxima are.
        row_max = tl.zeros_like(row_max)
        col_max = tl.zeros_like(col_max)
    else:
        if stash_ptr is not None:
            if place < stash_tiles:
                keep_none(stash_t_ptr, place, BLOCK_M, BLOCK_N)
        # Where nothing counts the maximum is -inf, and -inf minus -inf would be NaN.
        row_sum = tl.sum(tl.exp(S - finite(row_max)[:, None]), 1)
        col_sum = tl.sum(tl.exp(S - finite(col_max)[None, :]), 0)
    tl.store(row_max_ptr + o_row, row_max, mask=in_row)
    tl.store(row_sum_ptr + o_row, row_sum, mask=in_row)
    tl.store(col_max_ptr + o_col, col_max, mask=in_col)
    tl.store(col_sum_ptr + o_col, col_sum, mask=in_col)


@triton.jit
def _forward_kernel(
    x_ptr, stride_x, y_ptr, stride_y, scale_ptr, row_bias_ptr, col_bias_ptr, row_scale_ptr, col_scale_ptr, row_ids_ptr, col_ids_ptr,
    row_max_ptr, row_sum_ptr, col_max_ptr, col_sum_ptr,
    pos_row_max_ptr, pos_row_sum_ptr, pos_col_max_ptr, pos_col_sum_ptr, positive_ptr, stash_ptr, stash_t_ptr, stash_tiles, first_tile,
    M, N, D, offset,
    MODE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Partial log-sum-exps of one tile, its part of the offset diagonal, and what of it the stash keeps."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, GROUP)
    t_m, t_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    first_m, first_n = i_m.to(tl.int64) * BLOCK_M, i_n.to(tl.int64) * BLOCK_N
    in_row, in_col = t_m < (M - first_m).to(tl.int32), t_n < (N - first_n).to(tl.int32)
    rows, cols = tl.minimum(first_m + t_m, M - 1), tl.minimum(first_n + t_n, N - 1)
    products, S, b_row_scale, b_col_scale = similarity_tile(
        x_ptr, stride_x, y_ptr, stride_y, scale_ptr, row_bias_ptr, col_bias_ptr, row_scale_ptr, col_scale_ptr,
        first_m, first_n, rows, cols, M, N, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    place = first_tile + i_m.to(tl.int64) * tiles_n + i_n
    counted = in_row[:, None] & in_col[None, :]
    if positive_ptr is not None:
        diagonal = tl.minimum(tl.maximum(first_m + offset - first_n, -BLOCK_M), BLOCK_N).to(tl.int32)
        partner = t_m + diagonal
        if (diagonal < BLOCK_N) & (diagonal > -BLOCK_M):
            here = in_row & (partner >= 0) & (partner < BLOCK_N) & (partner < (N - first_n).to(tl.int32))
            tl.store(positive_ptr + rows, tl.sum(tl.where(partner[:, None] == t_n[None, :], S, 0.0), 1), mask=here)
        # The pair itself is left out here and added at the end, from float64 (see ``Own``).
        counted = counted & (partner[:, None] != t_n[None, :])
    o_row = i_n.to(tl.int64) * M + rows
    o_col = i_m.to(tl.int64) * N + cols
    if MODE > 0:
        same = same_ids(tl.load(row_ids_ptr + rows), tl.load(col_ids_ptr + cols))
        if MODE == BOTH:
            alike = tl.where(counted & same, S, -float("inf"))
            _store_partials(
                alike, pos_row_max_ptr, pos_row_sum_ptr, pos_col_max_ptr, pos_col_sum_ptr, o_row, o_col, in_row, in_col,
                None, None, 0, place, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        elif MODE == SUMS:
            alike = tl.where(same & in_row[:, None] & in_col[None, :], S, 0.0)
            tl.store(pos_row_sum_ptr + o_row, tl.sum(alike, 1), mask=in_row)
            tl.store(pos_col_sum_ptr + o_col, tl.sum(alike, 0), mask=in_col)
        elif MODE == ONLY:
            counted = counted & same
        else:
            counted = counted & (same == 0)
    S = tl.where(counted, S, -float("inf"))
    _store_partials(
        S, row_max_ptr, row_sum_ptr, col_max_ptr, col_sum_ptr, o_row, o_col, in_row, in_col,
        stash_ptr, stash_t_ptr, stash_tiles, place, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _backward_kernel(
    x_ptr, stride_x, y_ptr, stride_y, scale_ptr, row_bias_ptr, col_bias_ptr, row_scale_ptr, col_scale_ptr, row_ids_ptr, col_ids_ptr,
    row_lse_ptr, col_lse_ptr, pos_row_lse_ptr, pos_col_lse_ptr,
    g_row_ptr, g_col_ptr, g_pos_row_ptr, g_pos_col_ptr, of_own_ptr, norm_ptr,
    G_ptr, row_sum_ptr, col_sum_ptr, row_along_ptr, col_along_ptr,
    M, N, D, offset, stride_G,
    MODE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of dS: G [in whole tiles] = dS * row_scale * col_scale / norm, sums of dS for biases, of dS * products for scales."""
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    t_m, t_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    first_m, first_n = i_m.to(tl.int64) * BLOCK_M, i_n.to(tl.int64) * BLOCK_N
    in_row, in_col = t_m < (M - first_m).to(tl.int32), t_n < (N - first_n).to(tl.int32)
    rows, cols = tl.minimum(first_m + t_m, M - 1), tl.minimum(first_n + t_n, N - 1)
    products, S, b_row_scale, b_col_scale = similarity_tile(
        x_ptr, stride_x, y_ptr, stride_y, scale_ptr, row_bias_ptr, col_bias_ptr, row_scale_ptr, col_scale_ptr,
        first_m, first_n, rows, cols, M, N, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    if MODE > 0:
        same = same_ids(tl.load(row_ids_ptr + rows), tl.load(col_ids_ptr + cols))
        if MODE == BOTH:
            dS = flow(S, row_lse_ptr, col_lse_ptr, g_row_ptr, g_col_ptr, rows, cols)
            dS += flow(tl.where(same, S, -float("inf")), pos_row_lse_ptr, pos_col_lse_ptr, g_pos_row_ptr, g_pos_col_ptr, rows, cols)
        elif MODE == SUMS:
            dS = flow(S, row_lse_ptr, col_lse_ptr, g_row_ptr, g_col_ptr, rows, cols)
        elif MODE == ONLY:
            dS = flow(tl.where(same, S, -float("inf")), row_lse_ptr, col_lse_ptr, g_row_ptr, g_col_ptr, rows, cols)
        else:
            dS = flow(tl.where(same, -float("inf"), S), row_lse_ptr, col_lse_ptr, g_row_ptr, g_col_ptr, rows, cols)
    else:
        dS = flow(S, row_lse_ptr, col_lse_ptr, g_row_ptr, g_col_ptr, rows, cols)
    if of_own_ptr is not None:
        diagonal = tl.minimum(tl.maximum(first_m + offset - first_n, -BLOCK_M), BLOCK_N).to(tl.int32)
        dS = tl.where((t_m + diagonal)[:, None] == t_n[None, :], tl.load(of_own_ptr + rows)[:, None], dS)
    if MODE == SUMS:
        if g_pos_row_ptr is not None:
            dS += tl.where(same, tl.load(g_pos_row_ptr + rows)[:, None], 0.0)
        if g_pos_col_ptr is not None:
            dS += tl.where(same, tl.load(g_pos_col_ptr + cols)[None, :], 0.0)
    # What lies outside was computed all the same, and must add nothing.
    dS = tl.where(in_row[:, None] & in_col[None, :], dS, 0.0)
    o_row = i_n.to(tl.int64) * M + rows
    o_col = i_m.to(tl.int64) * N + cols
    if row_sum_ptr is not None:
        tl.store(row_sum_ptr + o_row, tl.sum(dS, 1), mask=in_row)
    if col_sum_ptr is not None:
        tl.store(col_sum_ptr + o_col, tl.sum(dS, 0), mask=in_col)
    if row_along_ptr is not None:
        tl.store(row_along_ptr + o_row, tl.sum(dS * products * b_col_scale[None, :], 1), mask=in_row)
    if col_along_ptr is not None:
        tl.store(col_along_ptr + o_col, tl.sum(dS * products * b_row_scale[:, None], 0), mask=in_col)
    if G_ptr is not None:
        factor = 1.0 / tl.load(norm_ptr)
        G = dS * (b_row_scale * factor)[:, None] * b_col_scale[None, :]
        p_G = G_ptr + (first_m + t_m)[:, None] * stride_G + (first_n + t_n)[None, :]
        tl.store(p_G, G.to(G_ptr.dtype.element_ty))


def _vectors(*side: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else v.contiguous() for v in side]


def _waves(length: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


class _Running:
    """Running (reference, sum) per row or column on the device, and their log-sum-exps."""

    def __init__(self, length: int, like: Tensor) -> None:
        self.maximum = torch.full((length,), -torch.inf, dtype=torch.float32, device=like.device)
        self.total, reference, log = (torch.zeros_like(self.maximum) for _ in range(3))
        self.lse = LogSumExp(reference, log)

    def merge(self, where: slice, partial: Tensor, own: Tensor | None, own_offset: int) -> None:
        """``partial``: references and sums [2, parts, length]. ``own``: one more logit for each entry, at its place plus ``own_offset``."""
        _, parts, length = partial.shape
        merge_kernel[(triton.cdiv(length, 128),)](
            *partial.unbind(), self.maximum[where], self.total[where], own, *self.lse.at(where), parts, length,
            own_offset, 0 if own is None else len(own), BLOCK_P=16, BLOCK=128,
        )  # fmt: skip


def forward(a: Inputs, stash: Tensor | None = None) -> Results:
    """Log-sum-exps of the rows and columns of S, and its offset diagonal. ``stash``, of ``stash_shape``, is filled."""
    x, y = operand(a.x, a.dtype), operand(a.y, a.dtype)
    (M, D), N = x.shape, y.shape[0]
    options, kept = config(a), pointers(stash)
    BLOCK_M, BLOCK_N = options["BLOCK_M"], options["BLOCK_N"]
    rows_v, cols_v = _vectors(a.row_bias, a.row_scale, a.row_ids), _vectors(a.col_bias, a.col_scale, a.col_ids)
    sweeps = [(_Running(M, x), _Running(N, x)) for _ in range(2 if a.both else 1)]
    positive = torch.zeros(0 if a.offset is None else M, dtype=torch.float32, device=x.device)
    # In float64: similarities of both signs cancel in these sums.
    row_sums, col_sums = (torch.zeros(length if a.sums else 0, dtype=torch.float64, device=x.device) for length in (M, N))
    per_row = 8 * (triton.cdiv(N, BLOCK_N) + triton.cdiv(N, BLOCK_M)) * (len(sweeps) + a.sums)
    # Partial sums of some rows at a time: those of all would grow with M N.
    wave = max(BLOCK_M, PARTIAL_BYTES // per_row // BLOCK_M * BLOCK_M)
    with torch.cuda.device_of(x):
        for rows in _waves(M, wave):
            m = rows.stop - rows.start
            tiles_m, tiles_n = triton.cdiv(m, BLOCK_M), triton.cdiv(N, BLOCK_N)
            partials = [x.new_empty(shape, dtype=torch.float32) for _ in sweeps for shape in [(2, tiles_n, m), (2, tiles_m, N)]]
            halves: list[Tensor | None] = [half for part in partials for half in part.unbind()]
            if a.sums:
                row_part, col_part = (x.new_empty(shape, dtype=torch.float32) for shape in [(tiles_n, m), (tiles_m, N)])
                halves += [None, row_part, None, col_part]
            row_bias, row_scale, row_ids = (v if v is None else v[rows] for v in rows_v)
            _forward_kernel[(tiles_m * tiles_n,)](
                x[rows], x.stride(0), y, y.stride(0), a.scale,
                row_bias, cols_v[0], row_scale, cols_v[1], row_ids, cols_v[2],
                *halves, *[None] * (8 - len(halves)), None if a.offset is None else positive[rows],
                *kept, rows.start // BLOCK_M * tiles_n, m, N, D, (a.offset or 0) + rows.start,
                MODE=0 if a.row_ids is None else MODES[a.ids], PRECISION=precision(), UPCAST=upcast(), **options,
            )  # fmt: skip
            if a.sums:
                row_sums[rows] += row_part.sum(0)
                col_sums += col_part.sum(0)
            for (row, col), row_part, col_part, own in zip(sweeps, partials[::2], partials[1::2], own_logits(a, positive), strict=False):
                row.merge(rows, row_part, None if own is None else own[rows], 0)
                col.merge(slice(None), col_part, own, -(a.offset or 0))
    if a.both:
        row_positives, col_positives = (side.lse for side in sweeps[1])
    else:
        row_positives, col_positives = (LogSumExp(torch.zeros_like(sums), sums) for sums in (row_sums.float(), col_sums.float()))
    return Results(sweeps[0][0].lse, sweeps[0][1].lse, row_positives, col_positives, positive)


def _norm(g: ResultGrads, a: Inputs) -> Tensor:
    """What dS * row_scale * col_scale is divided by before it is rounded, so that float16 neither overflows nor underflows."""
    one = torch.ones((), dtype=torch.float32, device=a.x.device)
    if a.dtype == torch.float32:
        return one
    norm = torch.stack([grad.abs().max() for grad in g if grad is not None]).max()
    for factors in (a.row_scale, a.col_scale):
        norm = norm if factors is None else norm * factors.abs().max()
    # float16 ends at 65504 and at 6e-8; bfloat16 has float32's range.
    norm = norm / 4096 if a.dtype == torch.float16 else norm
    return torch.where(norm > 0, norm, one)


def _side(lse: LogSumExp, grad: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """References (+inf where a sum is empty, so that nothing flows), and the gradient as the weight of exp(S - reference)."""
    empty = lse.reference == -torch.inf
    reference = lse.reference.masked_fill(empty, torch.inf)
    return reference, None if grad is None else ((-lse.log).exp() * grad).masked_fill(empty, 0.0)


def _of_own(g: ResultGrads, a: Inputs, results: Results) -> Tensor | None:
    """dS of the pairs (i, i + offset), [M]."""
    own = own_logits(a, results.positive)
    if own.counted is None:
        return None
    of_own = torch.empty_like(own.counted)
    M, N = len(a.x), len(a.y)
    statistics = [part for lse in results[:4] for part in lse]
    own_kernel[(triton.cdiv(M, 128),)](*own, *statistics, *g, of_own, M, N, a.offset, BLOCK=128)
    return of_own


def backward(g: ResultGrads, a: Inputs, results: Results, needs: Needs, stash: Tensor | None = None) -> Grads:
    """Gradients of the inputs. The log-sum-exps in ``results`` may be those of a larger matrix that holds this one."""
    stash = stash if needs.x or needs.y else None
    kept = pointers(stash)
    stashed = kept[0] is not None
    g = ResultGrads(*(None if grad is None else grad.float().contiguous() for grad in g))
    x, y = operand(a.x, a.dtype), operand(a.y, a.dtype)
    (M, D), N = x.shape, y.shape[0]
    options = config(a, backward=True)
    BLOCK_M, BLOCK_N = options["BLOCK_M"], options["BLOCK_N"]
    rows_v, cols_v = _vectors(a.row_bias, a.row_scale, a.row_ids), _vectors(a.col_bias, a.col_scale, a.col_ids)
    (row_lse, g_row), (col_lse, g_col) = (_side(lse, grad) for lse, grad in zip(results[:2], g[:2], strict=True))
    of_positives = zip(results[2:4], g[2:4], strict=True)
    (pos_row_lse, g_pos_row), (pos_col_lse, g_pos_col) = (_side(lse, grad) if a.both else (None, grad) for lse, grad in of_positives)
    with torch.cuda.device_of(x):
        of_own = _of_own(g, a, results)
    norm = _norm(g, a)
    alpha = a.scale * norm
    tiles_n = triton.cdiv(N, BLOCK_N)
    # A ninth of the rows at most, so that the workspace is never a large part of S.
    most = min(WORKSPACE_BYTES // (N * x.element_size()), M // 9)
    wave = max(BLOCK_M, most // BLOCK_M * BLOCK_M)
    waves = _waves(M, wave)

    def new(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape if wanted else 0, dtype=dtype, device=x.device)

    d_x, d_y = new(needs.x, *a.x.shape, dtype=a.x.dtype), new(needs.y, *a.y.shape, dtype=a.y.dtype)
    # With a stash, products of dS with S come out of the product that makes the gradient of x, or else that of y.
    row_sum, row_along = new(needs.row_bias, M), new((needs.scale and (needs.x or not stashed)) or needs.row_scale, M)
    col_sum, col_along = new(needs.col_bias, N), new(needs.col_scale or (needs.scale and not len(row_along)), N)
    # Waves add to it in float32; a single one needs no sum.
    total = torch.empty(a.y.shape, dtype=torch.float32, device=x.device) if needs.y and len(waves) > 1 else None
    # Whole tiles, since kernels store them without masks.
    shape = (triton.cdiv(min(wave, M), 128) * 128, triton.cdiv(N, 128) * 128)
    G = torch.empty(shape if needs.x or needs.y else 0, dtype=a.dtype, device=x.device)
    with torch.cuda.device_of(x):
        for rows in waves:
            m = rows.stop - rows.start
            tiles_m = triton.cdiv(m, BLOCK_M)
            offset = (a.offset or 0) + rows.start
            row_bias, row_scale, row_ids = (v if v is None else v[rows] for v in rows_v)
            of_rows = (v if v is None else v[rows] for v in (row_lse, pos_row_lse, g_row, g_pos_row, of_own))
            row_lse_, pos_row_lse_, g_row_, g_pos_row_, of_own_ = of_rows
            if stashed:
                stashed_kernel[(tiles_m * tiles_n,)](
                    x[rows], x.stride(0), y, y.stride(0), a.scale,
                    row_lse_, col_lse, g_row_, g_col, of_own_, norm,
                    *kept, rows.start // BLOCK_M * tiles_n, G, m, N, D, offset, shape[1],
                    PRECISION=precision(), UPCAST=upcast(), **options,
                )  # fmt: skip
            else:
                wanted = ((row_sum, tiles_n, m), (col_sum, tiles_m, N), (row_along, tiles_n, m), (col_along, tiles_m, N))
                partials = [x.new_empty(parts, length, dtype=torch.float32) if len(out) else None for out, parts, length in wanted]
                _backward_kernel[(tiles_m * tiles_n,)](
                    x[rows], x.stride(0), y, y.stride(0), a.scale,
                    row_bias, cols_v[0], row_scale, cols_v[1], row_ids, cols_v[2],
                    row_lse_, col_lse, pos_row_lse_, pos_col_lse, g_row_, g_col, g_pos_row_, g_pos_col, of_own_, norm,
                    G if len(G) else None, *partials, m, N, D, offset, shape[1],
                    MODE=0 if a.row_ids is None else MODES[a.ids], PRECISION=precision(), UPCAST=upcast(), **options,
                )  # fmt: skip
                for part, out, where in zip(partials, (row_sum, col_sum, row_along, col_along), (rows, slice(None)) * 2, strict=True):
                    if part is not None:
                        out[where] += part.sum(0)
            if needs.x:
                multiply(G[:m, :N], y, alpha, d_x[rows], along=(x[rows], row_along[rows]) if stashed and len(row_along) else None)
            if needs.y:
                last = rows.stop == M
                along = (y, col_along) if stashed and len(col_along) and last else None
                multiply(G[:m, :N].T, x[rows], alpha, d_y, total, first=rows.start == 0, last=last, along=along)
    if stashed:
        d_scale = (row_along if len(row_along) else col_along).sum() * norm if needs.scale else new(False)
    else:
        d_scale = (row_along if a.row_scale is None else row_along * a.row_scale).sum() if needs.scale else new(False)
    d_row_scale = row_along * a.scale if needs.row_scale else new(False)
    return Grads(d_x, d_y, d_scale, row_sum, col_sum, d_row_scale, col_along * a.scale)
