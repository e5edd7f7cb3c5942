"""similarity_attend in cache-sized tiles of plain torch: two products forward, five backward, which recomputes S."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .._inputs import sum_dtype
from .arguments import Grads, Inputs, Needs, ResultGrads, Results

# Two tiles of S (1 MiB each in float32) stay in the second-level caches of two cores.
TILE = 512
# S is made in units of log 2: exp2 is three times as fast as exp where MKL's exp is not tuned for the processor.
LOG2E = 1 / math.log(2)
# exp2(S) itself serves, without a maximum, while all of |S| stays below this.
BOUND = 43.0


class _Tiles:
    """The features as products read them, and tiles of S / log 2 in buffers that are allocated once."""

    def __init__(self, a: Inputs) -> None:
        self.a = a
        self.acc = sum_dtype(a.dtype)
        self.M, self.N = len(a.x), len(a.y)
        self.y, self.v = self.exact(a.y), self.exact(a.v)
        # The products with log2(e) are rounded once, element by element: an error of the scale itself would not average out.
        self.scale = a.scale.double() * LOG2E
        self.row_bias, self.col_bias = (None if bias is None else (bias.double() * LOG2E).to(self.acc) for bias in (a.row_bias, a.col_bias))
        self.row_ids = None if a.row_ids is None else a.row_ids.masked_fill(a.row_ids < 0, -1)
        self.col_ids = None if a.col_ids is None else a.col_ids.masked_fill(a.col_ids < 0, -2)
        # At most a third of each side, so that a tile is never a large part of S.
        self.tile_m, self.tile_n = (min(TILE, max(16, -(-size // 3))) for size in (self.M, self.N))
        self._buffers = [self.y.new_empty(self.tile_m * self.tile_n) for _ in range(2)]

    def exact(self, features: Tensor) -> Tensor:
        return features.to(self.a.dtype).to(self.acc)

    def rows(self) -> Iterator[slice]:
        return (slice(i, min(i + self.tile_m, self.M)) for i in range(0, self.M, self.tile_m))

    def cols(self) -> Iterator[slice]:
        return (slice(j, min(j + self.tile_n, self.N)) for j in range(0, self.N, self.tile_n))

    def scaled(self, x: Tensor) -> Tensor:
        return (x.double() * self.scale).to(self.acc)

    def buffer(self, which: int, i: slice, j: slice) -> Tensor:
        m, n = i.stop - i.start, j.stop - j.start
        return self._buffers[which][: m * n].view(m, n)

    def similarities(self, scaled: Tensor, constant: Tensor | None, i: slice, j: slice) -> Tensor:
        """S[i, j] / log 2 with ``constant``, one per row of S, in place of the row bias; -inf where a pair does not count."""
        S = torch.mm(scaled, self.y[j].T, out=self.buffer(0, i, j))
        if constant is not None:
            S.add_(constant[i, None])
        if self.col_bias is not None:
            S.add_(self.col_bias[j])
        if self.row_ids is not None and self.col_ids is not None:
            same = self.row_ids[i, None] == self.col_ids[j]
            S.masked_fill_(~same if self.a.ids == "only" else same, -torch.inf)
        return S

    def bounded(self) -> bool:
        """Whether all |S| / log 2 lie below BOUND by Cauchy-Schwarz. It reads values, so only on the CPU."""
        if self.y.device.type != "cpu":
            return False
        longest = max(torch.linalg.vector_norm(self.exact(self.a.x[i]), dim=1).max().item() for i in self.rows())
        bound = abs(self.scale.item()) * longest * torch.linalg.vector_norm(self.y, dim=1).max().item()
        for bias in (self.row_bias, self.col_bias):
            bound += 0.0 if bias is None else bias.abs().max().item()
        return bound <= BOUND


def _finite(maximum: Tensor) -> Tensor:
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def forward(a: Inputs) -> Results:
    """softmax(S) v and the log-sum-exps of the rows of S."""
    tiles = _Tiles(a)
    new, bounded = tiles.y.new_empty, tiles.bounded()
    out, lse = new(tiles.M, tiles.v.shape[1]), new(tiles.M, dtype=torch.float64)
    for i in tiles.rows():
        scaled, sums = tiles.scaled(tiles.exact(a.x[i])), out[i]
        total = new(len(sums)).zero_()
        highest = torch.full_like(total, -torch.inf)
        shift = torch.zeros_like(total)
        for j in tiles.cols():
            S = tiles.similarities(scaled, tiles.row_bias, i, j)
            if not bounded:
                higher = torch.maximum(highest, S.amax(1))
                shift = _finite(higher)
                if j.start:
                    known = (highest - shift).exp2_()
                    total.mul_(known)
                    sums.mul_(known[:, None])
                highest = higher
                S.sub_(shift[:, None])
            total += S.exp2_().sum(1)
            torch.addmm(sums, S, tiles.v[j], beta=min(j.start, 1), out=sums)
        lse[i] = (shift.double() + total.double().log2()) / LOG2E
        sums.div_(total.masked_fill(total == 0, 1.0)[:, None])
    return Results(out, lse)


class _Flow:
    """What a row of gradients brings: P = exp2(S + constant) * lost, and dS = P * (<g, v> + g_lse - <g, out>)."""

    def __init__(self, g: ResultGrads, tiles: _Tiles, results: Results) -> None:
        lse = results.lse.double() * LOG2E
        constant = -lse if tiles.a.row_bias is None else tiles.a.row_bias.double() * LOG2E - lse
        constant = constant.masked_fill(lse == -torch.inf, -torch.inf)
        self.constant = constant.to(tiles.acc)
        # What rounding took from the log-sum-exp is a factor of the row, and joins its gradients.
        self.lost = (constant - self.constant).masked_fill(constant == -torch.inf, 0.0).exp2().to(tiles.acc)
        self.g, self.out = g, results.out

    def rows(self, i: slice) -> tuple[Tensor | None, Tensor]:
        """Gradients of out [rows, E] and g_lse - <g, out> [rows], both with the factor."""
        lost = self.lost[i]
        c = torch.zeros_like(lost) if self.g.lse is None else self.g.lse[i] * lost
        if self.g.out is None:
            return None, c
        g = self.g.out[i] * lost[:, None]
        return g, c - torch.linalg.vecdot(g, self.out[i])


def backward(g: ResultGrads, a: Inputs, results: Results, needs: Needs, whole: bool) -> Grads:
    """Gradients of the inputs. Unless this is the ``whole`` matrix, ``results`` are those of a larger one that shares its rows."""
    tiles = _Tiles(a)
    flow = _Flow(g, tiles, results)
    M, N, D, E = tiles.M, tiles.N, a.x.shape[1], a.v.shape[1]
    new = tiles.y.new_zeros
    by_y = needs.y
    by_x = needs.x or (needs.scale and not by_y)
    d_x = torch.empty((M, D) if needs.x else 0, dtype=a.x.dtype, device=a.x.device)
    d_y, d_v = new((N, D) if by_y else 0), new((N, E) if needs.v else 0)
    d_scale = new(() if needs.scale else 0)
    d_row_bias, d_col_bias = new(M if needs.row_bias else 0), new(N if needs.col_bias else 0)
    products = new(tiles.tile_m if by_x else 0, D)
    for i in tiles.rows():
        x = tiles.exact(a.x[i])
        scaled = tiles.scaled(x)
        g_out, c = flow.rows(i)
        A = products[: i.stop - i.start]  # sum over j of dS_ij * y_j
        for j in tiles.cols():
            P = tiles.similarities(scaled, flow.constant, i, j).exp2_()
            if needs.v and g_out is not None:
                d_v[j].addmm_(P.T, g_out)
            if not needs.similarities:
                continue
            if g_out is None:
                dS = P.mul_(c[:, None])
            else:
                dS = torch.mm(g_out, tiles.v[j].T, out=tiles.buffer(1, i, j)).add_(c[:, None]).mul_(P)
            if by_x:
                torch.addmm(A, dS, tiles.y[j], beta=min(j.start, 1), out=A)
            if by_y:
                d_y[j].addmm_(dS.T, x)
            if needs.row_bias and not whole:
                d_row_bias[i] += dS.sum(1)
            if needs.col_bias:
                d_col_bias[j] += dS.sum(0)
        if needs.scale and by_x:
            d_scale += torch.linalg.vecdot(x, A).sum()
        if needs.x:
            d_x[i] = A * a.scale
    if needs.scale and not by_x:
        d_scale += torch.linalg.vecdot(tiles.y, d_y).sum()
    if needs.row_bias and whole and g.lse is not None:
        d_row_bias.copy_(g.lse)  # the sum of a row of dS
    d_y *= a.scale
    return Grads(d_x, d_y.to(a.y.dtype), d_v.to(a.v.dtype), d_scale, d_row_bias, d_col_bias)
