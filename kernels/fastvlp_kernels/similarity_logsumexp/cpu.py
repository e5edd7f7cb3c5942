"""similarity_logsumexp in cache-sized tiles of plain torch: a sweep forward, and one back that recomputes S or reads it from a stash."""

import torch
from torch import Tensor

from .._cpu_products import bf16_products
from .._inputs import sum_dtype
from .._logsumexp import LogSumExp, from_sums, merge
from .._memory import empty, zeros
from .._tiles import Tiles, finite, tile_sides
from .arguments import Grads, Inputs, Needs, ResultGrads, Results, own_logits

# exp(S) itself serves, without a reference, while maxima or log-sum-exps lie this close to 0: sums, the terms that count in them and the
# factors of gradients are normal numbers. A reference that rows and columns share elsewhere would cost digits of S - reference.
RANGE = 62.0


def stash_shape(M: int, N: int, dtype: torch.dtype, stash_bytes: int) -> tuple[int, int]:
    """The stash: [tiles, elements of a tile] in the dtype of sums, the first tiles of the sweep; [0, 0] without a budget."""
    if stash_bytes == 0:
        return 0, 0
    tile_m, tile_n = tile_sides(M, N)
    size = tile_m * tile_n
    return min(-(-M // tile_m) * -(-N // tile_n), stash_bytes // (size * sum_dtype(dtype).itemsize)), size


def new_stash(a: Inputs, stash_bytes: int) -> Tensor:
    """Where the forward leaves tiles of S for the backward, at most ``stash_bytes``."""
    return a.x.new_empty(stash_shape(len(a.x), len(a.y), a.dtype, stash_bytes), dtype=sum_dtype(a.dtype))


class _Tiles(Tiles):
    """Tiles of a matrix with factors per row and column, a diagonal of positives, and a stash."""

    def __init__(self, a: Inputs) -> None:
        super().__init__(a.x, a.y, a.scale, a.row_bias, a.col_bias, a.row_ids, a.col_ids, a.dtype)
        self.a = a
        if a.col_scale is not None:
            self.y = self.y * a.col_scale[:, None]
        self.fast = self.fast and a.row_scale is None and a.col_scale is None

    def row_operand(self, i: slice) -> Tensor:
        """[rows, D]: x_i times its row scale."""
        x = super().row_operand(i)
        return x if self.a.row_scale is None else x * self.a.row_scale[i, None]

    def similarities(self, scaled: Tensor, i: slice, j: slice) -> tuple[Tensor, Tensor]:
        """S[i, j] and a buffer of its shape; ``scaled``: of row_operand(i)."""
        S, buffer = self.buffers(i, j)
        self.product(scaled, j, S)
        if self.row_bias is not None:
            S.add_(self.row_bias[i, None])
        if self.col_bias is not None:
            S.add_(self.col_bias[j])
        return S, buffer

    def stashed(self, stash: Tensor, i: slice, j: slice) -> tuple[Tensor, Tensor] | None:
        """The same from the stash, or None where it ends."""
        place = self._stash_place(i, j)
        if place >= len(stash):
            return None
        S, buffer = self.buffers(i, j)
        S.copy_(stash[place, : S.numel()].view_as(S))
        return S, buffer

    def keep(self, stash: Tensor, S: Tensor, i: slice, j: slice) -> None:
        """Leave S in the stash while it has room."""
        place = self._stash_place(i, j)
        if place < len(stash):
            stash[place, : S.numel()].view_as(S).copy_(S)
            # Tiles at the edge are smaller; what an operator gives has to be the same in every run, the rest of the tile too.
            stash[place, S.numel() :] = 0

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
            sides.append(total if bias_of_others is None else total + sums(bias_of_others))
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
    """Sums of exp(S - reference) per row or column."""

    def __init__(self, length: int, like: Tensor) -> None:
        self.reference = like.new_zeros(length)
        self.total = like.new_zeros(length)
        self._plain = True  # while every reference is 0

    def add(self, where: slice, reference: Tensor | None, total: Tensor) -> None:
        """Add sums that are relative to ``reference``; None: to 0."""
        if reference is None and self._plain:
            self.total[where] += total
            return
        self._plain = False
        reference = torch.zeros_like(total) if reference is None else reference
        # Where nothing was summed yet, the old reference means nothing and must not win the maximum.
        known = self.reference[where].masked_fill(self.total[where] == 0, -torch.inf)
        shift = finite(torch.maximum(known, reference))
        self.total[where] = self.total[where] * (known - shift).exp() + total * (reference - shift).exp()
        self.reference[where] = shift

    def lse(self, own: Tensor | None) -> LogSumExp:
        """Of the sums and of ``own``, one more logit for each."""
        others = from_sums(self.reference, self.total, self.total.dtype)
        return others if own is None else merge(others, LogSumExp(own, torch.zeros_like(own)))


def _accumulate(S: Tensor, buffer: Tensor, rows: _Running, cols: _Running, i: slice, j: slice, bounded: bool) -> None:
    """Add a tile to the sums of its rows and columns; S is overwritten."""
    if not bounded:
        row_max, col_max = S.amax(1), S.amax(0)
        # One exp serves rows and columns where no maximum is far from 0; another device would have to wait for the answer.
        plain = S.device.type == "cpu" and min(row_max.min().item(), col_max.min().item()) >= -RANGE and row_max.max().item() <= RANGE
        if not plain:
            torch.sub(S, finite(col_max), out=buffer).exp_()
            cols.add(j, col_max, buffer.sum(0))
            S.sub_(finite(row_max)[:, None]).exp_()
            rows.add(i, row_max, S.sum(1))
            return
    S.exp_()
    rows.add(i, None, S.sum(1))
    cols.add(j, None, S.sum(0))


def forward(a: Inputs, stash: Tensor) -> Results:
    """Log-sum-exps of the rows and columns of S, and its offset diagonal. ``stash``, from ``new_stash``, is filled."""
    tiles = _Tiles(a)
    like = tiles.y
    counted = _Running(tiles.M, like), _Running(tiles.N, like)
    alike = (_Running(tiles.M, like), _Running(tiles.N, like)) if a.both else None
    positive = like.new_zeros(0 if a.offset is None else tiles.M)
    bounded = tiles.bounded(RANGE)
    for i in tiles.rows():
        scaled = tiles.scaled(tiles.row_operand(i))
        for j in tiles.cols():
            S, buffer = tiles.similarities(scaled, i, j)
            tiles.keep(stash, S, i, j)
            diagonal, where = tiles.positives(S, i, j)
            # Own pairs are kept apart and join the sums at the end, see ``Own``.
            positive[where] = diagonal
            diagonal.fill_(-torch.inf)
            same = None if a.sums else tiles.same(i, j)
            if alike is not None and same is not None:
                _accumulate(S.masked_fill(~same, -torch.inf), buffer, *alike, i, j, bounded)
            elif same is not None:
                S.masked_fill_(~same if a.ids == "only" else same, -torch.inf)
            _accumulate(S, buffer, *counted, i, j, bounded)
    own = own_logits(a, positive)
    row_positives, col_positives = (LogSumExp(like.new_empty(0), like.new_empty(0)) for _ in range(2))
    if a.sums:
        row_positives, col_positives = (LogSumExp(torch.zeros_like(total), total) for total in _Alike(tiles).similarities())
    elif alike is not None:
        row_positives, col_positives = _with_own(alike, own.alike, a)
    return Results(*_with_own(counted, own.counted, a), row_positives, col_positives, positive)


def _with_own(sums: tuple[_Running, _Running], own: Tensor | None, a: Inputs) -> tuple[LogSumExp, LogSumExp]:
    """Of rows and of columns; ``own``: see ``Own``."""
    rows, cols = sums
    return rows.lse(own), cols.lse(None if own is None else of_columns(own, a, -torch.inf))


def of_columns(values: Tensor, a: Inputs, missing: float) -> Tensor:
    """``values`` [M] of rows by the columns [N] that are their partners."""
    M, rows = len(a.x), torch.arange(len(a.y), device=values.device) - (a.offset or 0)
    return values[rows.clamp(0, M - 1)].masked_fill((rows < 0) | (rows >= M), missing)


def of_partners(values: Tensor, a: Inputs) -> Tensor:
    """``values`` [N] of columns by the rows [M] that are their partners; rows without one get any."""
    return values[(torch.arange(len(a.x), device=values.device) + (a.offset or 0)).clamp_(0, len(a.y) - 1)]


class _Side:
    """Gradients of the log-sum-exps of one side, as weights of exp(S - something); nothing flows where a sum is empty."""

    def __init__(self, lse: LogSumExp, grad: Tensor | None) -> None:
        empty = lse.reference == -torch.inf
        self.grad = None if grad is None else grad.masked_fill(empty, 0.0)
        self.lse = lse
        self.reference = lse.reference.masked_fill(empty, torch.inf)
        if self.grad is not None:
            self.weight = (self.grad * (-lse.log.double()).exp()).to(lse.log.dtype)

    def plain(self) -> Tensor | None:
        """What exp(S) is multiplied by."""
        if self.grad is None:
            return None
        return ((-self.reference.double() - self.lse.log.double()).exp() * self.grad).to(self.weight.dtype)


class _Flow:
    """exp(S - row_lse) * g_row + exp(S - col_lse) * g_col for tiles of S, from one exp where that of S itself serves."""

    def __init__(self, row: _Side, col: _Side, own: Tensor | None, a: Inputs) -> None:
        self.row, self.col = row, col
        sides = [side.reference for side in (row, col) if side.grad is not None]
        self.is_plain = bool(sides) and sides[0].device.type == "cpu" and all(
            side.min().item() >= -RANGE and side.masked_fill(side == torch.inf, -torch.inf).max().item() <= RANGE for side in sides
        )
        self.u, self.v = (row.plain(), col.plain()) if self.is_plain else (None, None)
        self.own = None if own is None else self._own(own, a)  # of the pairs (i, i + offset), float64 [M]

    def _own(self, own: Tensor, a: Inputs) -> Tensor:
        row, col, total = self.row, self.col, torch.zeros_like(own, dtype=torch.float64)
        if row.grad is not None:
            total += row.grad * row.lse.probability(own)
        if col.grad is not None:
            partner = LogSumExp(*(of_partners(part, a) for part in col.lse))
            total += of_partners(col.grad, a) * partner.probability(own)
        return total

    def tile(self, S: Tensor, buffer: Tensor, i: slice, j: slice) -> Tensor:
        """In place of S."""
        row, col = self.row, self.col
        if row.grad is None and col.grad is None:
            return S.zero_()
        if self.is_plain:
            S.exp_()
            if self.u is None or self.v is None:
                return S.mul_(self.v[j]) if self.v is not None else S if self.u is None else S.mul_(self.u[i, None])
            return S.mul_(torch.add(self.u[i, None], self.v[j], out=buffer))
        if col.grad is not None:
            torch.sub(S, col.reference[j], out=buffer).exp_().mul_(col.weight[j])
        if row.grad is None:
            return S.copy_(buffer)
        S.sub_(row.reference[i, None]).exp_().mul_(row.weight[i, None])
        return S if col.grad is None else S.add_(buffer)


def backward(g: ResultGrads, a: Inputs, results: Results, needs: Needs, stash: Tensor) -> Grads:
    """Gradients of the inputs. The log-sum-exps in ``results`` may be those of a larger matrix that holds this one."""
    tiles = _Tiles(a)
    M, N, D = tiles.M, tiles.N, a.x.shape[1]
    new = tiles.y.new_zeros
    own = own_logits(a, results.positive)
    counted = _Flow(_Side(results.row, g.row), _Side(results.col, g.col), own.counted, a)
    of_own = counted.own
    if a.both:
        alike = _Flow(_Side(results.row_positives, g.row_positives), _Side(results.col_positives, g.col_positives), own.alike, a)
        of_own = None if of_own is None or alike.own is None else of_own + alike.own
    if of_own is not None:
        of_own = (of_own if g.positive is None else of_own + g.positive).to(tiles.acc)
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
            S, buffer = tiles.stashed(stash, i, j) or tiles.similarities(scaled, i, j)
            same, positives = None if a.sums else tiles.same(i, j), None
            if same is not None and a.both:
                positives = S.masked_fill(~same, -torch.inf)
            elif same is not None:
                S.masked_fill_(~same if a.ids == "only" else same, -torch.inf)
            dS = counted.tile(S, buffer, i, j)
            if positives is not None:
                dS.add_(alike.tile(positives, buffer, i, j))
            if of_own is not None:
                diagonal, where = tiles.positives(dS, i, j)
                diagonal.copy_(of_own[where])
            with bf16_products(tiles.fast):
                if by_x:
                    # beta = 0 in the first tile: the buffer still holds the rows before.
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
        # d scale = <dS, x y^T> comes out of either product; a third one would be needed for itself alone.
        if needs.scale and not by_x:
            d_scale += torch.linalg.vecdot(tiles.y, d_y).sum()
        d_y *= a.scale
        if needs.col_scale:
            d_col_scale = torch.linalg.vecdot(tiles.exact(a.y), d_y)
        if a.col_scale is not None:
            d_y *= a.col_scale[:, None]
    d_y = d_y.to(a.y.dtype) if needs.y else a.y.new_empty(0)
    return Grads(d_x, d_y, d_scale, d_row_bias, d_col_bias, d_row_scale, d_col_scale)
