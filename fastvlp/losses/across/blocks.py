"""One block of the matrix of similarities, as the strategies ask the raw operators about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastvlp_kernels._logsumexp import LogSumExp
from fastvlp_kernels.pairwise_sigmoid.op import sigmoid_forward
from fastvlp_kernels.similarity_attend import Needs as AttendNeeds
from fastvlp_kernels.similarity_attend import ResultGrads as AttendGrads
from fastvlp_kernels.similarity_attend import Results as Attended
from fastvlp_kernels.similarity_attend import attend_backward, attend_forward
from fastvlp_kernels.similarity_logsumexp.op import Needs, ResultGrads, Results, logsumexp_backward, logsumexp_forward

Of = TypeVar("Of", Tensor, LogSumExp)


def softmax_block(image: Tensor, text: Tensor, scale: Tensor, offset: int | None) -> tuple[LogSumExp, LogSumExp, Tensor]:
    """Row and column log-sum-exps, [m] and [n], of scale * image [m, D] @ text [n, D].T, and the positives.

    Args:
        offset: pair (i, i + offset) is positive; None: no pair is, and the positives have 0 elements.
    """
    found = logsumexp_forward(image, text, scale, offset=offset, compute_dtype=image.dtype)
    return found.row, found.col, found.positive


def softmax_block_backward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    offset: int | None,
    row: LogSumExp,
    column: LogSumExp,
    positive: Tensor,
    of_row: Tensor,
    of_column: Tensor,
    wants: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """This block's part of the gradients of sum_i of_row_i * (row_i - positive_i) + sum_j of_column_j * (column_j - positive_j).

    Args:
        row, column: [m] and [n], log-sum-exps of the whole matrix. of_row, of_column: their gradients, equal for a positive pair.
        positive: of ``softmax_block``; not read without an offset. wants: which of the gradients of image, text and scale.

    Returns:
        image and text in the features' dtype, scale in float32 (float64 for float64); None where not wanted.
    """
    nothing = LogSumExp(of_row.new_empty(0), of_row.new_empty(0))
    # A positive pair stands in its row and in its column, hence twice; inside the operator it meets p before anything is rounded.
    grads = ResultGrads(of_row, of_column, None, None, None if offset is None else -2 * of_row)
    results = Results(row, column, nothing, nothing, positive)
    found = logsumexp_backward(grads, results, Needs(*wants[:3]), image, text, scale, offset=offset, compute_dtype=image.dtype)
    of_image, of_text, of_scale = (part if wanted else None for part, wanted in zip(found, wants[:3], strict=False))
    return of_image, of_text, of_scale


def sigmoid_block(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int | None, wants: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The summed loss of the pairs of image [m, D] and text [n, D], and its gradients, float32 (float64 for float64).

    Args:
        offset: pair (i, i + offset) is positive; None: no pair is.
        wants: which of the gradients of image, text, scale and bias; the others are None.
    """
    loss, *gradients = sigmoid_forward(image, text, scale, bias, offset=offset, compute_dtype=image.dtype, needs=wants)
    of_image, of_text, of_scale, of_bias = (part if wanted else None for part, wanted in zip(gradients, wants, strict=False))
    return loss, of_image, of_text, of_scale, of_bias


@dataclass(frozen=True)
class Both(Generic[Of]):
    """The same thing of a student and of its teacher."""

    student: Of
    teacher: Of

    def __iter__(self) -> Iterator[Of]:
        return iter((self.student, self.teacher))


class DistillBlock(NamedTuple):
    """A student and its teacher over one block of m images and n texts.

    Attributes:
        row, column: [m] and [n], log-sum-exps of both. positive: the student's, [m] or empty.
        mean: [m, D], the student's texts averaged by the teacher's softmax over rows.
        similarity: [n], <text_j, the student's images averaged by the softmax over column j>.
    """

    row: Both[LogSumExp]
    column: Both[LogSumExp]
    positive: Tensor
    mean: Tensor
    similarity: Tensor


def distill_block(image: Both[Tensor], text: Both[Tensor], scale: Both[Tensor], offset: int | None, dtype: torch.dtype) -> DistillBlock:
    """Statistics of one block; features in the dtype of sums, products of operands in ``dtype``. ``offset``: as in ``softmax_block``."""
    found = logsumexp_forward(image.student, text.student, scale.student, offset=offset, compute_dtype=dtype)
    rows = attend_forward(image.teacher, text.teacher, text.student, scale.teacher, compute_dtype=dtype)
    columns = attend_forward(text.teacher, image.teacher, image.student, scale.teacher, compute_dtype=dtype)
    similarity = torch.linalg.vecdot(text.student, columns.out)
    return DistillBlock(Both(found.row, rows.lse), Both(found.col, columns.lse), found.positive, rows.out, similarity)


def distill_block_backward(
    image: Both[Tensor],
    text: Both[Tensor],
    scale: Both[Tensor],
    offset: int | None,
    row: Both[LogSumExp],
    column: Both[LogSumExp],
    positive: Tensor,
    of_row: Both[Tensor],
    of_column: Both[Tensor],
    wants: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """This block's part of the gradients of sum_ij A_ij S_ij for the student's image [m, D], text [n, D] and scale.

    P, P' are the student's softmax over rows and columns, T, T' the teacher's, a, a' and d, d' weights of the contrastive and the distilled
    part: A_ij = (a_i + d_i) P_ij + (a'_j + d'_j) P'_ij - 2 a_i [j = i + offset] - d_i T_ij - d'_j T'_ij.
    Left out is what the merged averages give for nothing: -d_i T_ij for the image, and the teacher's terms for the scale.

    Args:
        row, column: log-sum-exps of the whole matrices. of_row, of_column: (a, d) [m] and (a', d') [n].
        wants: which gradients, in the dtype of sums; None where not wanted.
    """
    nothing = LogSumExp(positive.new_empty(0), positive.new_empty(0))
    of_positive = None if offset is None else -2 * of_row.student
    grads = ResultGrads(of_row.student + of_row.teacher, of_column.student + of_column.teacher, None, None, of_positive)
    results = Results(row.student, column.student, nothing, nothing, positive)
    found = logsumexp_backward(
        grads, results, Needs(*wants[:3]), image.student, text.student, scale.student, offset=offset, compute_dtype=dtype
    )
    of_image, of_text, of_scale = (part if wanted else None for part, wanted in zip(found, wants[:3], strict=False))
    # The teacher's part: minus scale * T times the other side's features, by the teacher's softmax, which is never stored.
    by_row, by_column = (-scale.student * weights.teacher[:, None] for weights in (of_row, of_column))
    if of_image is not None:
        of_image += _spread(text.teacher, image.teacher, scale.teacher, column.teacher, by_column * text.student, dtype)
    if of_text is not None:
        of_text += _spread(image.teacher, text.teacher, scale.teacher, row.teacher, by_row * image.student, dtype)
        # This block's softmax over columns, brought to the whole column by its share of the sum.
        part = attend_forward(text.teacher, image.teacher, image.student, scale.teacher, compute_dtype=dtype)
        of_text += by_column * column.teacher.probability(part.lse.value()).to(part.out.dtype)[:, None] * part.out
    return of_image, of_text, of_scale


def _spread(x: Tensor, y: Tensor, scale: Tensor, lse: LogSumExp, values: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, E]: sum over i of exp(scale * <x_i, y_j> - lse_i) * values_i, for x [m, D], y [n, D], values [m, E] and lse [m]."""
    # The averages are read for other gradients alone, so that zeros stand for them.
    grads, results = AttendGrads(values, None), Attended(torch.zeros_like(values), lse)
    like, needs = values.new_zeros(len(y), values.shape[1]), AttendNeeds(x=False, y=False, v=True, scale=False)
    return attend_backward(grads, results, needs, x, y, like, scale, compute_dtype=dtype).v
