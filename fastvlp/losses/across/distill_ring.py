"""The losses of a student with a teacher, of which each process holds a part of the texts at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlp_kernels._logsumexp import LogSumExp, merge

from ..autograd import no_second_derivatives
from ..softmax_terms import symmetric_softmax
from .blocks import Both, distill_block, distill_block_backward
from .circulate import circulate
from .ring import Totals, offset_of
from .split_batch import SplitBatch


class DistillRing(torch.autograd.Function):
    """Both losses: a trip for the statistics and one back for the gradients, as ``SoftmaxRing``; a text travels with its teacher's.

    Rows' averages sum_j T_ij text_j merge by their log-sum-exps; of a column one number is enough, <text_j, sum_i T'_ij image_i>.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, teacher_image: Tensor, teacher_text: Tensor, temperature: Tensor,
        batch: SplitBatch, trains: list[bool],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rank, members = batch.members.rank, batch.members
        ctx.dtypes = image.dtype, text.dtype
        images = Both(*(features.to(batch.dtype).to(batch.sums) for features in (image, teacher_image)))
        texts = torch.cat([text.to(batch.dtype), teacher_text.to(batch.dtype)], 1)
        scales = Both(scale, temperature)
        rows: list[Both[LogSumExp]] = []
        positives: list[Tensor] = []
        mean = torch.zeros_like(images.student)
        columns = mean.new_empty(5, sum(batch.sizes))  # log-sum-exps of student and teacher, and the mean similarity

        def visit(block: Tensor, owners: list[int]) -> None:
            found = distill_block(images, _both(block, image, batch), scales, offset_of(batch, owners), batch.dtype)
            if rows:
                # Two averages with log-sum-exps a and b merge with the weight sigmoid(b - a): no sum of exponentials is ever stored.
                mean.lerp_(found.mean, torch.sigmoid(found.row.teacher.minus(rows[0].teacher))[:, None])
                rows[:] = [Both(*(merge(*pair) for pair in zip(rows[0], found.row, strict=True)))]
            else:
                mean.copy_(found.mean)
                rows.append(found.row)
            batch.place(columns, torch.stack([*found.column.student, *found.column.teacher, found.similarity]), owners)
            if rank in owners:
                positives.append(found.positive)

        held = circulate(batch, texts, 1, visit).held
        (row,), (positive,) = rows, positives
        # One exchange merges student and teacher, and says which share of each column's sum was here.
        column, share = members.merge(LogSumExp(columns[0:4:2], columns[1:4:2]))  # each [2, N]
        own = batch.own(column)
        similarity = members.sum(columns[4] * share[1]).split(batch.sizes)[rank]
        of_row, of_column = torch.linalg.vecdot(images.student, mean), similarity
        statistics = *row.student, *row.teacher, *column
        ctx.save_for_backward(*images, texts, *scales, *statistics, positive, mean, (of_row + of_column).sum(), *held)
        ctx.batch, ctx.trains = batch, trains
        own = LogSumExp(own.reference[0], own.log[0])
        contrastive = symmetric_softmax(row.student, own, positive, positive, batch.factor)
        return contrastive, symmetric_softmax(row.student, own, scale * of_row, scale * of_column, batch.factor)

    @staticmethod
    @no_second_derivatives
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, teacher_image, texts, scale, temperature, *statistics, positive, mean, similarity = ctx.saved_tensors[:14]
        held = ctx.saved_tensors[14:]
        batch: SplitBatch = ctx.batch
        student, teacher, column = (LogSumExp(*statistics[k : k + 2]) for k in (0, 2, 4))
        weights = batch.members.gather(torch.stack(gradients) * (batch.factor / 2))  # [W, 2]
        of_row = Both(*weights[batch.members.rank, :, None].expand(2, len(image)))
        images, scales, rows, totals = Both(image, teacher_image), Both(scale, temperature), Both(student, teacher), Totals(batch.sums)

        def visit(block: Tensor, owners: list[int]) -> Tensor | None:
            of_column = Both(*torch.cat([weights[owner, :, None].expand(2, batch.sizes[owner]) for owner in owners], 1))
            part = batch.take(column, owners)
            of_image, of_text, of_scale = distill_block_backward(
                images, _both(block, image, batch), scales, offset_of(batch, owners), rows,
                Both(*(LogSumExp(part.reference[k], part.log[k]) for k in (0, 1))), positive, of_row, of_column, ctx.trains, batch.dtype,
            )  # fmt: skip
            totals.add(of_image, of_scale)
            return of_text

        of_text = circulate(batch, texts, -1, visit, held).gradient()
        of_image, of_scale = totals.values
        if of_image is not None:
            # What the averages of the first trip give without another product.
            of_image = (of_image - scale * of_row.teacher[:, None] * mean).to(ctx.dtypes[0])
        if of_scale is not None:
            of_scale = of_scale - of_row.teacher[0] * similarity
        return of_image, None if of_text is None else of_text.to(ctx.dtypes[1]), of_scale, *[None] * 5


def _both(block: Tensor, student: Tensor, batch: SplitBatch) -> Both[Tensor]:
    """The features of a block that travels, [n, D + E], in the dtype of sums."""
    width = student.shape[1]
    return Both(*(part.to(batch.sums) for part in block.split([width, block.shape[1] - width], 1)))
