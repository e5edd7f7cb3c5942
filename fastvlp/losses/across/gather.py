"""The losses with every process's texts gathered: one block [b, N] per process, column statistics reduced in O(N).

Only the texts travel, in the dtype of the products, and their gradients back. Memory: O(N * D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlp_kernels._logsumexp import LogSumExp

from ..autograd import apply, no_second_derivatives
from ..softmax_terms import symmetric_softmax
from .blocks import sigmoid_block, softmax_block, softmax_block_backward
from .split_batch import SplitBatch


def gather_texts(text: Tensor, batch: SplitBatch) -> Tensor:
    """All texts [N, D] of the batch in the dtype of the products."""
    return batch.members.gather_rows(text.to(batch.dtype).contiguous(), batch.sizes)


def return_gradient(of_texts: Tensor, batch: SplitBatch) -> Tensor:
    """This process's rows of the sum over processes of ``of_texts`` [N, D]."""
    return batch.members.scatter_sum(of_texts.to(batch.travels), batch.sizes, batch.sums)


class GatherRows(torch.autograd.Function):
    """Every process's rows, in the dtype of sums; they travel in the dtype of products, and so do their gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, batch: SplitBatch) -> Tensor:
        ctx.batch = batch
        return gather_texts(rows, batch).to(batch.sums)

    @staticmethod
    @no_second_derivatives
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return return_gradient(gradient, ctx.batch), None


def gather_rows(rows: Tensor, batch: SplitBatch) -> Tensor:
    """The rows [N, D] of all members in the dtype of ``rows``, with gradients; they travel as operands of products do."""
    if batch.members.size == 1:
        return rows
    whole: Tensor = apply(GatherRows, rows.to(batch.sums), batch)
    return whole.to(rows.dtype)


class MergeColumns(torch.autograd.Function):
    """This process's columns [K, n] of the log-sum-exps (or ``sums``) over processes of [K, N], as two tensors.

    A column's gradient goes to each process's part of it, times exp(part - log-sum-exp).
    """

    @staticmethod
    def forward(ctx: Any, reference: Tensor, log: Tensor, batch: SplitBatch, sums: bool) -> tuple[Tensor, Tensor]:
        if sums:
            whole, share = LogSumExp(reference, batch.members.sum(log)), torch.ones_like(log[:, :1])
        else:
            # The gradient of a merged log-sum-exp for one process's part is that part's share of the sum.
            whole, share = batch.members.merge(LogSumExp(reference, log))
        ctx.save_for_backward(share)
        ctx.batch = batch
        # Copies, since views would keep the columns of all processes alive.
        own, log = (part.split(batch.sizes, 1)[batch.members.rank].clone() for part in whole)
        ctx.mark_non_differentiable(own)
        return own, log

    @staticmethod
    @no_second_derivatives
    def backward(ctx: Any, _: Tensor, gradient: Tensor) -> tuple[None, Tensor, None, None]:
        (share,) = ctx.saved_tensors
        return None, share * ctx.batch.members.gather_rows(gradient.T.contiguous(), ctx.batch.sizes).T, None, None


def merge_columns(partial: LogSumExp, batch: SplitBatch, sums: bool = False) -> LogSumExp:
    """See ``MergeColumns``."""
    return LogSumExp(*apply(MergeColumns, *partial, batch, sums))


class SoftmaxGather(torch.autograd.Function):
    """The softmax loss: row statistics are complete at once, column statistics after two reductions of N numbers."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, batch: SplitBatch, trains: list[bool]) -> Tensor:
        rank = batch.members.rank
        ctx.dtypes = image.dtype, text.dtype
        image, texts = image.to(batch.dtype), gather_texts(text, batch)
        row, column, positive = softmax_block(image, texts, scale, batch.start(rank))
        column = batch.members.logsumexp(column)
        ctx.save_for_backward(image, texts, scale, *row, *column, positive)
        ctx.batch, ctx.trains = batch, trains
        return symmetric_softmax(row, batch.own(column), positive, positive, batch.factor)

    @staticmethod
    @no_second_derivatives
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, *statistics, positive = ctx.saved_tensors
        row, column = LogSumExp(*statistics[:2]), LogSumExp(*statistics[2:])
        batch: SplitBatch = ctx.batch
        rank = batch.members.rank
        weights = batch.members.gather(gradient * (batch.factor / 2))
        # Upstream gradients differ between processes (loss scaling, weights): a column's is that of the process that owns its text.
        of_columns = torch.cat([weight.expand(size) for weight, size in zip(weights, batch.sizes, strict=True)])
        of_image, of_texts, of_scale = softmax_block_backward(
            image, texts, scale, batch.start(rank), row, column, positive, weights[rank].expand(len(image)), of_columns, ctx.trains
        )
        if of_image is not None:
            of_image = of_image.to(ctx.dtypes[0])
        of_text = None if of_texts is None else return_gradient(of_texts, batch).to(ctx.dtypes[1])
        return of_image, of_text, of_scale, None, None


class SigmoidGather(torch.autograd.Function):
    """The sigmoid loss: gradients are made in the forward; those of the texts are weighted and summed over processes in the backward."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, batch: SplitBatch, trains: list[bool]) -> Tensor:
        ctx.dtypes = image.dtype, text.dtype
        image, texts = image.to(batch.dtype), gather_texts(text, batch)
        loss, *gradients = sigmoid_block(image, texts, scale, bias, batch.start(batch.members.rank), trains)
        ctx.save_for_backward(*gradients)
        ctx.batch = batch
        return loss * batch.factor

    @staticmethod
    @no_second_derivatives
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # The loss is one number, so that its gradients were made with it and only wait for their factor.
        of_image, of_texts, of_scale, of_bias = ctx.saved_tensors
        batch: SplitBatch = ctx.batch
        factor = gradient * batch.factor
        if of_image is not None:
            of_image = (of_image * factor).to(ctx.dtypes[0])
        of_text = None if of_texts is None else return_gradient(of_texts * factor, batch).to(ctx.dtypes[1])
        scalars = (None if part is None else part * factor for part in (of_scale, of_bias))
        return of_image, of_text, *scalars, None, None
