"""The losses as a ring: each process passes the texts on while it computes with them, and holds two blocks at a time.

Every trip lasts as long as the larger of W block computations and W hops. Features travel in the dtype of the products; gradients on
their way are sums that each process adds to, and travel in float32, since lower precision would round them again at every hop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blocks import sigmoid_block, softmax_block, softmax_block_backward
from .inputs import Batch
from .members import Transfer

UNEQUAL = (
    "SigLipLoss strategy='ring': the upstream gradient of the loss differs between processes; give all processes' losses the same weight, "
    "or use strategy='gather'"
)


class Totals:
    """Running sums in ``dtype`` of the parts that the blocks give; None stays None."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.values: list[Tensor | None] = []

    def add(self, *parts: Tensor | None) -> None:
        """Add the parts of one block, which the sums may keep and overwrite."""
        if not self.values:
            self.values = [None if part is None else part.to(self._dtype) for part in parts]
            return
        for total, part in zip(self.values, parts, strict=True):
            if total is not None and part is not None:
                total.add_(part)


def tour(batch: Batch, block: Tensor, direction: int, visit: Callable[[Tensor, int], Tensor | None]) -> tuple[Tensor, Transfer]:
    """Call ``visit(block, owner)`` for the blocks of all other members, the next one in flight meanwhile; blocks move by ``direction``.

    Args:
        block: [sizes[owner], D] the block to begin with, whose owner is the neighbour at ``rank - direction``.
        visit: returns this member's part of the block's gradient, or always None. The parts follow the block one hop behind,
            are summed on the way, and end at their owner.

    Returns:
        The last block visited, which belongs to the neighbour at ``rank + direction``; and the transfer that brings home the gradient
        of this member's own block, summed over all others (nothing, if there are no parts).
    """
    size = batch.members.size

    def owner(hop: int) -> int:
        return (batch.members.rank - direction * hop) % size

    carried: list[Tensor] = []
    for hop in range(1, size):
        onward, rows = ([block], [batch.sizes[owner(hop + 1)]]) if hop < size - 1 else ([], [])
        transfer = batch.members.shift(direction, onward + carried, rows + [batch.sizes[owner(hop)]] * len(carried))
        part = visit(block, owner(hop))
        arrived = transfer.wait()
        if part is not None:
            carried = [part + arrived[-1] if carried else part]
        if onward:
            block = arrived[0]
    return block, batch.members.shift(direction, carried, [batch.sizes[owner(size)]] * len(carried))


class SoftmaxRing(torch.autograd.Function):
    """The softmax loss: a trip for the statistics, and one back, the other way round, for the gradients.

    The way back begins with the block that the way there ended with, and ends with this process's own, so that no hop of it stands
    alone. Of the whole batch a process keeps one number per column.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, batch: Batch, trains: list[bool]) -> Tensor:
        rank = batch.members.rank
        ctx.dtypes = image.dtype, text.dtype
        image, text = image.to(batch.dtype), text.to(batch.dtype).contiguous()
        first = batch.members.shift(1, [text], [batch.sizes[rank - 1]])
        row, own, positive = softmax_block(image, text, scale, 0)
        column = row.new_empty(sum(batch.sizes))
        columns = column.split(batch.sizes)
        columns[rank].copy_(own)

        def visit(block: Tensor, owner: int) -> None:
            part, of_columns, _ = softmax_block(image, block, scale, None)
            torch.logaddexp(row, part, out=row)
            columns[owner].copy_(of_columns)

        last, _ = tour(batch, first.wait()[0], 1, visit)
        column = batch.members.logsumexp(column)
        ctx.save_for_backward(image, text, last, scale, row, column)
        ctx.batch, ctx.trains = batch, trains
        return ((row - positive) + (column.split(batch.sizes)[rank] - positive)).sum() * (batch.factor / 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, text, last, scale, row, column = ctx.saved_tensors
        batch: Batch = ctx.batch
        rank = batch.members.rank
        columns = column.split(batch.sizes)
        weights = batch.members.gather(gradient * (batch.factor / 2))
        totals = Totals(batch.sums)

        def visit(block: Tensor, owner: int) -> Tensor | None:
            of_row, of_column = weights[rank].expand(len(row)), weights[owner].expand(len(block))
            of_image, of_block, of_scale = softmax_block_backward(
                image, block, scale, 0 if owner == rank else None, row, columns[owner], of_row, of_column, ctx.trains
            )
            totals.add(of_image, of_scale)
            return None if of_block is None else of_block.to(batch.sums)

        _, home = tour(batch, last, -1, visit)
        of_text = visit(text, rank)
        if of_text is not None:
            of_text = (of_text + home.wait()[0]).to(ctx.dtypes[1])
        of_image, of_scale = totals.values
        return None if of_image is None else of_image.to(ctx.dtypes[0]), of_text, of_scale, None, None


class SigmoidRing(torch.autograd.Function):
    """The sigmoid loss and its gradients in one trip; the last hop, which brings the text gradients home, may take until the backward.

    The text gradients are summed over processes before any of them is differentiated, so that the upstream gradient must be the
    same number on all of them. It is compared, and a difference is an error.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, batch: Batch, trains: list[bool]) -> Tensor:
        rank = batch.members.rank
        ctx.dtypes = image.dtype, text.dtype
        image, text = image.to(batch.dtype), text.to(batch.dtype).contiguous()
        first = batch.members.shift(1, [text], [batch.sizes[rank - 1]])
        totals = Totals(batch.sums)

        def visit(block: Tensor, owner: int) -> Tensor | None:
            loss, of_image, of_block, of_scale, of_bias = sigmoid_block(image, block, scale, bias, 0 if owner == rank else None, trains)
            totals.add(loss, of_image, of_scale, of_bias)
            return of_block

        of_text = visit(text, rank)
        _, ctx.home = tour(batch, first.wait()[0], 1, visit)
        loss, *gradients = totals.values
        ctx.save_for_backward(of_text, *gradients)
        ctx.batch = batch
        assert loss is not None
        return loss * batch.factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_text, of_image, of_scale, of_bias = ctx.saved_tensors
        batch: Batch = ctx.batch
        factor = gradient * batch.factor
        if of_text is not None:
            everyone = batch.members.gather(factor)
            same = ((everyone == factor) | everyone.isnan() | factor.isnan()).all()
            torch._assert_async(same, UNEQUAL)
            of_text = ((of_text + ctx.home.wait()[0]) * factor).to(ctx.dtypes[1])
        if of_image is not None:
            of_image = (of_image * factor).to(ctx.dtypes[0])
        scalars = (None if part is None else part * factor for part in (of_scale, of_bias))
        return of_image, of_text, *scalars, None, None
