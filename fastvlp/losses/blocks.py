"""One block of the matrix of similarities, as the strategies ask the raw operators about it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastvlp_kernels.pairwise_sigmoid.op import sigmoid_forward
from fastvlp_kernels.similarity_logsumexp.op import Needs, ResultGrads, Results, logsumexp_backward, logsumexp_forward


def softmax_block(image: Tensor, text: Tensor, scale: Tensor, offset: int | None) -> tuple[Tensor, Tensor, Tensor]:
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
    row: Tensor,
    column: Tensor,
    of_row: Tensor,
    of_column: Tensor,
    wants: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of sum_i of_row_i * (row_i - positive_i) + sum_j of_column_j * (column_j - positive_j), of this block's part.

    Args:
        row, column: [m] and [n] the log-sum-exps of the whole matrix. of_row, of_column: their gradients. A positive pair must have the
            same gradient in both.
        wants: which of the gradients of image, text and scale.

    Returns:
        image and text in the dtype of the features, scale in float32 (float64 for float64); None where not wanted.
    """
    nothing = row.new_empty(0)
    grads = ResultGrads(of_row, of_column, None, None, None if offset is None else -2 * of_row)
    results = Results(row, column, nothing, nothing, nothing)
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
