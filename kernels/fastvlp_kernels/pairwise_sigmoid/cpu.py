"""The pairwise sigmoid loss in tiles of plain PyTorch, for the CPU and for any device without Triton."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvlp_kernels._cpu_products import bf16_products, pays
from fastvlp_kernels._inputs import sum_dtype
from fastvlp_kernels._memory import zeros

# A tile of logits, its scratch, and the blocks of features and gradients beside it (2 MB each at width 512) stay in a 32 MB cache;
# smaller tiles lower the rate of the products.
TILE = 1024
# Beyond 2**LIMIT softplus(u) = u and sigmoid(u) = 1 to the last bit, and products of four (1 + 2**LIMIT) do not overflow.
LIMIT = {torch.float32: 30.0, torch.float64: 126.0}
LN2 = math.log(2)


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
    """The loss and the gradients of it that ``needs`` names, in the order of the first eight arguments; others have no elements.

    One sweep over tiles of u = -z t / log 2 with t the logits: e = 2^u gives both softplus(-z t) = log1p(e) and the coefficient
    dloss/dt = -z e / (1 + e). Positive pairs are negated before and after, so that neither end of e loses digits.
    """
    fast = pays(x.device, dtype, min(len(x), TILE) * min(len(y), TILE) * x.shape[1])
    accumulate = sum_dtype(dtype)
    M, N, D = x.shape[0], y.shape[0], x.shape[1]
    need_x, need_y, need_scale, need_bias, need_row_bias, need_col_bias, need_row_weight, need_col_weight = needs
    # dloss/dscale = sum_ij g_ij <x_i, y_j> is <x, g y> as well as <y, g^T x>: a product that is made for the features.
    make_gy = need_x or (need_scale and not need_y)
    make_coefficients = make_gy or need_y or need_bias or need_row_bias or need_col_bias

    loss, dscale, dbias = (x.new_zeros((), dtype=torch.float64) for _ in range(3))
    shapes = ((M, D), (N, D), (M,), (N,), (M,), (N,))
    wanted = (need_x, need_y, *needs[4:])
    dx, dy, drow_bias, dcol_bias, drow_weight, dcol_weight = (
        zeros(x, shape if want else (0,), accumulate) for shape, want in zip(shapes, wanted, strict=True)
    )
    vectors = (row_bias, col_bias, row_weight, col_weight)
    row_bias, col_bias, row_weight, col_weight = (None if v is None else v.to(accumulate) for v in vectors)

    limit, weighted = LIMIT[accumulate], row_weight is not None or col_weight is not None
    buffers = x.new_empty(2, min(M, TILE) * min(N, TILE), dtype=accumulate)
    half_buffer = x.new_empty(0 if weighted else buffers.shape[1] // 2, dtype=accumulate)
    dx_buffer = x.new_empty(min(M, TILE) if make_gy and not need_x else 0, D, dtype=accumulate)
    for i in range(0, M, TILE):
        rows = slice(i, min(i + TILE, M))
        x_tile = x[rows].to(dtype).to(accumulate)
        # Logits in units of log 2: exp2 is faster than exp, and the divisions are of a scalar and of vectors.
        x_scaled = x_tile if fast else x_tile * (scale / LN2)
        shift = (bias if row_bias is None else (row_bias[rows, None] + bias)) / LN2
        dx_tile = dx[rows] if need_x else dx_buffer[: len(x_tile)].zero_()
        for j in range(0, N, TILE):
            cols = slice(j, min(j + TILE, N))
            y_tile = y[cols].to(dtype).to(accumulate)
            tile, scratch = buffers[:, : len(x_tile) * len(y_tile)].view(2, len(x_tile), len(y_tile))
            with bf16_products(fast):
                torch.mm(x_scaled, y_tile.T, out=tile)
            if fast:  # the scale would be rounded into the operand
                tile.mul_(scale / LN2)
            tile.add_(shift)
            if col_bias is not None:
                tile.add_(col_bias[cols] / LN2)

            # Positive pairs count with the other sign. A slice without rows stands for "none" and takes every call below.
            diagonal = tile[:0] if offset is None else tile.diagonal(offset + i - j)
            diagonal.neg_()
            same = _same_ids(row_ids, col_ids, rows, cols, offset)
            if same is not None and exclude:
                tile.masked_fill_(same, -torch.inf)
            elif same is not None:
                torch.where(same, torch.neg(tile, out=scratch), tile, out=tile)

            w_rows = None if row_weight is None else row_weight[rows]
            w_cols = None if col_weight is None else col_weight[cols]
            dw_rows = drow_weight[rows] if need_row_weight else None
            dw_cols = dcol_weight[cols] if need_col_weight else None
            # What lies beyond the limit is counted here, as it is, and cut off. Asking another device for the maximum would make it wait.
            if tile.device.type != "cpu" or tile.amax() > limit:
                excess = torch.sub(tile, limit, out=scratch).clamp_min_(0).mul_(LN2)
                _add_losses(excess, loss, w_rows, w_cols, dw_rows, dw_cols)
                tile.clamp_max_(limit)
            tile.exp2_()
            if weighted:
                _add_losses(torch.log1p(tile, out=scratch), loss, w_rows, w_cols, dw_rows, dw_cols)
            torch.add(tile, 1, out=scratch)
            if not weighted:
                loss += sum_log1p(tile.flatten(), scratch.flatten(), half_buffer)
            if not make_coefficients:
                continue

            # e / (1 + e) is the sigmoid, out of what the loss has just made.
            tile.div_(scratch)
            diagonal.neg_()
            if same is not None and not exclude:
                torch.where(same, torch.neg(tile, out=scratch), tile, out=tile)
            if w_rows is not None:
                tile.mul_(w_rows[:, None])
            if w_cols is not None:
                tile.mul_(w_cols)
            if need_bias:
                dbias += tile.sum()
            if need_row_bias:
                drow_bias[rows] += tile.sum(1)
            if need_col_bias:
                dcol_bias[cols] += tile.sum(0)
            with bf16_products(fast):
                if make_gy:
                    dx_tile.addmm_(tile, y_tile)
                if need_y:
                    dy[cols].addmm_(tile.T, x_tile)
        if need_scale and make_gy:
            dscale += (x_tile * dx_tile).sum()
    if need_scale and not make_gy:
        dscale += sum((y[j : j + TILE].to(dtype).to(accumulate) * dy[j : j + TILE]).sum() for j in range(0, N, TILE))
    both = ((dscale, need_scale), (dbias, need_bias))
    scalars = (total.to(accumulate) if need else x.new_empty(0, dtype=accumulate) for total, need in both)
    return loss.to(accumulate), dx.mul_(scale), dy.mul_(scale), *scalars, drow_bias, dcol_bias, drow_weight, dcol_weight


def _same_ids(row_ids: Tensor | None, col_ids: Tensor | None, rows: slice, cols: slice, offset: int | None) -> Tensor | None:
    """[rows, cols]: pairs of equal id that do not lie on the offset."""
    if row_ids is None or col_ids is None:
        return None
    same = (row_ids[rows, None] == col_ids[None, cols]) & (row_ids[rows, None] >= 0)
    if offset is not None:
        # Those on the offset are positive already and would be turned round twice.
        same.diagonal(offset + rows.start - cols.start).fill_(False)
    return same


def sum_log1p(e: Tensor, one_plus_e: Tensor, buffer: Tensor) -> Tensor:
    """Sum of log(1 + e) with one logarithm for four elements: (1 + a)(1 + b) - 1 = a (1 + b) + b keeps every digit of small a and b."""
    quarter = len(e) // 4
    half = 2 * quarter
    pairs = torch.addcmul(e[:half], e[half : 2 * half], one_plus_e[:half], out=buffer[:half])
    a, b = pairs.view(2, quarter)
    fours = torch.addcmul(a, a, b, out=a).add_(b)
    return fours.log1p_().sum() + e[2 * half :].log1p().sum()


def _add_losses(
    losses: Tensor,
    total: Tensor,
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    drow_weight: Tensor | None,
    dcol_weight: Tensor | None,
) -> None:
    """Add the weighted sum of a tile of losses to ``total``, and its sums over one side to the gradients of the weights."""
    if row_weight is None and col_weight is None:
        total += losses.sum()
        return
    over_cols = losses.sum(1) if col_weight is None else losses @ col_weight
    total += over_cols.sum() if row_weight is None else over_cols @ row_weight
    if drow_weight is not None:
        drow_weight += over_cols
    if dcol_weight is not None:
        dcol_weight += losses.sum(0) if row_weight is None else row_weight @ losses
