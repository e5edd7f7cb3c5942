"""similarity_attend in cache-sized tiles of plain torch: two products forward, five backward, which recomputes S."""

import torch
from torch import Tensor

from .._logsumexp import from_sums
from .._tiles import Tiles, finite
from .arguments import Grads, Inputs, Needs, ResultGrads, Results

# exp(S) itself serves, without a maximum, while all of |S| stays below this.
BOUND = 30.0


class _Tiles(Tiles):
    """Tiles of the matrix, and the values v."""

    def __init__(self, a: Inputs) -> None:
        super().__init__(a.x, a.y, a.scale, a.row_bias, a.col_bias, a.row_ids, a.col_ids, a.dtype)
        self.a, self.v = a, self.exact(a.v)
        self.fast = False  # weights of softmax are read by a second product, which would round them

    def similarities(self, scaled: Tensor, constant: Tensor | None, i: slice, j: slice) -> Tensor:
        """S[i, j] with ``constant``, one per row of S, in place of the row bias; -inf where a pair does not count."""
        S = self.product(scaled, j, self.buffers(i, j)[0])
        if constant is not None:
            S.add_(constant[i, None])
        if self.col_bias is not None:
            S.add_(self.col_bias[j])
        same = self.same(i, j)
        if same is not None:
            S.masked_fill_(~same if self.a.ids == "only" else same, -torch.inf)
        return S


def forward(a: Inputs) -> Results:
    """softmax(S) v and the log-sum-exps of the rows of S."""
    tiles = _Tiles(a)
    new, bounded = tiles.y.new_empty, tiles.bounded(BOUND)
    out, totals, references = new(tiles.M, tiles.v.shape[1]), new(tiles.M), new(tiles.M)
    for i in tiles.rows():
        scaled, sums = tiles.scaled(tiles.exact(a.x[i])), out[i]
        total = totals[i].zero_()
        highest = torch.full_like(total, -torch.inf)
        shift = torch.zeros_like(total)
        for j in tiles.cols():
            S = tiles.similarities(scaled, tiles.row_bias, i, j)
            if not bounded:
                higher = torch.maximum(highest, S.amax(1))
                shift = finite(higher)
                if j.start:
                    known = (highest - shift).exp_()
                    total.mul_(known)
                    sums.mul_(known[:, None])
                highest = higher
                S.sub_(shift[:, None])
            total += S.exp_().sum(1)
            torch.addmm(sums, S, tiles.v[j], beta=min(j.start, 1), out=sums)
        references[i] = shift
        sums.div_(total.masked_fill(total == 0, 1.0)[:, None])
    return Results(out, from_sums(references, totals, totals.dtype))


class _Flow:
    """What a row of gradients brings: P = exp(S + constant) * lost, and dS = P * (<g, v> + g_lse - <g, out>)."""

    def __init__(self, g: ResultGrads, tiles: _Tiles, results: Results) -> None:
        reference, log = (part.double() for part in results.lse)
        constant = -reference if tiles.a.row_bias is None else tiles.a.row_bias.double() - reference
        constant = (constant - log).masked_fill(reference == -torch.inf, -torch.inf)
        self.constant = constant.to(tiles.acc)
        # What rounding took from the log-sum-exp is a factor of the row, and joins its gradients.
        self.lost = (constant - self.constant).masked_fill(constant == -torch.inf, 0.0).exp().to(tiles.acc)
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
            P = tiles.similarities(scaled, flow.constant, i, j).exp_()
            if needs.v and g_out is not None:
                d_v[j].addmm_(P.T, g_out)
            if not needs.similarities:
                continue
            if g_out is None:
                dS = P.mul_(c[:, None])
            else:
                dS = torch.mm(g_out, tiles.v[j].T, out=tiles.buffers(i, j)[1]).add_(c[:, None]).mul_(P)
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
