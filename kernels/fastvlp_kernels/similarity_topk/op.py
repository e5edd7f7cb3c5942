"""``similarity_topk``: the most similar rows of another matrix, for retrieval, neighbours, hard negatives and de-duplication."""

import torch
from torch import Tensor

from .. import _check, _op
from .._inputs import product_dtype, sum_dtype
from . import cpu, reference

OP = "similarity_topk"
IMPLEMENTATIONS = ("triton", "cpu", "reference")
# More candidates than this do not stay in the registers of a Triton program.
MOST_IN_REGISTERS = 64


@_op.custom_op(OP)
def _search(
    x: Tensor, y: Tensor, k: int, row_ids: Tensor | None, col_ids: Tensor | None, offset: int | None, dtype: torch.dtype, impl: str
) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        from . import triton

        return triton.search(x, y, k, row_ids, col_ids, offset, dtype)
    return (reference if impl == "reference" else cpu).search(x, y, k, row_ids, col_ids, offset, dtype)


@_search.register_fake
def _(x, y, k, row_ids, col_ids, offset, dtype, impl):
    return x.new_empty(x.shape[0], k, dtype=sum_dtype(dtype)), x.new_empty(x.shape[0], k, dtype=torch.int64)


@torch.no_grad()
def similarity_topk(
    x: Tensor,
    y: Tensor,
    k: int,
    *,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    offset: int | None = None,
    columns: bool = False,
    compute_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    """The k largest of each row of S_ij = <x_i, y_j>, which is never stored: exact nearest neighbours by inner product.

    Values have no gradient: where one is wanted, gather the rows and multiply them, ``(x[:, None] * y[indices]).sum(-1)``.

    Args:
        x: [M, D] and y: [N, D], float32, bfloat16 or float16 (float64 with impl "cpu" and "reference"), any strides. M or N may be 0.
        k: how many, at least 1. Where fewer columns are left, value -inf and index -1 fill up.
        row_ids: integers [M] and col_ids: [N], both or neither: pairs of equal id are left out; ids below zero match nothing.
        offset: the pairs (i, i + offset) are left out: 0 for the neighbours of a set within itself.
        columns: also the k largest of each column, from a product of their own.
        compute_dtype: what x and y are rounded to for the products; None: autocast's dtype, else theirs. Sums are float32.
        impl: "triton", "cpu", "reference" (dense); None takes the first that runs on the device. Above k = 64 "triton" is "cpu", in
            chunks on any device.

    Returns:
        (values [M, k] float32 (float64 for float64), indices [M, k] int64), largest first and of equal values the lower index first; with
        ``columns`` also the values and the indices (of rows) of columns, [N, k] each. Products of equal numbers that are summed in another
        order may differ in their last digit.

    Raises:
        TypeError, ValueError: wrong inputs. RuntimeError: ``impl`` cannot run here.
    """
    _check.features(OP, x, y)
    _check.plain_tensors(OP, x=x, row_ids=row_ids, col_ids=col_ids)
    _check.vector(OP, "row_ids", row_ids, x.shape[0], integer=True)
    _check.vector(OP, "col_ids", col_ids, y.shape[0], integer=True)
    if (row_ids is None) != (col_ids is None):
        raise ValueError(f"{OP}: only {'row_ids' if col_ids is None else 'col_ids'} is given; give ids of both sides or of neither")
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)) or k < 1:
        raise ValueError(f"{OP}: k={k!r}; it must be a whole number, at least 1")
    if offset is not None and (isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt))):
        raise TypeError(f"{OP}: offset is {type(offset).__name__}; it must be an integer, or None where no pair is left out by its place")
    dtype = product_dtype(OP, x, compute_dtype)
    chosen = _op.choose(OP, impl, x.device, IMPLEMENTATIONS, (dtype,))
    chosen = "cpu" if chosen == "triton" and k > MOST_IN_REGISTERS else chosen
    x, y = x.detach(), y.detach()
    found: tuple[Tensor, ...] = torch.ops.fastvlp.similarity_topk(x, y, k, row_ids, col_ids, offset, dtype, chosen)
    if columns:
        # Of columns it is the rows of the transposed matrix; one sweep for both would merge as many lists as there are tiles.
        back = None if offset is None else -offset
        found = (*found, *torch.ops.fastvlp.similarity_topk(y, x, k, col_ids, row_ids, back, dtype, chosen))
    return found
