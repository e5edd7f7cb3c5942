"""linear_cross_entropy in chunks of rows of plain PyTorch, for the CPU and for any device without Triton.

A chunk of logits becomes its own gradient in place, and both products are made before the next: three products of 2 T V D.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .._cpu_products import bf16_products, pays
from .._inputs import sum_dtype
from .._memory import empty, zeros
from .rows import IGNORED, Inputs, Rows, coefficients, losses

# Elements of a chunk of logits: at most MOST (64 MiB in float32), at least LEAST, for one pass over the weights costs as much as that.
MOST, LEAST = 2**24, 2**20
# Elements of the part of a chunk whose passes run in a cache.
CACHED = 2**18


def sweep(a: Inputs, grad: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [T], and the gradients of x, weight and bias that ``needs`` names when that of the losses is ``grad`` [T] (None: none).

    All in the dtype of sums; what is not made has 0 elements.
    """
    T, V = a.x.shape[0], a.weight.shape[0]
    fast = pays(a.x.device, a.dtype, a.x.shape[1] * LEAST)
    acc = sum_dtype(a.dtype)
    need_x, need_weight, need_bias = needs if grad is not None else (False, False, False)
    dweight = zeros(a.weight, a.weight.shape if need_weight else (0,), acc)
    dbias = zeros(a.weight, (V if need_bias else 0,), acc)
    weight = a.weight.to(a.dtype).to(acc)
    bias = None if a.bias is None else a.bias.to(acc)

    # Rows that are not counted, as padding is, cost nothing where looking for them costs no synchronisation.
    kept = (a.targets != IGNORED).nonzero()[:, 0] if a.x.device.type == "cpu" else None
    if kept is None or len(kept) == T:
        part, part_grad = a, grad
    else:
        part = a._replace(x=a.x.index_select(0, kept), targets=a.targets.index_select(0, kept))
        part_grad = None if grad is None else grad.index_select(0, kept)
    loss = a.x.new_zeros(part.x.shape[0], dtype=acc)
    dx = empty(a.x, part.x.shape if need_x else (0,), acc)

    chunks = list(_chunks(part.x.shape[0], V))
    # One buffer for all chunks, whose pages are touched for the first time only once.
    buffer = empty(a.x, (max((rows.stop - rows.start for rows in chunks), default=0) * V,), acc)
    for rows in chunks:
        x = part.x[rows].to(a.dtype).to(acc)
        logits = buffer[: len(x) * V].view(len(x), V)
        with bf16_products(fast):
            torch.mm(x, weight.T, out=logits)
        chunk = part._replace(x=x, targets=part.targets[rows])
        _differentiate(logits, bias, chunk, loss[rows], part_grad[rows] if part_grad is not None and any(needs) else None)
        with bf16_products(fast):
            if need_x:
                torch.mm(logits, weight, out=dx[rows])
            if need_weight:
                dweight.addmm_(logits.T, x)
        if need_bias:
            dbias += logits.sum(0)
    if part is not a:
        assert kept is not None
        loss = loss.new_zeros(T).index_copy_(0, kept, loss)
        dx = zeros(a.x, a.x.shape, acc).index_copy_(0, kept, dx) if need_x else dx
    return loss, dx, dweight, dbias


def _chunks(T: int, V: int) -> Iterator[slice]:
    """At most a ninth of the rows where that is not little."""
    rows = max(1, min(MOST // V, -(-T // 9)), LEAST // V)
    return (slice(i, min(i + rows, T)) for i in range(0, T, rows))


def _differentiate(logits: Tensor, bias: Tensor | None, a: Inputs, loss: Tensor, grad: Tensor | None) -> None:
    """Write the losses of a chunk of rows and turn its logits into their gradient."""
    step = max(1, CACHED // logits.shape[1])
    for i in range(0, len(logits), step):
        rows = slice(i, i + step)
        tile, targets = logits[rows], a.targets[rows]
        part = a._replace(targets=targets)
        # Targets that are not counted are negative, and may read any logit.
        place = targets.clamp_min(0)[:, None]
        if bias is not None:
            tile.add_(bias)
        peak = tile.amax(1)
        tile.sub_(peak[:, None])
        target = tile.gather(1, place)[:, 0]
        mean = tile.mean(1) if a.label_smoothing else tile.new_empty(0)
        # The target is left out of the sum, so that a loss near 0 keeps its digits.
        others = tile.exp_().scatter_(1, place, 0.0).sum(1)
        statistics = Rows(peak, others, target, mean)
        torch.add(losses(statistics, part), 0, out=loss[rows])
        if grad is None:
            continue
        factor, uniform, at_target = coefficients(statistics, part, grad[rows])
        tile.mul_(factor[:, None])
        if a.label_smoothing:
            tile.sub_(uniform[:, None])
        tile.scatter_(1, place, at_target[:, None])
