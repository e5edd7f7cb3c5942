"""similarity_attend: the registered operator and its gradient, raw functions for blocks of a larger matrix, and the public function."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check, _op
from .._inputs import product_dtype, scalar, sum_dtype
from .._logsumexp import LogSumExp
from . import reference
from .arguments import Grads, Inputs, Needs, ResultGrads, Results

OP = "similarity_attend"
IMPLEMENTATIONS = ("triton", "cpu", "reference")
IDS = ("exclude", "only")
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@_op.custom_op(OP)
def _forward(
    x: Tensor,
    y: Tensor,
    v: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    ids: str,
    dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The averages, and reference and log of the log-sum-exps."""
    inputs = Inputs(x, y, v, scale, row_bias, col_bias, row_ids, col_ids, ids, dtype)
    results: Results = _op.module(__package__, impl).forward(inputs)
    return results.out, *results.lse


@_forward.register_fake
def _(x, y, v, scale, row_bias, col_bias, row_ids, col_ids, ids, dtype, impl):
    M, E = x.shape[0], v.shape[1]
    return tuple(x.new_empty(shape, dtype=sum_dtype(dtype)) for shape in ((M, E), (M,), (M,)))


@_op.custom_op(f"{OP}_backward")
def _backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    y: Tensor,
    v: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    ids: str,
    dtype: torch.dtype,
    impl: str,
    results: Sequence[Tensor],
    needs: Sequence[bool],
    whole: bool,
) -> Six:
    inputs = Inputs(x, y, v, scale, row_bias, col_bias, row_ids, col_ids, ids, dtype)
    empty = results[1] == -torch.inf
    # Merging the log-sum-exps of rows that no block has columns for gives them NaN as a gradient.
    g_out, g_lse = (None if g is None else g.to(sum_dtype(dtype)) for g in grads)
    g_out = None if g_out is None else g_out.masked_fill(empty[:, None], 0.0)
    g_lse = None if g_lse is None else g_lse.masked_fill(empty, 0.0)
    found = Results(results[0], LogSumExp(*results[1:]))
    made: Grads = _op.module(__package__, impl).backward(ResultGrads(g_out, g_lse), inputs, found, Needs(*needs), whole)
    return (*made,)


@_backward.register_fake
def _(grads, x, y, v, scale, row_bias, col_bias, row_ids, col_ids, ids, dtype, impl, results, needs, whole):
    acc = sum_dtype(dtype)
    shapes = (x.shape, y.shape, v.shape, (), (x.shape[0],), (y.shape[0],))
    dtypes = (x.dtype, y.dtype, v.dtype, acc, acc, acc)
    return tuple(x.new_empty(shape if need else 0, dtype=d) for shape, d, need in zip(shapes, dtypes, needs, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.rest = inputs[8:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:6]
    g_out, _, g_lse = grads
    # Of the log-sum-exps alone, v has no gradient.
    if g_out is None and (g_lse is None or not Needs(*needs).similarities):
        return (None,) * 11
    found = _backward([g_out, g_lse], *saved[:8], *ctx.rest, saved[8:], needs, True)
    return (*(grad if need else None for grad, need in zip(found, needs, strict=True)), *[None] * 5)


_op.differentiate(OP, _forward, _backward, _save, _differentiate)


def _inputs(
    x: Tensor,
    y: Tensor,
    v: Tensor,
    scale: float | Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    ids: str,
    compute_dtype: torch.dtype | None,
) -> Inputs:
    """Checked inputs: the scalar as a tensor, biases in the dtype of sums, ids in int64."""
    _check.features(OP, x, y)
    _check.plain_tensors(OP, 2, x=x, v=v, row_bias=row_bias, col_bias=col_bias, row_ids=row_ids, col_ids=col_ids)
    if x.shape[0] == 0 or y.shape[0] == 0:
        raise ValueError(f"{OP}: x has {x.shape[0]} rows and y has {y.shape[0]}; each must have at least 1")
    if v.ndim != 2 or len(v) != y.shape[0] or v.shape[1] == 0:
        raise ValueError(f"{OP}: v has shape {tuple(v.shape)}; it must be [{y.shape[0]}, width], a row of values for each row of y")
    if v.dtype != x.dtype:
        raise TypeError(f"{OP}: v is {v.dtype} and x is {x.dtype}; cast one of them")
    _check.vector(OP, "row_bias", row_bias, x.shape[0])
    _check.vector(OP, "col_bias", col_bias, y.shape[0])
    _check.vector(OP, "row_ids", row_ids, x.shape[0], integer=True)
    _check.vector(OP, "col_ids", col_ids, y.shape[0], integer=True)
    if ids not in IDS:
        raise ValueError(f"{OP}: ids={ids!r} is unknown; allowed: {', '.join(IDS)}")
    if (row_ids is None) != (col_ids is None):
        raise ValueError(f"{OP}: {'col_ids' if col_ids is None else 'row_ids'} is missing; give ids for rows and columns, or for neither")
    if row_ids is None and ids != "exclude":
        raise ValueError(f"{OP}: ids={ids!r} needs row_ids and col_ids")
    dtype = product_dtype(OP, x, compute_dtype)
    acc = sum_dtype(dtype)
    row_bias, col_bias = (bias if bias is None else bias.to(acc) for bias in (row_bias, col_bias))
    row_ids, col_ids = (numbers if numbers is None else numbers.long() for numbers in (row_ids, col_ids))
    return Inputs(x, y, v, scalar(OP, "scale", scale, x, acc), row_bias, col_bias, row_ids, col_ids, ids, dtype)


def _choose(impl: str | None, a: Inputs) -> str:
    return _op.choose(OP, impl, a.x.device, IMPLEMENTATIONS, (a.dtype,), a[:6])


def _results(a: Inputs, chosen: str) -> Results:
    if chosen == "reference":
        return reference.forward(a)
    out, *lse = _forward(*a, chosen)
    return Results(out, LogSumExp(*lse))


def attend_forward(
    x: Tensor,
    y: Tensor,
    v: Tensor,
    scale: float | Tensor = 1.0,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: str = "exclude",
    compute_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Results:
    """The sweep of :func:`similarity_attend` without autograd, for losses that merge blocks of a larger matrix.

    Returns:
        Results(out, lse), float32. Blocks that share rows merge by ``lse = merge(a.lse, b.lse)`` and, with the shares
        exp(a.lse - lse) and exp(b.lse - lse) (0 where lse is -inf), ``out`` by ``a.out * share_a + b.out * share_b``.
    """
    with torch.no_grad():
        a = _inputs(x, y, v, scale, row_bias, col_bias, row_ids, col_ids, ids, compute_dtype)
        chosen = _choose(impl, a)
        return _results(a, chosen)


def attend_backward(
    grads: ResultGrads,
    results: Results,
    needs: Needs,
    x: Tensor,
    y: Tensor,
    v: Tensor,
    scale: float | Tensor = 1.0,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: str = "exclude",
    compute_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Grads:
    """Gradients of one block, exact also when ``results`` are those of a larger matrix.

    With P_ij = exp(S_ij - lse_i): dS_ij = P_ij * (<g_i, v_j> - <g_i, out_i> + g_lse_i), and d_v_j = sum over i of P_ij * g_i.

    Args:
        grads: gradients of the merged results for the rows of this block; None stands for zero.
        results: merged averages, in float32 as :func:`attend_forward` gives them, and log-sum-exps for the rows of this block.
        needs: which gradients are wanted. The other arguments: those of :func:`attend_forward` for this block.

    Returns:
        Grads(x, y, v, scale, row_bias, col_bias): x, y and v in the dtypes of ``x``, ``y`` and ``v``, the others float32;
        0 elements where not wanted.
    """
    with torch.no_grad():
        a = _inputs(x, y, v, scale, row_bias, col_bias, row_ids, col_ids, ids, compute_dtype)
        chosen = _choose(impl, a)
        out = results.out.to(sum_dtype(a.dtype))
        chosen = "cpu" if chosen == "reference" else chosen
        return Grads(*_backward(list(grads), *a, chosen, [out, *results.lse], list(needs), False))


def similarity_attend(
    x: Tensor,
    y: Tensor,
    v: Tensor,
    scale: float | Tensor = 1.0,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: str = "exclude",
    compute_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the columns of a similarity matrix that is never stored, times v.

    S_ij = scale * <x_i, y_j> + row_bias_i + col_bias_j; out_i = sum over j of exp(S_ij - lse_i) * v_j. All inputs but ids get
    exact gradients, through both results. It is attention (Vaswani et al. 2017) of one head of any width; soft targets of
    distillation and nearest-neighbour retrieval are its uses here.

    Args:
        x: [M, D], y: [N, D] and v: [N, E], float32, bfloat16 or float16 (float64 on the CPU), one dtype, any strides. All sizes >= 1.
        scale: number, 0-d or [1] tensor.
        row_bias: [M]. col_bias: [N]. A bias of -inf takes a row or column out.
        row_ids: integers [M] and col_ids: [N]; ids below zero match nothing.
        ids: "exclude" leaves pairs of equal id out, "only" counts nothing else.
        compute_dtype: dtype of the operands of products, None for autocast's, else that of x. Sums are float32.
        impl: None, "triton", "cpu" or "reference" (dense).

    Returns:
        (out [M, E] in the dtype of v, lse [M]): lse is the natural logarithm of the sum of exp(S_ij), float32 (float64 for float64).
        A row without columns gives 0 and -inf, and no gradient.

    Raises:
        TypeError, ValueError: wrong inputs. RuntimeError: ``impl`` cannot run here, or a second derivative is asked for.
    """
    a = _inputs(x, y, v, scale, row_bias, col_bias, row_ids, col_ids, ids, compute_dtype)
    chosen = _choose(impl, a)
    results = _results(a, chosen)
    return results.out.to(v.dtype), results.lse.value()
