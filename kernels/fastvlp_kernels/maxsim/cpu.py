"""maxsim in cache-sized tiles of plain torch, for the CPU and for any device without Triton.

Forward: one sweep over tiles of products. Backward: the products once more, for the places of the maxima, and two products of the
sparse dS with the features. The places are not kept from the forward: they would take Tx * N + Ty * M entries.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastvlp_kernels._inputs import sum_dtype

from .plan import Piece, Tile, check, plan

# Tokens of x and of y in a tile: 2 MiB of float32 products. Wide, because the maxima over y run along rows.
ROWS, COLS = 512, 1024


class _Side:
    """The features of one side in the order of its plan, as products read them."""

    def __init__(self, name: str, features: Tensor, cu: Tensor, dtype: torch.dtype, size: int) -> None:
        starts = tuple(cu.tolist())
        check(name, starts, len(features))
        # At most a third of each side, so that a tile is never a large part of all products.
        self.plan = plan(starts, min(size, max(32, -(-len(features) // 3))), columns=name == "y")
        self.like = features
        self.order, self.tokens, self.owners = (index.to(features.device) for index in self.plan[1:])
        self.features = features.index_select(0, self.tokens).to(dtype).to(sum_dtype(dtype))
        self.lengths = cu.diff().to(features.device, torch.int64)[self.order]
        self.widest = max((tile.tokens.stop - tile.tokens.start for tile in self.plan.tiles), default=0)

    def gradient(self, total: Tensor) -> Tensor:
        """``total`` in the order, dtype and shape of the caller's features; tokens of no segment get zero."""
        out = torch.zeros_like(self.like, memory_format=torch.contiguous_format)
        return out.index_copy_(0, self.tokens, total.to(out.dtype))


class _Tiles:
    """Tiles of products in a buffer that is allocated once, another of its size, and what is known of segments that tiles cut."""

    def __init__(self, x: Tensor, y: Tensor, cu_x: Tensor, cu_y: Tensor, dtype: torch.dtype) -> None:
        self.x, self.y = _Side("x", x, cu_x, dtype, ROWS), _Side("y", y, cu_y, dtype, COLS)
        self._buffers = [self.x.features.new_empty(self.x.widest * self.y.widest) for _ in range(2)]

    def buffers(self, X: Tile, Y: Tile) -> tuple[Tensor, Tensor]:
        m, n = X.tokens.stop - X.tokens.start, Y.tokens.stop - Y.tokens.start
        first, second = (flat[: m * n].view(m, n) for flat in self._buffers)
        return first, second

    def products(self, X: Tile, Y: Tile) -> tuple[Tensor, Tensor]:
        """<x_i, y_j> of a tile, and a buffer of its shape."""
        S, buffer = self.buffers(X, Y)
        return torch.mm(self.x.features[X.tokens], self.y.features[Y.tokens].T, out=S), buffer


def _split(S: Tensor, piece: Piece, dim: int) -> Tensor:
    """The piece's part of a tile, with ``dim`` split into segments and tokens."""
    return S.narrow(dim, piece.start, piece.size).unflatten(dim, (piece.number, piece.length))


def _column_maxima(S: Tensor, piece: Piece) -> Tensor:
    """[rows, segments] of the piece's columns."""
    if not piece.alive:
        return _split(S, piece, 1).amax(2)
    best = S[:, piece.start : piece.start + piece.number].clone()
    for token, where, alive in piece.steps():
        if token:
            torch.maximum(best[:, alive], S[:, where], out=best[:, alive])
    return best


def _column_sums(values: Tensor, piece: Piece) -> Tensor:
    """The same, sums."""
    if not piece.alive:
        return _split(values, piece, 1).sum(2)
    total = values.new_zeros(len(values), piece.number)
    for _, where, alive in piece.steps():
        total[:, alive] += values[:, where]
    return total


def _first(S: Tensor, dim: int, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima along ``dim`` of a 3-d view and the first place of each, several times as fast as ``torch.max`` with its places."""
    length = S.shape[dim]
    maximum = S.amax(dim, keepdim=True)
    shape = [1] * 3
    shape[dim] = length
    # The first of equal maxima has the highest rank, so that one more maximum finds it.
    rank = torch.arange(length, 0, -1, dtype=S.dtype, device=S.device).view(shape)
    ranks = torch.eq(S, maximum, out=buffer.flatten()[: S.numel()].view(S.shape)).mul_(rank)
    # A NaN equals nothing and has rank 0: any place will do.
    return maximum.squeeze(dim), (length - ranks.amax(dim)).clamp_max_(length - 1).long()


def _first_column(S: Tensor, piece: Piece, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, segments]: maxima over the piece's columns, and the first column of the tile that attains each."""
    if not piece.alive:
        best, place = _first(_split(S, piece, 1), 2, buffer)
        return best, place.add_(piece.start + piece.length * torch.arange(piece.number, device=S.device))
    best = S[:, piece.start : piece.start + piece.number].clone()
    place = torch.arange(piece.start, piece.start + piece.number, device=S.device).expand(best.shape).contiguous()
    for token, where, alive in piece.steps():
        if token:
            candidate, column = S[:, where], torch.arange(where.start, where.stop, device=S.device)
            torch.where(candidate > best[:, alive], column, place[:, alive], out=place[:, alive])
            torch.maximum(best[:, alive], candidate, out=best[:, alive])
    return best, place


def _first_rows(S: Tensor, tile: Tile, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """[segments, columns]: maxima over the rows of each segment of the tile, and the first row of the tile that attains each."""
    values, places = [], []
    for piece in tile.pieces:
        value, place = _first(_split(S, piece, 0), 1, buffer)
        values.append(value)
        places.append(place.add_((piece.start + piece.length * torch.arange(piece.number, device=S.device))[:, None]))
    return torch.cat(values), torch.cat(places)


def forward(
    x: Tensor, y: Tensor, cu_x: Tensor, cu_y: Tensor, max_seqlen_x: int | None, mean: bool, to_y: bool, to_x: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x_to_y and y_to_x [M, N]; a direction that is not wanted has no elements."""
    t = _Tiles(x, y, cu_x, cu_y, dtype)
    M, N = len(t.x.order), len(t.y.order)
    x_to_y, y_to_x = (t.x.features.new_zeros((M, N) if wanted else (0, 0)) for wanted in (to_y, to_x))
    highest = t.y.features.new_empty(len(t.y.features) if to_x else 0)  # over the part so far of a segment of x that tiles cut
    for X in t.x.plan.tiles:
        best = t.x.features.new_zeros(X.tokens.stop - X.tokens.start, N if to_y else 0)
        for Y in t.y.plan.tiles:
            S, _ = t.products(X, Y)
            for piece in Y.pieces if to_y else ():
                part, whole = _column_maxima(S, piece), best[:, piece.segments]
                whole.copy_(part if piece.begins else torch.maximum(whole, part))
            if to_x:
                part = torch.cat([_split(S, piece, 0).amax(1) for piece in X.pieces])
                if not X.begins:
                    part = torch.maximum(part, highest[Y.tokens])
                # A segment that tiles cut has its maximum only when the last of them is seen.
                if not X.ends:
                    highest[Y.tokens] = part[0]
                    continue
                for piece in Y.pieces:
                    y_to_x[X.segments, piece.segments] += _column_sums(part, piece)
        for piece in X.pieces if to_y else ():
            x_to_y[piece.segments] += _split(best, piece, 0).sum(1)
    if mean and to_y:
        x_to_y /= t.x.lengths.clamp_min(1)[:, None]
    if mean and to_x:
        y_to_x /= t.y.lengths.clamp_min(1)
    return _restored(x_to_y, t), _restored(y_to_x, t)


def _restored(scores: Tensor, t: _Tiles) -> Tensor:
    """Scores of segments in the order of the plans, in the caller's."""
    if scores.numel() == 0:
        return scores
    rows = torch.empty_like(scores).index_copy_(0, t.x.order, scores)
    return torch.empty_like(scores).index_copy_(1, t.y.order, rows)


def _arranged(grad: Tensor | None, t: _Tiles, lengths: Tensor | None) -> Tensor | None:
    """The other way round, divided by the lengths of a mean."""
    if grad is None:
        return None
    grad = grad[t.x.order][:, t.y.order].to(t.x.features.dtype)
    return grad if lengths is None else grad / lengths.clamp_min(1)


def _groups(tiles: tuple[Tile, ...]) -> Iterator[list[Tile]]:
    """Tiles of rows: one by one, or all those of a segment that is longer than a tile."""
    group: list[Tile] = []
    for tile in tiles:
        group.append(tile)
        if tile.ends:
            yield group
            group = []


def _places(t: _Tiles, group: list[Tile], to_y: bool, to_x: bool) -> tuple[Tensor, Tensor]:
    """Where the maxima are: columns [rows, N] and rows [segments, Ty], for the rows and segments of ``group``."""
    first, segments, size = group[0].tokens.start, group[0].segments, group[-1].tokens.stop - group[0].tokens.start
    columns = t.x.owners.new_zeros(size, len(t.y.order) if to_y else 0)
    rows = t.x.owners.new_zeros(segments.stop - segments.start, len(t.y.features) if to_x else 0)
    highest = t.x.features.new_empty(rows.shape)
    for X in group:
        part = columns[X.tokens.start - first : X.tokens.stop - first]
        best = t.x.features.new_empty(part.shape)
        for Y in t.y.plan.tiles:
            S, buffer = t.products(X, Y)
            for piece in Y.pieces if to_y else ():
                found = _first_column(S, piece, buffer)
                _note(part[:, piece.segments], best[:, piece.segments], *found, Y.tokens.start, piece.begins, piece.ends)
            if to_x:
                found = _first_rows(S, X, buffer)
                _note(rows[:, Y.tokens], highest[:, Y.tokens], *found, X.tokens.start, X.begins, X.ends)
    return columns, rows


def _note(places: Tensor, best: Tensor, value: Tensor, place: Tensor, start: int, begins: bool, ends: bool) -> None:
    """Write the places within a tile that begins at ``start``; where tiles cut the segments, only those of the highest values so far."""
    if begins:
        torch.add(place, start, out=places)
    else:
        torch.where(value > best, place + start, places, out=places)
        value = torch.maximum(best, value)
    if not ends:
        best.copy_(value)


def _scatter(dS: Tensor, dim: int, index: Tensor, grad: Tensor) -> None:
    """Add ``grad`` at the places ``index`` along ``dim`` of a tile; those outside lie in other tiles of the same segment."""
    inside = (index >= 0) & (index < dS.shape[dim])
    dS.scatter_add_(dim, index.clamp_(0, dS.shape[dim] - 1), torch.where(inside, grad, 0.0))


def backward(
    g_x_to_y: Tensor | None, g_y_to_x: Tensor | None, x: Tensor, y: Tensor, cu_x: Tensor, cu_y: Tensor, max_seqlen_x: int | None,
    mean: bool, dtype: torch.dtype, need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y in their dtypes; no elements where not needed."""
    t = _Tiles(x, y, cu_x, cu_y, dtype)
    to_y = _arranged(g_x_to_y, t, t.x.lengths[:, None] if mean else None)
    to_x = _arranged(g_y_to_x, t, t.y.lengths if mean else None)
    dx, dy = (torch.zeros_like(side.features) if need else side.features.new_empty(0) for side, need in ((t.x, need_x), (t.y, need_y)))
    for group in _groups(t.x.plan.tiles):
        # Places are found again instead of kept: they would take as much memory as there are tokens times segments.
        columns, rows = _places(t, group, to_y is not None, to_x is not None)
        first = group[0].tokens.start
        for X, Y in itertools.product(group, t.y.plan.tiles):
            dS, _ = t.buffers(X, Y)
            dS.zero_()
            if to_y is not None:
                part = slice(X.tokens.start - first, X.tokens.stop - first)
                _scatter(dS, 1, columns[part, Y.segments] - Y.tokens.start, to_y[t.x.owners[X.tokens], Y.segments])
            if to_x is not None:
                _scatter(dS, 0, rows[:, Y.tokens] - X.tokens.start, to_x[X.segments].index_select(1, t.y.owners[Y.tokens]))
            if need_x:
                dx[X.tokens].addmm_(dS, t.y.features[Y.tokens])
            if need_y:
                dy[Y.tokens].addmm_(dS.T, t.x.features[X.tokens])
    return t.x.gradient(dx) if need_x else dx.to(x.dtype), t.y.gradient(dy) if need_y else dy.to(y.dtype)
