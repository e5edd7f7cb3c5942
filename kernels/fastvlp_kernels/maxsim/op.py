"""``maxsim``: late interaction between all pairs of segments, both directions from one product."""

import torch
from torch import Tensor

from fastvlp_kernels import _check, _inputs, _op
from fastvlp_kernels._ragged import check_longest, read_lengths, segment_starts

from . import reference

NAME = "maxsim"
IMPLEMENTATIONS = ("triton", "cpu", "reference")
REDUCE = ("mean", "sum")
DIRECTIONS = ("both", "x_to_y", "y_to_x")


@_op.custom_op(NAME)
def _forward(
    x: Tensor, y: Tensor, cu_x: Tensor, cu_y: Tensor, max_seqlen_x: int | None, mean: bool, to_y: bool, to_x: bool,
    dtype: torch.dtype, impl: str,
) -> tuple[Tensor, Tensor]:
    if cu_x.device.type == "cpu":
        check_longest(NAME, "max_seqlen_x", max_seqlen_x, read_lengths(NAME, "cu_x", cu_x, "lengths", None))
    return _op.module(__package__, impl).forward(x, y, cu_x, cu_y, max_seqlen_x, mean, to_y, to_x, dtype)


@_forward.register_fake
def _(x, y, cu_x, cu_y, max_seqlen_x, mean, to_y, to_x, dtype, impl):
    M, N, accumulate = cu_x.shape[0] - 1, cu_y.shape[0] - 1, _inputs.sum_dtype(dtype)
    x_to_y, y_to_x = (x.new_empty((M, N) if wanted else (0, 0), dtype=accumulate) for wanted in (to_y, to_x))
    return x_to_y, y_to_x


@_op.custom_op(f"{NAME}_backward")
def _backward(
    g_x_to_y: Tensor | None, g_y_to_x: Tensor | None, x: Tensor, y: Tensor, cu_x: Tensor, cu_y: Tensor, max_seqlen_x: int | None,
    mean: bool, dtype: torch.dtype, need_x: bool, need_y: bool, impl: str,
) -> tuple[Tensor, Tensor]:
    return _op.module(__package__, impl).backward(g_x_to_y, g_y_to_x, x, y, cu_x, cu_y, max_seqlen_x, mean, dtype, need_x, need_y)


@_backward.register_fake
def _(g_x_to_y, g_y_to_x, x, y, cu_x, cu_y, max_seqlen_x, mean, dtype, need_x, need_y, impl):
    return x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,))


def _setup(ctx, inputs, output) -> None:
    x, y, cu_x, cu_y, ctx.max_seqlen_x, ctx.mean, ctx.to_y, ctx.to_x, ctx.dtype, ctx.impl = inputs
    ctx.save_for_backward(x, y, cu_x, cu_y)
    ctx.set_materialize_grads(False)


def _gradients(ctx, g_x_to_y: Tensor | None, g_y_to_x: Tensor | None):
    # The direction that was not asked for has no elements, and may come with a gradient of none.
    g_x_to_y, g_y_to_x = g_x_to_y if ctx.to_y else None, g_y_to_x if ctx.to_x else None
    dx = dy = None
    if g_x_to_y is not None or g_y_to_x is not None:
        need_x, need_y = ctx.needs_input_grad[:2]
        dx, dy = torch.ops.fastvlp.maxsim_backward(
            g_x_to_y, g_y_to_x, *ctx.saved_tensors, ctx.max_seqlen_x, ctx.mean, ctx.dtype, need_x, need_y, ctx.impl
        )
        dx, dy = dx if need_x else None, dy if need_y else None
    return dx, dy, *[None] * 8


_op.differentiate(NAME, _forward, _backward, _setup, _gradients)


def maxsim(
    x: Tensor,
    cu_x: Tensor,
    y: Tensor,
    cu_y: Tensor,
    *,
    reduce: str = "mean",
    directions: str = "both",
    max_seqlen_x: int | None = None,
    compute_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Late interaction of every segment of x with every segment of y, both directions from one product that is never stored.

    x_to_y[m, n] = reduce over tokens i of m of max over tokens j of n of <x_i, y_j>
    y_to_x[m, n] = reduce over tokens j of n of max over tokens i of m of <x_i, y_j>

    FILIP (https://arxiv.org/abs/2111.07783) trains on both means; ColBERT (https://arxiv.org/abs/2004.12832) scores queries x against
    documents y by ``reduce="sum", directions="x_to_y"``. BLIP-2 (https://arxiv.org/abs/2301.12597) scores the query tokens of images x
    against texts y of one token each by ``directions="y_to_x"``: the highest product of any of the queries with that token.

    Among equal products the first has the gradient. Backward computes the products again, so that nothing is kept between the two, and
    is deterministic.

    Args:
        x, y: [Tx, D] and [Ty, D] float32, bfloat16 or float16 (float64 with impl "cpu" and "reference"), any strides.
        cu_x, cu_y: int32 or int64 [M+1] and [N+1], where each segment starts; the last entry is where the last one ends. Tokens after it
            belong to no segment and get no gradient. Checked for order on the CPU, not on other devices.
        reduce: "mean" or "sum" over the tokens of a segment.
        directions: "both", or one of "x_to_y", "y_to_x": the other is not computed.
        max_seqlen_x: the longest segment of x (``Packed.max_seqlen``). On GPUs it lets both passes work in waves of bounded memory;
            without it they take about 8 (Tx N + Ty M) bytes for a moment. A value that is too small is an error where cu_x is on the
            CPU, and elsewhere makes all results and gradients NaN.
        compute_dtype: what the features are rounded to for the products; None: autocast's dtype, else that of the features.
        impl: "triton", "cpu", "reference"; None takes the first that runs on the device.

    Returns:
        (x_to_y, y_to_x) [M, N] float32 (float64 for float64 products), or the one direction that was asked for. A pair with an
        empty segment has 0 and no gradient.

    Raises:
        TypeError: DTensors, dtypes that differ or are not allowed.
        ValueError: shapes, devices or offsets that do not fit, an unknown ``reduce``, ``directions`` or ``impl``.
        RuntimeError: ``impl`` cannot run here; a second or a forward-mode derivative is asked for.
    """
    cu_x, cu_y = _check_inputs(x, cu_x, y, cu_y, max_seqlen_x)
    for name, value, allowed in (("reduce", reduce, REDUCE), ("directions", directions, DIRECTIONS)):
        if value not in allowed:
            raise ValueError(f"{NAME}: {name}={value!r} is unknown; allowed: {', '.join(map(repr, allowed))}")
    dtype = _inputs.product_dtype(NAME, x, compute_dtype)
    chosen = _op.choose(NAME, impl, x.device, IMPLEMENTATIONS, (dtype,), (x, y))
    to_y, to_x = directions != "y_to_x", directions != "x_to_y"
    if chosen == "reference":
        x_to_y, y_to_x = reference.maxsim(x, y, cu_x, cu_y, reduce == "mean", dtype)
    else:
        x_to_y, y_to_x = torch.ops.fastvlp.maxsim(x, y, cu_x, cu_y, max_seqlen_x, reduce == "mean", to_y, to_x, dtype, chosen)
    if to_y and to_x:
        return x_to_y, y_to_x
    return x_to_y if to_y else y_to_x


def _check_inputs(x: Tensor, cu_x: Tensor, y: Tensor, cu_y: Tensor, max_seqlen_x: int | None) -> tuple[Tensor, Tensor]:
    """The offsets as kernels read them."""
    _check.features(NAME, x, y)
    _check.plain_tensors(NAME, 3, x=x, cu_x=cu_x, cu_y=cu_y)
    check_longest(NAME, "max_seqlen_x", max_seqlen_x)
    return segment_starts(NAME, "cu_x", cu_x).int(), segment_starts(NAME, "cu_y", cu_y).int()
