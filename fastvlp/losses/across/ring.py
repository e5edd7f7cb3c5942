"""The losses of which each process holds a part of the texts at a time, as a plain ring or grouped by nodes.

Features, and gradients inside a node, travel in the dtype of the products; between nodes, where every hop adds to them, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlp_kernels._logsumexp import LogSumExp, merge

from ..autograd import no_second_derivatives
from ..softmax_terms import symmetric_softmax
from .blocks import sigmoid_block, softmax_block, softmax_block_backward
from .circulate import circulate, summed
from .split_batch import SplitBatch

UNEQUAL = (
    "SigLipLoss strategy='ring' or 'grouped': the upstream gradient of the loss differs between processes; give all processes' losses the "
    "same weight, or use strategy='gather'"
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


class SoftmaxRing(torch.autograd.Function):
    """The softmax loss: a trip for the statistics, and one back for the gradients, which begins with the block that the first ended with,
    so that no hop stands alone. Of the whole batch a process keeps one number per column.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, batch: SplitBatch, trains: list[bool]) -> Tensor:
        rank = batch.members.rank
        ctx.dtypes = image.dtype, text.dtype
        # Contiguous, since the texts travel as they lie in memory.
        image, text = image.to(batch.dtype), text.to(batch.dtype).contiguous()
        rows: list[LogSumExp] = []
        positives: list[Tensor] = []
        columns = image.new_empty(2, sum(batch.sizes), dtype=batch.sums)

        def visit(block: Tensor, owners: list[int]) -> None:
            part, of_columns, of_pairs = softmax_block(image, block, scale, offset_of(batch, owners))
            rows[:] = [merge(*rows, part)]
            batch.place(columns, torch.stack(of_columns), owners)
            if rank in owners:
                positives.append(of_pairs)

        held = circulate(batch, text, 1, visit).held
        (row,), (positive,) = rows, positives
        column = batch.members.logsumexp(LogSumExp(*columns))
        ctx.save_for_backward(image, text, scale, *row, *column, positive, *held)
        ctx.batch, ctx.trains = batch, trains
        return symmetric_softmax(row, batch.own(column), positive, positive, batch.factor)

    @staticmethod
    @no_second_derivatives
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, *statistics, positive = ctx.saved_tensors[:8]
        held = ctx.saved_tensors[8:]
        row, column = LogSumExp(*statistics[:2]), LogSumExp(*statistics[2:])
        batch: SplitBatch = ctx.batch
        # A process may weigh its loss otherwise than others: the columns of its block get its weight, rows here ours.
        weights = batch.members.gather(gradient * (batch.factor / 2))
        of_row = weights[batch.members.rank].expand(len(image))
        totals = Totals(batch.sums)

        def visit(block: Tensor, owners: list[int]) -> Tensor | None:
            of_column = torch.cat([weights[owner].expand(batch.sizes[owner]) for owner in owners])
            of_image, of_block, of_scale = softmax_block_backward(
                image, block, scale, offset_of(batch, owners), row, batch.take(column, owners), positive, of_row, of_column, ctx.trains
            )
            totals.add(of_image, of_scale)
            return None if of_block is None else of_block.to(batch.sums)

        of_text = circulate(batch, text, -1, visit, held).gradient()
        of_image, of_scale = totals.values
        parts = (None if part is None else part.to(dtype) for part, dtype in zip((of_image, of_text), ctx.dtypes, strict=True))
        return *parts, of_scale, None, None


class SigmoidRing(torch.autograd.Function):
    """The sigmoid loss and its gradients in one trip; the last hop may take until the backward.

    Text gradients are summed over processes before any is differentiated, so that the upstream gradient must be one number; a difference is
    an error.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, batch: SplitBatch, trains: list[bool]) -> Tensor:
        ctx.dtypes = image.dtype, text.dtype
        image, text = image.to(batch.dtype), text.to(batch.dtype).contiguous()
        totals = Totals(batch.sums)

        def visit(block: Tensor, owners: list[int]) -> Tensor | None:
            loss, of_image, of_block, of_scale, of_bias = sigmoid_block(image, block, scale, bias, offset_of(batch, owners), trains)
            totals.add(loss, of_image, of_scale, of_bias)
            return of_block

        circulated = circulate(batch, text, 1, visit)
        loss, *gradients = totals.values
        ctx.save_for_backward(circulated.own, *gradients)
        ctx.home, ctx.batch = circulated.home, batch
        assert loss is not None
        return loss * batch.factor

    @staticmethod
    @no_second_derivatives
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_text, of_image, of_scale, of_bias = ctx.saved_tensors
        batch: SplitBatch = ctx.batch
        factor = gradient * batch.factor
        if of_text is not None:
            everyone = batch.members.gather(factor)
            # NaN differs from itself: a loss that went wrong must not be taken for unequal weights.
            same = ((everyone == factor) | everyone.isnan() | factor.isnan()).all()
            # Text gradients were summed on their way, before the upstream gradients were known; asked without a wait for the device.
            torch._assert_async(same, UNEQUAL)
            of_text = (summed([of_text, *ctx.home.wait()], batch.sums) * factor).to(ctx.dtypes[1])
        if of_image is not None:
            of_image = (of_image * factor).to(ctx.dtypes[0])
        scalars = (None if part is None else part * factor for part in (of_scale, of_bias))
        return of_image, of_text, *scalars, None, None


def offset_of(batch: SplitBatch, owners: list[int]) -> int | None:
    """Where the pairs of a block with the own images are, which are visited by themselves."""
    return 0 if batch.members.rank in owners else None
