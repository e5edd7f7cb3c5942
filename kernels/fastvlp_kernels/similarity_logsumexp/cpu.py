"""similarity_logsumexp in cache-sized tiles of plain torch: a sweep forward, and one back that recomputes S or reads it from a stash."""

import math

import torch
from torch import Tensor

from .._inputs import sum_dtype
from .._memory import empty, zeros
from .._tiles import LN2, Tiles, finite, tile_sides
from .arguments import Grads, Inputs, Needs, ResultGrads, Results

# 2^L itself serves, without a maximum, while maxima or log-sum-exps lie in this range: sums, the terms that count in them (down to
# 2^-36 of the largest) and the factors of gradients are normal numbers.
RANGE = (-90.0, 90.0)
# 2^(L - t) with one t for rows and columns serves while they lie this close: for sums, where underflow is all that
# matters, and for gradients, where p - 1 may remain and L - t has to be nearly exact.
SPREAD = 72.0
GRADIENT_SPREAD = 23.0


def stash_shape(M: int, N: int, dtype: torch.dtype, stash_bytes: int) -> tuple[int, int]:
    """The stash: [tiles, elements of a tile] in the dtype of sums, the first tiles of the sweep; [0, 0] without a budget."""
    if stash_bytes == 0:
        return 0, 0
    tile_m, tile_n = tile_sides(M, N)
    size = tile_m * tile_n
    return min(-(-M // tile_m) * -(-N // tile_n), stash_bytes // (size * sum_dtype(dtype).itemsize)), size


def new_stash(a: Inputs, stash_bytes: int) -> Tensor:
    """Where the forward leaves tiles of L for the backward, at most ``stash_bytes``."""
    return a.x.new_empty(stash_shape(len(a.x), len(a.y), a.dtype, stash_bytes), dtype=sum_dtype(a.dtype))


class _Tiles(Tiles):
    """Tiles of a matrix with factors per row and column, a diagonal of positives, and a stash."""

    def __init__(self, a: Inputs) -> None:
        super().__init__(a.x, a.y, a.scale, a.row_bias, a.col_bias, a.row_ids, a.col_ids, a.dtype)
        self.a = a
        if a.col_scale is not None:
            self.y = self.y * a.col_scale[:, None]

    def row_operand(self, i: slice) -> Tensor:
        """[rows, D]: x_i times its row scale."""
        x = super().row_operand(i)
        return x if self.a.row_scale is None else x * self.a.row_scale[i, None]

    def similarities(self, scaled: Tensor, i: slice, j: slice) -> tuple[Tensor, Tensor]:
        """L[i, j] and a buffer of its shape; ``scaled``: of row_operand(i)."""
        L, buffer = self.buffers(i, j)
        torch.mm(scaled, self.y[j].T, out=L)
        if self.row_bias is not None:
            L.add_(self.row_bias[i, None])
        if self.col_bias is not None:
            L.add_(self.col_bias[j])
        return L, buffer

    def stashed(self, stash: Tensor, i: slice, j: slice) -> tuple[Tensor, Tensor] | None:
        """The same from the stash, or None where it ends."""
        place = self._stash_place(i, j)
        if place >= len(stash):
            return None
        L, buffer = self.buffers(i, j)
        L.copy_(stash[place, : L.numel()].view_as(L))
        return L, buffer

    def keep(self, stash: Tensor, L: Tensor, i: slice, j: slice) -> None:
        """Leave L in the stash while it has room."""
        place = self._stash_place(i, j)
        if place < len(stash):
            stash[place, : L.numel()].view_as(L).copy_(L)
            stash[place, L.numel() :] = 0

    def _stash_place(self, i: slice, j: slice) -> int:
        return i.start // self.tile_m * -(-self.N // self.tile_n) + j.start // self.tile_n

    def positives(self, tile: Tensor, i: slice, j: slice) -> tuple[Tensor, slice]:
        """The part of the offset diagonal that lies in the tile, as a view, and the rows of x that it belongs to."""
        k = (self.a.offset or 0) + i.start - j.start
        if self.a.offset is None or not -tile.shape[0] < k < tile.shape[1]:
            return tile.new_empty(0), slice(0, 0)
        diagonal = tile.diagonal(k)
        first = i.start + max(0, -k)
        return diagonal, slice(first, first + len(diagonal))


class _Alike:
    """Sums over the pairs of equal id without their matrix, in O((M + N) D): a row meets the sum of its columns, and the other way."""

    def __init__(self, tiles: _Tiles) -> None:
        assert tiles.row_ids is not None and tiles.col_ids is not None
        self.a, self.x, self.y = tiles.a, tiles.row_operand(slice(0, tiles.M)), tiles.y
        ids, numbers = torch.cat((tiles.row_ids, tiles.col_ids)).unique(return_inverse=True)
        self._ids, (self._rows, self._cols) = len(ids), numbers.split((tiles.M, tiles.N))

    def of_columns(self, values: Tensor) -> Tensor:
        """Of each row the sum of ``values`` [N, ...] over the columns of its id, [M, ...]."""
        return self._sum(values, self._cols).index_select(0, self._rows)

    def of_rows(self, values: Tensor) -> Tensor:
        """Of each column the sum of ``values`` [M, ...] over the rows of its id, [N, ...]."""
        return self._sum(values, self._rows).index_select(0, self._cols)

    def _sum(self, values: Tensor, where: Tensor) -> Tensor:
        return values.new_zeros(self._ids, *values.shape[1:]).index_add_(0, where, values)

    def similarities(self) -> tuple[Tensor, Tensor]:
        """Sums of S over the pairs of equal id, of rows [M] and of columns [N]."""
        a, sides = self.a, []
        for own, others, sums, bias, bias_of_others in (
            (self.x, self.y, self.of_columns, a.row_bias, a.col_bias),
            (self.y, self.x, self.of_rows, a.col_bias, a.row_bias),
        ):
            total = a.scale * torch.linalg.vecdot(own, sums(others))
            if bias is not None:
                count = sums(others.new_ones(len(others)))
                total += torch.where(count > 0, count * bias, 0.0)
            sides.append((total if bias_of_others is None else total + sums(bias_of_others)).double())
        return sides[0], sides[1]

    def gradients(self, of_rows: Tensor | None, of_cols: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """sum_j dS_ij y_j [M, D], sum_i dS_ij x_i [N, D], sum_j dS_ij, sum_i dS_ij of dS_ij = of_rows_i + of_cols_j for equal ids, or 0."""
        r, c = (side.new_zeros(len(side)) if grad is None else grad.to(side.dtype) for side, grad in ((self.x, of_rows), (self.y, of_cols)))
        by_rows, by_cols = self.of_columns(c[:, None] * self.y), self.of_rows(r[:, None] * self.x)
        rows, cols = self.of_columns(torch.ones_like(c)), self.of_rows(torch.ones_like(r))
        by_rows += r[:, None] * self.of_columns(self.y)
        by_cols += c[:, None] * self.of_rows(self.x)
        return by_rows, by_cols, r * rows + self.of_columns(c), c * cols + self.of_rows(r)


class _Running:
    """log2(sum(2^L)) per row or column, accumulated as a sum relative to a maximum; ``common`` is that of all, while there is one."""

    def __init__(self, length: int, like: Tensor) -> None:
        self.maximum = like.new_zeros(length)
        self.total = like.new_zeros(length)
        self.common: float | None = None

    def add(self, where: slice, maximum: float | Tensor, total: Tensor) -> None:
        """Add sums that are relative to ``maximum``, a number or one per entry."""
        if isinstance(maximum, float):
            if self.common is None and not self.total.any():
                self.common = maximum
                self.maximum.fill_(maximum)
            if self.common == maximum:
                self.total[where] += total
                return
            maximum = total.new_tensor(maximum)
        known = self.maximum[where].masked_fill(self.total[where] == 0, -torch.inf)
        highest = torch.maximum(known, maximum)
        shift = finite(highest)
        self.total[where] = self.total[where] * (known - shift).exp2() + total * (maximum - shift).exp2()
        self.maximum[where] = shift
        self.common = None

    def lse(self) -> Tensor:
        """The natural logarithm."""
        return (self.maximum.double() + self.total.double().log2()) * LN2


def _accumulate(L: Tensor, buffer: Tensor, rows: _Running, cols: _Running, i: slice, j: slice, bounded: bool) -> None:
    """Add a tile to the sums of its rows and columns; L is overwritten."""
    shift = 0.0
    if not bounded:
        row_max, col_max = L.amax(1), L.amax(0)
        on_cpu = L.device.type == "cpu"
        found = _shift(min(row_max.min().item(), col_max.min().item()), row_max.max().item(), SPREAD) if on_cpu else None
        if found is None:
            torch.sub(L, finite(col_max), out=buffer).exp2_()
            cols.add(j, col_max, buffer.sum(0))
            L.sub_(finite(row_max)[:, None]).exp2_()
            rows.add(i, row_max, L.sum(1))
            return
        shift = found
    if shift:
        L.sub_(shift)
    L.exp2_()
    rows.add(i, shift, L.sum(1))
    cols.add(j, shift, L.sum(0))


def _shift(lowest: float, highest: float, spread: float) -> float | None:
    """One t for 2^(L - t), when maxima or log-sum-exps lie between ``lowest`` and ``highest``; None if there is none."""
    if RANGE[0] <= lowest and highest <= RANGE[1]:
        return 0.0
    return highest if math.isfinite(highest) and highest - lowest <= spread else None


def forward(a: Inputs, stash: Tensor) -> Results:
    """Log-sum-exps of the rows and columns of S, and its offset diagonal. ``stash``, from ``new_stash``, is filled."""
    tiles = _Tiles(a)
    like = tiles.y
    counted = _Running(tiles.M, like), _Running(tiles.N, like)
    alike = (_Running(tiles.M, like), _Running(tiles.N, like)) if a.both else None
    positive = like.new_zeros(0 if a.offset is None else tiles.M)
    bounded = tiles.bounded(RANGE[1])
    for i in tiles.rows():
        scaled = tiles.scaled(tiles.row_operand(i))
        for j in tiles.cols():
            L, buffer = tiles.similarities(scaled, i, j)
            tiles.keep(stash, L, i, j)
            diagonal, where = tiles.positives(L, i, j)
            positive[where] = (diagonal.double() * LN2).to(tiles.acc)
            same = None if a.sums else tiles.same(i, j)
            if alike is not None and same is not None:
                _accumulate(L.masked_fill(~same, -torch.inf), buffer, *alike, i, j, bounded)
            elif same is not None:
                L.masked_fill_(~same if a.ids == "only" else same, -torch.inf)
            _accumulate(L, buffer, *counted, i, j, bounded)
    if a.sums:
        of_positives = _Alike(tiles).similarities()
    else:
        row_none, col_none = (like.new_empty(0, dtype=torch.float64) for _ in range(2))
        of_positives = (row_none, col_none) if alike is None else (alike[0].lse(), alike[1].lse())
    return Results(counted[0].lse(), counted[1].lse(), *of_positives, positive)


class _Side:
    """Gradients of the log-sum-exps of one side, as weights of 2^(L - something); nothing flows where a sum is empty."""

    def __init__(self, lse: Tensor, grad: Tensor | None, acc: torch.dtype) -> None:
        self.grad = grad
        self.lse = lse.double().masked_fill(lse == -torch.inf, torch.inf) / LN2
        if grad is None:
            return
        self.rounded = self.lse.to(acc)
        lost = (self.lse - self.rounded).masked_fill(self.lse == torch.inf, 0.0)
        self.weight = ((-lost).exp2() * grad).to(acc)

    def shifted(self, shift: float) -> Tensor | None:
        """What 2^(L - shift) is multiplied by."""
        return None if self.grad is None else ((shift - self.lse).exp2() * self.grad).to(self.weight.dtype)


class _Flow:
    """exp(S - row_lse) * g_row + exp(S - col_lse) * g_col for tiles of L, from one exp2 where one shift serves all of them."""

    def __init__(self, row: _Side, col: _Side) -> None:
        self.row, self.col = row, col
        sides = [side.lse for side in (row, col) if side.grad is not None]
        self.shift = None
        if sides and sides[0].device.type == "cpu":
            finite = [lse.masked_fill(lse == torch.inf, -torch.inf).max().item() for lse in sides]
            self.shift = _shift(min(lse.min().item() for lse in sides), max(finite), GRADIENT_SPREAD)
        if self.shift is not None:
            self.u, self.v = row.shifted(self.shift), col.shifted(self.shift)

    def tile(self, L: Tensor, buffer: Tensor, i: slice, j: slice) -> Tensor:
        """In place of L."""
        row, col = self.row, self.col
        if row.grad is None and col.grad is None:
            return L.zero_()
        if self.shift is not None:
            if self.shift:
                L.sub_(self.shift)
            L.exp2_()
            if self.v is None:
                return L if self.u is None else L.mul_(self.u[i, None])
            return L.mul_(self.v[j] if self.u is None else torch.add(self.u[i, None], self.v[j], out=buffer))
        if col.grad is not None:
            torch.sub(L, col.rounded[j], out=buffer).exp2_().mul_(col.weight[j])
        if row.grad is None:
            return L.copy_(buffer)
        L.sub_(row.rounded[i, None]).exp2_().mul_(row.weight[i, None])
        return L if col.grad is None else L.add_(buffer)


def backward(g: ResultGrads, a: Inputs, results: Results, needs: Needs, stash: Tensor) -> Grads:
    """Gradients of the inputs. The log-sum-exps in ``results`` may be those of a larger matrix that holds this one."""
    tiles = _Tiles(a)
    M, N, D = tiles.M, tiles.N, a.x.shape[1]
    new = tiles.y.new_zeros
    counted = _Flow(_Side(results.row, g.row, tiles.acc), _Side(results.col, g.col, tiles.acc))
    if a.both:
        alike = _Flow(_Side(results.row_positives, g.row_positives, tiles.acc), _Side(results.col_positives, g.col_positives, tiles.acc))
    by_y = needs.y or needs.col_scale
    by_x = needs.x or needs.row_scale or (needs.scale and not by_y)
    d_x = empty(a.x, (M, D) if needs.x else (0,), a.x.dtype)
    d_y = zeros(tiles.y, (N, D) if by_y else (0,), tiles.acc)
    d_scale = new(() if needs.scale else 0)
    d_row_bias, d_col_bias = new(M if needs.row_bias else 0), new(N if needs.col_bias else 0)
    d_row_scale, d_col_scale = new(M if needs.row_scale else 0), new(N if needs.col_scale else 0)
    products = new(tiles.tile_m if by_x else 0, D)
    of_sums = None
    if a.sums and not (g.row_positives is None and g.col_positives is None):
        of_sums, *more = _Alike(tiles).gradients(g.row_positives, g.col_positives)
        for total, part in zip((d_y, d_row_bias, d_col_bias), more, strict=True):
            if len(total):
                total.copy_(part)
    for i in tiles.rows():
        row_operand = tiles.row_operand(i)
        scaled = tiles.scaled(row_operand)
        A = products[: i.stop - i.start]  # sum over j of dS_ij * col_scale_j * y_j
        for j in tiles.cols():
            L, buffer = tiles.stashed(stash, i, j) or tiles.similarities(scaled, i, j)
            same, positives = None if a.sums else tiles.same(i, j), None
            if same is not None and a.both:
                positives = L.masked_fill(~same, -torch.inf)
            elif same is not None:
                L.masked_fill_(~same if a.ids == "only" else same, -torch.inf)
            dS = counted.tile(L, buffer, i, j)
            if positives is not None:
                dS.add_(alike.tile(positives, buffer, i, j))
            if g.positive is not None:
                diagonal, where = tiles.positives(dS, i, j)
                diagonal.add_(g.positive[where])
            if by_x:
                torch.addmm(A, dS, tiles.y[j], beta=min(j.start, 1), out=A)
            if by_y:
                d_y[j].addmm_(dS.T, row_operand)
            if needs.row_bias:
                d_row_bias[i] += dS.sum(1)
            if needs.col_bias:
                d_col_bias[j] += dS.sum(0)
        if not by_x:
            continue
        if of_sums is not None:
            A += of_sums[i]
        if needs.row_scale:
            d_row_scale[i] = torch.linalg.vecdot(tiles.exact(a.x[i]), A) * a.scale
        if needs.scale:
            d_scale += torch.linalg.vecdot(row_operand, A).sum()
        if needs.x:
            d_x[i] = A * (a.scale if a.row_scale is None else a.scale * a.row_scale[i, None])
    if by_y:
        if needs.scale and not by_x:
            d_scale += torch.linalg.vecdot(tiles.y, d_y).sum()
        d_y *= a.scale
        if needs.col_scale:
            d_col_scale = torch.linalg.vecdot(tiles.exact(a.y), d_y)
        if a.col_scale is not None:
            d_y *= a.col_scale[:, None]
    d_y = d_y.to(a.y.dtype) if needs.y else a.y.new_empty(0)
    return Grads(d_x, d_y, d_scale, d_row_bias, d_col_bias, d_row_scale, d_col_scale)
