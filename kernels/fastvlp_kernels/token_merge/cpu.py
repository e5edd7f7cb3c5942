"""ToMe's matching and merging in plain PyTorch: padded batches of similar segments; only rows of several tokens are computed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvlp_kernels._inputs import sum_dtype
from fastvlp_kernels._ragged import Batch, batches

SIMILARITIES = 1 << 19  # held at once: what the cache of a CPU core takes


def match(
    metric: Tensor, lengths: Tensor, most: Tensor, threshold: float | None, protected: int, keep_order: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The row within its segment that each token goes to, which tokens are merged away [T], and how many of each segment [S].

    lengths: int64 [S] on the CPU. most: int64 [S], how many tokens may go at most, 0 where there is nothing to merge into.
    """
    row = torch.empty(metric.shape[0], dtype=torch.int64, device=metric.device)
    gone = torch.empty(metric.shape[0], dtype=torch.bool, device=metric.device)
    merged = torch.zeros(len(lengths), dtype=torch.int64, device=metric.device)
    for batch in batches(lengths, metric.device, 4 * SIMILARITIES, square=True):
        away, partner, rank = _away(metric, batch, most[batch.segments], threshold, protected)
        number = away.sum(1, keepdim=True)
        here = torch.empty_like(batch.tokens)
        if keep_order:
            here = torch.cumsum(batch.inside, 1) - 1
            # Each token's row is its place less the tokens before it that went; those stand at even places only.
            here[:, ::2] -= away.cumsum(1)
            here[:, 1::2] -= away.cumsum(1)[:, : here.shape[1] // 2]
        else:
            left_a = batch.inside[:, ::2].sum(1, keepdim=True) - number
            here[:, ::2] = rank - number if protected == 0 else (~away).cumsum(1) - 1
            here[:, 1::2] = left_a + torch.arange(here.shape[1] // 2, device=here.device)
        if here.shape[1] > 1:
            here[:, ::2] = torch.where(away, here[:, 1::2].gather(1, partner), here[:, ::2])
        lost = torch.zeros_like(batch.inside)
        lost[:, ::2] = away
        batch.write(here, row)
        batch.write(lost, gone)
        merged[batch.segments] = number.squeeze(1)
    return row, gone, merged


def _away(metric: Tensor, batch: Batch, most: Tensor, threshold: float | None, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens of even place [B, ceil(width / 2)]: which go, to which token of odd place, and their rank by similarity."""
    vectors = batch.read(metric).to(sum_dtype(metric.dtype))
    norm = vectors.norm(dim=2, keepdim=True)
    # A vector of zeros or infinities has no direction: its cosine is 0 with everything, in every implementation.
    directed = (norm > 0) & (norm < torch.inf)
    unit = vectors / norm
    if not directed.all():
        unit.masked_fill_(~directed, 0)
    a, b = unit[:, ::2], unit[:, 1::2].transpose(1, 2)
    hidden = None
    if not batch.full or protected > 1:
        hidden = ~batch.inside[:, None, 1::2]
        hidden[:, :, : protected // 2] = True
    best = torch.full_like(a[:, :, 0], -torch.inf)
    partner = torch.zeros_like(best, dtype=torch.int64)
    count = min(int(most.max()), a.shape[1])
    few = 2 * count <= a.shape[1]  # a maximum alone is far cheaper than one with its place
    if b.shape[2]:
        step = max(1, SIMILARITIES // (b.shape[0] * b.shape[2]))
        for first in range(0, a.shape[1], step):
            rows = slice(first, first + step)
            similarity = _similarity(a[:, rows], b, hidden)
            if few:
                best[:, rows] = similarity.amax(2)
            else:
                best[:, rows], partner[:, rows] = similarity.max(2)
    best.masked_fill_(~batch.inside[:, ::2], -torch.inf)
    # Protected tokens come last in the ranking, so that ``most`` never reaches them.
    best[:, : (protected + 1) // 2] = -torch.inf
    order = best.argsort(dim=1, descending=True, stable=True)
    if few and b.shape[2]:
        top = order[:, :count]
        # Only those that merge away have to know their partner: their similarities are made once more, for the place of the maximum.
        going = a.gather(1, top[:, :, None].expand(-1, -1, a.shape[2]))
        partner.scatter_(1, top, _similarity(going, b, hidden).argmax(2))
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    away = rank < most[:, None]
    return away if threshold is None else away & (best >= threshold), partner, rank


def _similarity(a: Tensor, b: Tensor, hidden: Tensor | None) -> Tensor:
    similarity = torch.bmm(a, b)
    return similarity if hidden is None else similarity.masked_fill_(hidden, -torch.inf)


def listing(source: Tensor, gone: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """``order`` and ``starts`` of a plan: the tokens of each row, the one that stayed first."""
    starts = source.new_zeros(rows + 1)
    torch.cumsum(torch.bincount(source, minlength=rows), 0, out=starts[1:])
    order = torch.empty_like(source)
    stayed, went = (~gone).nonzero().squeeze(1), gone.nonzero().squeeze(1)
    order.index_copy_(0, starts.index_select(0, source.index_select(0, stayed)), stayed)
    went = went[source[went].argsort(stable=True)]
    # Every row before holds one token that stayed, so the k-th that went is behind row + 1 of those and k that went.
    order[source[went] + 1 + torch.arange(len(went), device=went.device)] = went
    return order, starts


def merge(x: Tensor, size: Tensor | None, order: Tensor, starts: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """x [R, C] in its dtype and size [R] in float32 (float64 for float64)."""
    if size is None:
        sizes = x.new_ones(x.shape[0], dtype=torch.float32)
    else:
        sizes = size.to(sum_dtype(size.dtype))
    if x.shape[0] == 0:
        return x.new_zeros(starts.shape[0] - 1, x.shape[1]), sizes.new_zeros(starts.shape[0] - 1)
    # Not by x[index], which is several times slower than index_select on CPUs.
    first = order.index_select(0, starts[:-1].clamp_max(x.shape[0] - 1))
    out, size_out = x.index_select(0, first), sizes.index_select(0, first)
    empty = (starts.diff() == 0).nonzero().squeeze(1)
    if len(empty):
        out[empty], size_out[empty] = 0, 0
    rows, numbers = _several(starts)
    total, acc = size_out[rows], out.index_select(0, rows).to(sum_dtype(x.dtype))
    if mode == "mean":
        acc *= total[:, None]
    for k, number in enumerate(numbers, start=1):
        tokens = order[starts[rows[:number]] + k]
        extra, weight = x.index_select(0, tokens).to(acc.dtype), sizes[tokens]
        total[:number] += weight
        if mode == "amax":
            acc[:number] = torch.maximum(acc[:number], extra)
        elif mode == "mean":
            acc[:number].addcmul_(extra, weight[:, None])
        else:
            acc[:number] += extra
    if mode == "mean":
        acc /= torch.where(total > 0, total, 1)[:, None]
    return out.index_copy_(0, rows, acc.to(x.dtype)), size_out.index_copy_(0, rows, total)


def _several(starts: Tensor) -> tuple[Tensor, list[int]]:
    """The rows of several tokens, those of most first, and how many of them have a k-th token after their first, k = 1, 2, ..."""
    count = starts.diff()
    rows = (count > 1).nonzero().squeeze(1)
    count, order = count[rows].sort(descending=True, stable=True)
    histogram = torch.bincount(count)
    return rows[order], histogram.flip(0).cumsum(0).flip(0)[2:].tolist()


def merge_backward(
    grad: Tensor, grad_size: Tensor, x: Tensor, size: Tensor | None, out: Tensor, size_out: Tensor, source: Tensor, order: Tensor,
    starts: Tensor, mode: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of x and size; [0] where ``needs`` says no."""
    dx = grad.index_select(0, source) if needs[0] else x.new_empty(0)
    dsize = grad_size.index_select(0, source) if needs[1] else size_out.new_empty(0)
    if mode == "amax" and needs[0]:
        _first_maxima(dx, grad, x, out, order, starts)
    if mode == "mean":
        tokens = (starts.diff() > 1).index_select(0, source).nonzero().squeeze(1)
        rows = source[tokens]
        g, total = grad.index_select(0, rows).to(sum_dtype(x.dtype)), size_out[rows].to(sum_dtype(x.dtype))
        share = torch.where(total > 0, 1 / total, 0)
        # The derivative of a weighted mean by a weight: (x - mean) / total.
        if needs[1]:
            dsize[tokens] += ((g * (x[tokens] - out[rows].to(g.dtype))).sum(1) * share).to(dsize.dtype)
        if needs[0]:
            weight = share if size is None else share * size[tokens].to(share.dtype)
            dx.index_copy_(0, tokens, (g * weight[:, None]).to(dx.dtype))
    return dx, dsize if size is None else dsize.to(size.dtype)


def _first_maxima(dx: Tensor, grad: Tensor, x: Tensor, out: Tensor, order: Tensor, starts: Tensor) -> None:
    """Leave the gradient of a maximum to the first token of its row that has it."""
    rows, numbers = _several(starts)
    wanted = torch.ones(len(rows), x.shape[1], dtype=torch.bool, device=x.device)
    for k, number in enumerate([len(rows), *numbers]):
        at = rows[:number]
        tokens = order[starts[at] + k]
        hit = wanted[:number] & (x[tokens] == out[at])
        dx[tokens] = torch.where(hit, grad[at], 0)
        wanted[:number] &= ~hit
