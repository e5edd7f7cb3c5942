"""similarity_attend on GPUs, in waves of rows: tiles of S live in registers, those of softmax(S) in a workspace, without atomics.

Forward, two products: a tile leaves 2^(S / log 2 - r) in the workspace, with a reference r per row and tile, and its sums. References
are multiples of a quantum so wide that the tiles of a row mostly share one; the few that do not are shifted by a power of two, which
is exact. Then the workspace is multiplied with v. Backward, five products: tiles of P and dS go into two workspaces, which are
multiplied with the gradients of out, with y and with x, accumulating in float32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._logsumexp import from_sums
from .._product import multiply
from .._triton import architecture, dot_tile, grouped_tile, operand, precision, same_ids, upcast
from .arguments import Grads, Inputs, Needs, ResultGrads, Results

LOG2E = tl.constexpr(1.4426950408889634)
WORKSPACE_BYTES = 256 << 20
# A reference is up to half a quantum off the largest of its row, which exponents of 8 bits bear. Those of float16 need one that is
# near, and the range above 1.
QUANTUM = {torch.float16: 1, torch.bfloat16: 64, torch.float32: 64}
HEADROOM = {torch.float16: 14, torch.bfloat16: 0, torch.float32: 0}
# Probabilities and gradients in float16 are kept within 2^15 of their largest value, and keep their digits down to 2^-29 of it.
FLOAT16_TOP = 2.0**15


def config(a: Inputs, backward: bool) -> dict[str, int]:
    """Block sizes and launch options. Three tiles live at the end of the backward: 128 x 128 fit Hopper's registers, without vectors."""
    if a.dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8, "num_warps": 8, "num_stages": 2}
    vectors = any(v is not None for v in (a.row_bias, a.col_bias, a.row_ids))
    BLOCK_M = 64 if backward and (vectors or architecture(a.x.device) != 9) else 128
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}


@triton.jit
def _tile(
    x_ptr, stride_x, y_ptr, stride_y, scale_ptr, row_bias_ptr, col_bias_ptr, row_ids_ptr, col_ids_ptr,
    first_m, first_n, rows, cols, in_row, in_col, M, N, D,
    ONLY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Products [BLOCK_M, BLOCK_N] and S, -inf where a pair does not count."""
    products = dot_tile(x_ptr, stride_x, y_ptr, stride_y, first_m, first_n, M, N, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
    S = products * tl.load(scale_ptr)
    if row_bias_ptr is not None:
        S += tl.load(row_bias_ptr + rows)[:, None]
    if col_bias_ptr is not None:
        S += tl.load(col_bias_ptr + cols)[None, :]
    counted = in_row[:, None] & in_col[None, :]
    if row_ids_ptr is not None:
        same = same_ids(tl.load(row_ids_ptr + rows), tl.load(col_ids_ptr + cols))
        if ONLY:
            counted = counted & same
        else:
            counted = counted & (same == 0)
    return products, tl.where(counted, S, -float("inf"))


@triton.jit
def _forward_kernel(
    x_ptr, stride_x, y_ptr, stride_y, scale_ptr, row_bias_ptr, col_bias_ptr, row_ids_ptr, col_ids_ptr,
    W_ptr, reference_ptr, total_ptr, weight_ptr, M, N, D, stride_W,
    QUANTUM: tl.constexpr, HEADROOM: tl.constexpr, ONLY: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of W [in whole tiles] = 2^(S / log 2 - reference), and per row the reference and the sums before and after rounding."""
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    t_m, t_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    first_m, first_n = i_m.to(tl.int64) * BLOCK_M, i_n.to(tl.int64) * BLOCK_N
    in_row, in_col = t_m < (M - first_m).to(tl.int32), t_n < (N - first_n).to(tl.int32)
    rows, cols = tl.minimum(first_m + t_m, M - 1), tl.minimum(first_n + t_n, N - 1)
    _, S = _tile(
        x_ptr, stride_x, y_ptr, stride_y, scale_ptr, row_bias_ptr, col_bias_ptr, row_ids_ptr, col_ids_ptr,
        first_m, first_n, rows, cols, in_row, in_col, M, N, D, ONLY, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    highest = tl.max(S, 1) * LOG2E
    reference = tl.ceil(highest / QUANTUM - 0.5) * QUANTUM - HEADROOM
    shift = tl.where(highest == -float("inf"), 0.0, reference)
    W = tl.exp2(S * LOG2E - shift[:, None])
    rounded = W.to(W_ptr.dtype.element_ty)
    o_row = i_n.to(tl.int64) * M + rows
    tl.store(reference_ptr + o_row, tl.where(highest == -float("inf"), highest, reference), mask=in_row)
    tl.store(total_ptr + o_row, tl.sum(W, 1), mask=in_row)
    tl.store(weight_ptr + o_row, tl.sum(rounded.to(tl.float32), 1), mask=in_row)
    tl.store(W_ptr + first_m * stride_W + first_n + t_m[:, None] * stride_W + t_n[None, :], rounded)


@triton.jit
def _merge_kernel(
    reference_ptr, total_ptr, weight_ptr, row_reference_ptr, row_total_ptr, row_weight_ptr, parts, M,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The highest reference of every row of S, and the sums over its tiles relative to that; of partial ones [parts, M]."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < M
    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        where = part.to(tl.int64)[:, None] * M + offs[None, :]
        given = (part < parts)[:, None] & inside[None, :]
        reference = tl.load(reference_ptr + where, mask=given, other=-float("inf"))
        higher = tl.maximum(highest, tl.max(reference, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        known = tl.exp2(highest - shift)
        new = tl.exp2(reference - shift[None, :])
        total = total * known + tl.sum(tl.load(total_ptr + where, mask=given, other=0.0) * new, 0)
        weight = weight * known + tl.sum(tl.load(weight_ptr + where, mask=given, other=0.0) * new, 0)
        highest = higher
    tl.store(row_reference_ptr + offs, highest, mask=inside)
    tl.store(row_total_ptr + offs, total, mask=inside)
    tl.store(row_weight_ptr + offs, weight, mask=inside)


@triton.jit
def _align_kernel(W_ptr, reference_ptr, row_reference_ptr, M, N, stride_W, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Shift a tile of W from its own references to those of its rows, where they differ."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    i_m, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    t_m, t_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows = tl.minimum(i_m * BLOCK_M + t_m, M - 1)
    reference = tl.load(reference_ptr + i_n.to(tl.int64) * M + rows)
    distance = tl.where(reference == -float("inf"), 0.0, reference - tl.load(row_reference_ptr + rows))
    if tl.min(distance, 0) < 0.0:
        p_W = W_ptr + i_m.to(tl.int64) * BLOCK_M * stride_W + i_n * BLOCK_N + t_m[:, None] * stride_W + t_n[None, :]
        W = tl.load(p_W).to(tl.float32) * tl.exp2(distance)[:, None]
        tl.store(p_W, W.to(W_ptr.dtype.element_ty))


@triton.jit
def _backward_kernel(
    x_ptr, stride_x, y_ptr, stride_y, g_ptr, stride_g, v_ptr, stride_v, scale_ptr, row_bias_ptr, col_bias_ptr, row_ids_ptr, col_ids_ptr,
    lse_ptr, lost_ptr, constant_ptr, g_norm_ptr, norm_ptr, P_ptr, dS_ptr, row_sum_ptr, col_sum_ptr, row_along_ptr, row_mean_ptr,
    M, N, D, E, stride_W,
    TOP: tl.constexpr, FLOW: tl.constexpr, ONLY: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of P * TOP and, with FLOW, of dS = P * (<g, v> * g_norm + constant), stored as dS / norm, with its sums."""
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    t_m, t_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    first_m, first_n = i_m.to(tl.int64) * BLOCK_M, i_n.to(tl.int64) * BLOCK_N
    in_row, in_col = t_m < (M - first_m).to(tl.int32), t_n < (N - first_n).to(tl.int32)
    rows, cols = tl.minimum(first_m + t_m, M - 1), tl.minimum(first_n + t_n, N - 1)
    # Before the products, which are wanted beside P to the end: three tiles at a time would spill.
    dP = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if FLOW and g_ptr is not None:
        dP = dot_tile(g_ptr, stride_g, v_ptr, stride_v, first_m, first_n, M, N, E, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
    products, S = _tile(
        x_ptr, stride_x, y_ptr, stride_y, scale_ptr, row_bias_ptr, col_bias_ptr, row_ids_ptr, col_ids_ptr,
        first_m, first_n, rows, cols, in_row, in_col, M, N, D, ONLY, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    P = tl.exp2((S - tl.load(lse_ptr + rows)[:, None]) * LOG2E) * tl.load(lost_ptr + rows)[:, None]
    place = first_m * stride_W + first_n + t_m[:, None] * stride_W + t_n[None, :]
    if P_ptr is not None:
        tl.store(P_ptr + place, (P * TOP).to(P_ptr.dtype.element_ty))
    if FLOW:
        dS = P * (dP * tl.load(g_norm_ptr) + tl.load(constant_ptr + rows)[:, None])
        o_row = i_n.to(tl.int64) * M + rows
        if row_sum_ptr is not None:
            tl.store(row_sum_ptr + o_row, tl.sum(dS, 1), mask=in_row)
        if col_sum_ptr is not None:
            tl.store(col_sum_ptr + i_m.to(tl.int64) * N + cols, tl.sum(dS, 0), mask=in_col)
        if row_along_ptr is not None:
            tl.store(row_along_ptr + o_row, tl.sum(dS * products, 1), mask=in_row)
        if row_mean_ptr is not None:
            tl.store(row_mean_ptr + o_row, tl.sum(P * products, 1), mask=in_row)
        if dS_ptr is not None:
            tl.store(dS_ptr + place, (dS * (1.0 / tl.load(norm_ptr))).to(dS_ptr.dtype.element_ty))


def _vectors(a: Inputs) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Biases and ids of rows and of columns, as kernels read them."""
    row, col = (a.row_bias, a.row_ids), (a.col_bias, a.col_ids)
    rows, cols = ([None if vector is None else vector.contiguous() for vector in side] for side in (row, col))
    return rows, cols


def _waves(M: int, N: int, BLOCK_M: int, bytes_per_pair: int) -> tuple[list[slice], tuple[int, int]]:
    """Slices of rows, and the shape of a workspace for one of them: at most a ninth of S, and in whole blocks of products."""
    most = min(WORKSPACE_BYTES // (N * bytes_per_pair), M // 9)
    wave = max(BLOCK_M, most // BLOCK_M * BLOCK_M)
    return [slice(i, min(i + wave, M)) for i in range(0, M, wave)], (triton.cdiv(min(wave, M), 128) * 128, triton.cdiv(N, 128) * 128)


def forward(a: Inputs) -> Results:
    """softmax(S) v and the log-sum-exps of the rows of S."""
    x, y, v = (operand(features, a.dtype) for features in (a.x, a.y, a.v))
    M, N, E = len(x), len(y), a.v.shape[1]
    options = config(a, backward=False)
    BLOCK_M, BLOCK_N = options["BLOCK_M"], options["BLOCK_N"]
    tiles_n = triton.cdiv(N, BLOCK_N)
    (row_bias, row_ids), (col_bias, col_ids) = _vectors(a)
    waves, shape = _waves(M, N, BLOCK_M, x.element_size())
    new = torch.empty
    W = new(shape, dtype=a.dtype, device=x.device)
    out = new(M, E, dtype=torch.float32, device=x.device)
    sums = new(3, M, dtype=torch.float32, device=x.device)
    one = torch.ones((), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        for rows in waves:
            m = rows.stop - rows.start
            grid = (triton.cdiv(m, BLOCK_M) * tiles_n,)
            partials = new(3, tiles_n, m, dtype=torch.float32, device=x.device)
            reference, total, weight = sums[:, rows].unbind()
            _forward_kernel[grid](
                x[rows], x.stride(0), y, y.stride(0), a.scale,
                None if row_bias is None else row_bias[rows], col_bias, None if row_ids is None else row_ids[rows], col_ids,
                W, *partials.unbind(),
                m, N, x.shape[1], shape[1],
                QUANTUM=QUANTUM[a.dtype], HEADROOM=HEADROOM[a.dtype], ONLY=a.ids == "only",
                PRECISION=precision(), UPCAST=upcast(), **options,
            )  # fmt: skip
            _merge_kernel[(triton.cdiv(m, 128),)](*partials.unbind(), reference, total, weight, tiles_n, m, BLOCK_P=16, BLOCK=128)
            _align_kernel[grid](W, partials[0], reference, m, N, shape[1], BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=8)
            multiply(W[:m, :N], v, one, out[rows])
            out[rows].div_(weight.masked_fill(weight == 0, 1.0)[:, None])
    reference, total = sums[:2]
    return Results(out, from_sums(reference.masked_fill(total == 0, 0.0).double() * math.log(2), total, torch.float32))


def _unit(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two that a tensor is divided by before it is rounded to float16, so that it neither overflows nor underflows."""
    if dtype != torch.float16:
        return torch.ones((), dtype=torch.float32, device=value.device)
    peak = value.abs().max() / FLOAT16_TOP
    return torch.where(peak > 0, peak.log2().ceil().exp2(), 1.0)


def backward(g: ResultGrads, a: Inputs, results: Results, needs: Needs, whole: bool) -> Grads:
    """Gradients of the inputs. Unless this is the ``whole`` matrix, ``results`` are those of a larger one that shares its rows."""
    x, y, v = (operand(features, a.dtype) for features in (a.x, a.y, a.v))
    (M, D), N = x.shape, len(y)
    options = config(a, backward=True)
    BLOCK_M, BLOCK_N = options["BLOCK_M"], options["BLOCK_N"]
    tiles_n = triton.cdiv(N, BLOCK_N)
    (row_bias, row_ids), (col_bias, col_ids) = _vectors(a)
    rounded = results.lse.reference.masked_fill(results.lse.reference == -torch.inf, torch.inf)
    lost = (-results.lse.log).exp()

    g_lse = constant = torch.zeros_like(rounded) if g.lse is None else g.lse.float()
    g_out, g_norm, bound = None, rounded.new_ones(()), constant.abs()
    if g.out is not None:
        g_norm = _unit(g.out, a.dtype)
        # <g, out> has to cancel <g, v> of the kernel, and so reads the gradient as it was rounded.
        g_out = operand(g.out / g_norm, a.dtype)
        read = g_out[:, : a.v.shape[1]].float()
        constant = constant - torch.linalg.vecdot(read, results.out.float()) * g_norm
        bound = constant.abs()
        if a.dtype == torch.float16:
            bound = bound + torch.linalg.vector_norm(read, dim=1) * g_norm * torch.linalg.vector_norm(v.float(), dim=1).max()
    norm, top = _unit(bound, a.dtype), FLOAT16_TOP if a.dtype == torch.float16 else 1.0
    alpha, beta = a.scale * norm, g_norm / top

    def new(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape if wanted else 0, dtype=dtype, device=x.device)

    features, values = needs.x or needs.y, needs.v and g_out is not None
    waves, shape = _waves(M, N, BLOCK_M, x.element_size() * (features + values or 1))
    P, dS = (torch.empty(shape if wanted else 0, dtype=a.dtype, device=x.device) for wanted in (values, features))
    d_x, d_y, d_v = (new(need, *t.shape, dtype=t.dtype) for need, t in ((needs.x, a.x), (needs.y, a.y), (needs.v, a.v)))
    totals = (new(wanted and len(waves) > 1, *t.shape) for wanted, t in ((needs.y, a.y), (values, a.v)))
    y_total, v_total = (total if len(total) else None for total in totals)
    centred = needs.scale and whole
    row_sum, col_sum = new(centred or needs.row_bias and not whole, M), new(needs.col_bias, N)
    row_along, row_mean = new(needs.scale, M), new(centred, M)
    with torch.cuda.device_of(x):
        for rows in waves:
            m = rows.stop - rows.start
            tiles_m = triton.cdiv(m, BLOCK_M)
            wanted = ((row_sum, tiles_n, m), (col_sum, tiles_m, N), (row_along, tiles_n, m), (row_mean, tiles_n, m))
            partials = [rounded.new_empty(parts, length) if len(into) else None for into, parts, length in wanted]
            _backward_kernel[(tiles_m * tiles_n,)](
                x[rows], x.stride(0), y, y.stride(0), *((None, None) if g_out is None else (g_out[rows], g_out.stride(0))), v, v.stride(0),
                a.scale, None if row_bias is None else row_bias[rows], col_bias, None if row_ids is None else row_ids[rows], col_ids,
                rounded[rows], lost[rows], constant[rows], g_norm, norm,
                P if values else None, dS if features else None, *partials,
                m, N, D, v.shape[1], shape[1],
                TOP=top, FLOW=needs.similarities, ONLY=a.ids == "only", PRECISION=precision(), UPCAST=upcast(), **options,
            )  # fmt: skip
            for part, into, where in zip(partials, (row_sum, col_sum, row_along, row_mean), (rows, slice(None), rows, rows), strict=True):
                if part is not None:
                    into[where].add_(part.sum(0))
            ends = {"first": rows.start == 0, "last": rows.stop == M}
            if values and g_out is not None:
                multiply(P[:m, :N].T, g_out[rows], beta, d_v, v_total, **ends)
            if needs.x:
                multiply(dS[:m, :N], y, alpha, d_x[rows])
            if needs.y:
                multiply(dS[:m, :N].T, x[rows], alpha, d_y, y_total, **ends)
    if centred:
        # A row of dS sums to g_lse; what it has beside that is the error of <g, out>, whose probabilities were rounded.
        row_along.sub_((row_sum - g_lse) * row_mean)
    d_scale = row_along.sum() if needs.scale else new(False)
    return Grads(d_x, d_y, d_v, d_scale, g_lse.clone() if needs.row_bias and whole else row_sum, col_sum)
