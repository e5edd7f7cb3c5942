"""similarity_logsumexp: the registered operator and its gradient, raw functions for losses, and the public function."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check, _op
from .._inputs import needs_grad, product_dtype, scalar, sum_dtype
from . import cpu, reference
from .arguments import Grads, Inputs, Needs, ResultGrads, Results

OP = "similarity_logsumexp"
IMPLEMENTATIONS = ("triton", "cpu", "reference")
IDS = ("exclude", "only", "both", "sums")
Ten = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@_op.custom_op(OP)
def _forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    ids: str,
    offset: int | None,
    dtype: torch.dtype,
    impl: str,
    stash_bytes: int,
) -> Ten:
    """``Results``, flat, and the stash."""
    inputs = Inputs(x, y, scale, row_bias, col_bias, row_scale, col_scale, row_ids, col_ids, ids, offset, dtype)
    if impl == "triton":
        from . import triton, triton_stash

        stash = x.new_empty(triton_stash.stash_shape(inputs, stash_bytes), dtype=dtype)
        return *triton.forward(inputs, stash).flatten(), stash
    stash = cpu.new_stash(inputs, stash_bytes)
    return *cpu.forward(inputs, stash).flatten(), stash


@_forward.register_fake
def _(x, y, scale, row_bias, col_bias, row_scale, col_scale, row_ids, col_ids, ids, offset, dtype, impl, stash_bytes):
    M, N = x.shape[0], y.shape[0]
    positives = ids in ("both", "sums") and row_ids is not None
    if impl == "triton":
        from .triton_stash import stash_shape

        inputs = Inputs(x, y, scale, row_bias, col_bias, row_scale, col_scale, row_ids, col_ids, ids, offset, dtype)
        stash = stash_shape(inputs, stash_bytes)
    else:
        stash = cpu.stash_shape(M, N, dtype, stash_bytes)
    lengths = (M, N, M if positives else 0, N if positives else 0)
    acc = sum_dtype(dtype)
    results = [x.new_empty(length, dtype=acc) for length in lengths for _ in range(2)]
    return *results, x.new_empty(0 if offset is None else M, dtype=acc), x.new_empty(stash, dtype=dtype if impl == "triton" else acc)


@_op.custom_op(f"{OP}_backward")
def _backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    ids: str,
    offset: int | None,
    dtype: torch.dtype,
    impl: str,
    results: Sequence[Tensor],
    stash: Tensor,
    needs: Sequence[bool],
) -> Seven:
    inputs = Inputs(x, y, scale, row_bias, col_bias, row_scale, col_scale, row_ids, col_ids, ids, offset, dtype)
    made: Grads = _op.module(__package__, impl).backward(ResultGrads(*grads), inputs, Results.unflatten(results), Needs(*needs), stash)
    return (*made,)


@_backward.register_fake
def _(grads, x, y, scale, row_bias, col_bias, row_scale, col_scale, row_ids, col_ids, ids, offset, dtype, impl, results, stash, needs):
    (M, D), N, acc = x.shape, y.shape[0], sum_dtype(dtype)
    shapes = ((M, D), (N, D), (), (M,), (N,), (M,), (N,))
    dtypes = (x.dtype, y.dtype, acc, acc, acc, acc, acc)
    return tuple(x.new_empty(shape if need else 0, dtype=d) for shape, d, need in zip(shapes, dtypes, needs, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Ten) -> None:
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.rest = inputs[9:13]
    # References have no gradient: ``log`` carries that of the whole (see ``LogSumExp``).
    ctx.mark_non_differentiable(*output[:8:2], output[9])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:7]
    found = _backward([*grads[1:8:2], grads[8]], *saved[:9], *ctx.rest, saved[9:18], saved[18], needs)
    return (*(grad if need else None for grad, need in zip(found, needs, strict=True)), *[None] * 7)


_op.differentiate(OP, _forward, _backward, _save, _differentiate)


def _inputs(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    ids: str,
    offset: int | None,
    compute_dtype: torch.dtype | None,
) -> Inputs:
    """Checked inputs: the scalar as a tensor, vectors in the dtype of sums, ids in int64."""
    _check.features(OP, x, y)
    rows, cols = {"row_bias": row_bias, "row_scale": row_scale}, {"col_bias": col_bias, "col_scale": col_scale}
    _check.plain_tensors(OP, x=x, **rows, **cols, row_ids=row_ids, col_ids=col_ids)
    for vectors, length in ((rows, x.shape[0]), (cols, y.shape[0])):
        if length == 0:
            raise ValueError(f"{OP}: x has {x.shape[0]} rows and y has {y.shape[0]}; each must have at least 1")
        for name, vector in vectors.items():
            _check.vector(OP, name, vector, length)
    _check.vector(OP, "row_ids", row_ids, x.shape[0], integer=True)
    _check.vector(OP, "col_ids", col_ids, y.shape[0], integer=True)
    if ids not in IDS:
        raise ValueError(f"{OP}: ids={ids!r} is unknown; allowed: {', '.join(IDS)}")
    if (row_ids is None) != (col_ids is None):
        raise ValueError(f"{OP}: {'col_ids' if col_ids is None else 'row_ids'} is missing; give ids for rows and columns, or for neither")
    if row_ids is None and ids != "exclude":
        raise ValueError(f"{OP}: ids={ids!r} needs row_ids and col_ids")
    if offset is not None and not isinstance(offset, int):
        raise TypeError(f"{OP}: offset is {type(offset).__name__}; it must be an int or None")
    dtype = product_dtype(OP, x, compute_dtype)
    acc = sum_dtype(dtype)
    row_bias, col_bias, row_scale, col_scale = (v if v is None else v.to(acc) for v in (row_bias, col_bias, row_scale, col_scale))
    row_ids, col_ids = (v if v is None else v.long() for v in (row_ids, col_ids))
    return Inputs(x, y, scalar(OP, "scale", scale, x, acc), row_bias, col_bias, row_scale, col_scale, row_ids, col_ids, ids, offset, dtype)


def _choose(impl: str | None, a: Inputs) -> str:
    return _op.choose(OP, impl, a.x.device, IMPLEMENTATIONS, (a.dtype,), a[:7])


def logsumexp_forward(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor = 1.0,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: str = "exclude",
    offset: int | None = None,
    compute_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Results:
    """The sweep of :func:`similarity_logsumexp` without autograd, for losses that merge blocks of a larger matrix.

    Returns:
        Results(row, col, row_positives, col_positives, positive), float32; what is not asked for has 0 elements. Blocks
        that share rows merge by ``merge(a.row, b.row)``, blocks that share columns likewise; sums of positives add up.
    """
    with torch.no_grad():
        a = _inputs(x, y, scale, row_bias, col_bias, row_scale, col_scale, row_ids, col_ids, ids, offset, compute_dtype)
        chosen = _choose(impl, a)
        return reference.forward(a) if chosen == "reference" else Results.unflatten(_forward(*a, chosen, 0))


def logsumexp_backward(
    grads: ResultGrads,
    results: Results,
    needs: Needs,
    x: Tensor,
    y: Tensor,
    scale: float | Tensor = 1.0,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: str = "exclude",
    offset: int | None = None,
    compute_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Grads:
    """Gradients of one block, exact also when ``results`` hold the log-sum-exps of a larger matrix.

    dS_ij = exp(S_ij - row_i) * g_row_i + exp(S_ij - col_j) * g_col_j (each where the pair is counted), the same for positives
    with ids="both" (with "sums" g_row_positives_i + g_col_positives_j there), plus g_positive_i on the offset diagonal.

    Args:
        grads: gradients of the merged results, float32, for the rows and columns of this block; None stands for zero.
        results: merged log-sum-exps for the rows and columns of this block, and its own ``positive``.
        needs: which gradients are wanted. The other arguments: those of :func:`logsumexp_forward` for this block.

    Returns:
        Grads(x, y, scale, row_bias, col_bias, row_scale, col_scale): x and y in the dtypes of ``x`` and ``y``, the others
        float32; 0 elements where not wanted.
    """
    with torch.no_grad():
        a = _inputs(x, y, scale, row_bias, col_bias, row_scale, col_scale, row_ids, col_ids, ids, offset, compute_dtype)
        chosen = _choose(impl, a)
        grads = ResultGrads(*(g if g is None else g.contiguous() for g in grads))
        chosen = "cpu" if chosen == "reference" else chosen
        return Grads(*_backward(list(grads), *a, chosen, list(results.flatten()), a.x.new_empty(0, 0), list(needs)))


def similarity_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor = 1.0,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: str = "exclude",
    offset: int | None = None,
    prefixes: Sequence[int] | None = None,
    compute_dtype: torch.dtype | None = None,
    stash_bytes: int = 0,
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    """Row and column log-sum-exps of a similarity matrix that is never stored, from one sweep.

    S_ij = scale * row_scale_i * col_scale_j * <x_i, y_j> + row_bias_i + col_bias_j. All inputs but ids get exact gradients.
    The CLIP loss (Radford et al. 2021) is ``(row + col - 2 * positive).mean() / 2`` with ``offset=0``.

    Args:
        x: [M, D] and y: [N, D], float32, bfloat16 or float16 (float64 on the CPU), any strides. M, N, D >= 1.
        scale: number, 0-d or [1] tensor.
        row_bias, row_scale: [M]. col_bias, col_scale: [N]. A bias of -inf takes a row or column out.
        row_ids: integers [M] and col_ids: [N]; ids below zero match nothing.
        ids: "exclude" leaves pairs of equal id out, "only" counts nothing else, "both" counts all pairs and, separately, the
            pairs of equal id; "sums" counts all pairs and adds S up over the pairs of equal id, so that the mean of several positives
            meets their probabilities before any rounding.
        offset: also return positive[i] = S[i, i + offset], or 0 where that is outside. Its gradient joins the others' before
            any rounding, so that p - 1 keeps its digits; whether ids count the pair makes no difference to it.
        prefixes: widths p_1 < ... < p_K = D: the same for x[:, :p_k], y[:, :p_k] (Matryoshka, Kusupati et al. 2022); every
            result gains a leading K, row_scale and col_scale are [K, M] and [K, N].
        compute_dtype: dtype of the operands of products, None for autocast's, else that of x. Sums are float32.
        stash_bytes: memory that may be left for the backward, which then reads S instead of computing it again, so that with all of it
            the work falls from four products to three. On the CPU it holds tiles of S in the dtype of sums, 4 * M * N bytes. impl
            "triton" keeps exp(S) without its positives in bfloat16, 2 * M * N bytes, for bfloat16 operands without ids and vectors.
            As many tiles as fit are kept, and none where no gradient is needed.
        impl: None, "triton", "cpu" or "reference" (dense).

    Returns:
        (row_lse [M], col_lse [N]), with ids="both" (row_lse, col_lse, row_lse of positives, col_lse of positives), with "sums"
        (row_lse, col_lse, row sums [M] of positives, column sums [N] of positives), and positive [M] at the end with an offset.
        Natural logarithms, float32 (float64 for float64). An empty row or column gives -inf (a sum: 0) and no gradient.

    Raises:
        TypeError, ValueError: wrong inputs. RuntimeError: ``impl`` cannot run here, or a second derivative is asked for.
    """
    results = logsumexp_results(
        x, y, scale, row_bias=row_bias, col_bias=col_bias, row_scale=row_scale, col_scale=col_scale, row_ids=row_ids, col_ids=col_ids,
        ids=ids, offset=offset, prefixes=prefixes, compute_dtype=compute_dtype, stash_bytes=stash_bytes, impl=impl,
    )  # fmt: skip
    statistics = [part.value() for part in (results[:4] if ids in ("both", "sums") else results[:2])]
    return (*statistics, *(() if offset is None else (results.positive,)))


def logsumexp_results(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor = 1.0,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: str = "exclude",
    offset: int | None = None,
    prefixes: Sequence[int] | None = None,
    compute_dtype: torch.dtype | None = None,
    stash_bytes: int = 0,
    impl: str | None = None,
) -> Results:
    """:func:`similarity_logsumexp` for losses, which subtract from a log-sum-exp what nearly cancels it: as pairs, differentiable."""
    if stash_bytes < 0:
        raise ValueError(f"{OP}: stash_bytes={stash_bytes}; it must be 0 (recompute) or a number of bytes")
    if prefixes is not None:
        return _by_prefix(
            prefixes, x, y, scale, row_scale, col_scale, row_bias=row_bias, col_bias=col_bias, row_ids=row_ids, col_ids=col_ids,
            ids=ids, offset=offset, compute_dtype=compute_dtype, stash_bytes=stash_bytes // max(1, len(prefixes)), impl=impl,
        )  # fmt: skip
    a = _inputs(x, y, scale, row_bias, col_bias, row_scale, col_scale, row_ids, col_ids, ids, offset, compute_dtype)
    chosen = _choose(impl, a)
    stash_bytes = stash_bytes if any(needs_grad(*a[:7])) else 0
    return reference.forward(a) if chosen == "reference" else Results.unflatten(_forward(*a, chosen, stash_bytes))


def _by_prefix(
    prefixes: Sequence[int], x: Tensor, y: Tensor, scale: float | Tensor, row_scale: Tensor | None, col_scale: Tensor | None, **rest: Any
) -> Results:
    _check.features(OP, x, y)
    widths, K, D = list(prefixes), len(prefixes), x.shape[1]
    if not widths or widths != sorted(set(widths)) or widths[0] < 1 or widths[-1] != D:
        raise ValueError(f"{OP}: prefixes={widths}; they must increase strictly from at least 1 to the width of the features, {D}")
    for name, factors, length in (("row_scale", row_scale, x.shape[0]), ("col_scale", col_scale, y.shape[0])):
        if factors is not None and factors.shape != (K, length):
            raise ValueError(f"{OP}: {name} has shape {tuple(factors.shape)}; with {K} prefixes it must have shape ({K}, {length})")
    rest["compute_dtype"] = product_dtype(OP, x, rest["compute_dtype"])
    # The prefixes share their columns of x and y: their gradients have to meet before they are rounded.
    x, y = (features.to(sum_dtype(features.dtype)) for features in (x, y))
    found = []
    for k, width in enumerate(widths):
        row, col = (factors if factors is None else factors[k] for factors in (row_scale, col_scale))
        found.append(logsumexp_results(x[:, :width], y[:, :width], scale, row_scale=row, col_scale=col, **rest).flatten())
    return Results.unflatten([torch.stack(parts) for parts in zip(*found, strict=True)])
