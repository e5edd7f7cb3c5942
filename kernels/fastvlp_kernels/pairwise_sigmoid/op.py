"""``pairwise_sigmoid``: the loss of SigLIP over all pairs, its gradients made in the same sweep as its value."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvlp_kernels import _check, _inputs, _op

from . import reference

NAME = "pairwise_sigmoid"
IMPLEMENTATIONS = ("triton", "cpu", "reference")
IDS = ("positive", "exclude")


class SigmoidSweep(NamedTuple):
    """What one sweep makes: the loss and its gradients, float32 (float64 for float64 products); those not asked for have no elements."""

    loss: Tensor
    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor
    row_bias: Tensor
    col_bias: Tensor
    row_weight: Tensor
    col_weight: Tensor


@_op.custom_op(NAME)
def _forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    exclude: bool,
    offset: int | None,
    dtype: torch.dtype,
    factor: float,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = _op.module(__package__, impl).forward(
        x, y, scale, bias, row_bias, col_bias, row_weight, col_weight, row_ids, col_ids, exclude, offset, dtype, needs
    )
    return made if factor == 1 else tuple(tensor.mul_(factor) for tensor in made)


@_forward.register_fake
def _(x, y, scale, bias, row_bias, col_bias, row_weight, col_weight, row_ids, col_ids, exclude, offset, dtype, factor, needs, impl):
    inputs = (x, y, scale, bias, row_bias, col_bias, row_weight, col_weight)
    accumulate = _inputs.sum_dtype(dtype)
    gradients = (x.new_empty(tensor.shape if need else (0,), dtype=accumulate) for tensor, need in zip(inputs, needs, strict=True))
    return x.new_empty((), dtype=accumulate), *gradients


@_op.custom_op(f"{NAME}_backward")
def _backward(grad: Tensor, gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    # The loss is a sum: only its upstream gradient brings float16 into range, so the one rounding comes after the scaling.
    scaled = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]
    return [torch.mul(gradient, grad, out=out) for gradient, out in zip(gradients, scaled, strict=True)]


@_backward.register_fake
def _(grad, gradients, inputs):
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]


def _setup(ctx, inputs, output) -> None:
    needs = inputs[14]
    # Saving all inputs would keep memory until the backward pass for those that need no gradient.
    ctx.needed = [i for i, need in enumerate(needs) if need]
    ctx.save_for_backward(*(output[1 + i] for i in ctx.needed), *(inputs[i] for i in ctx.needed))
    # The gradients are outputs of the operator too, but nobody may differentiate through them.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scale(ctx, grad: Tensor | None, *_: Tensor):
    result: list[Tensor | None] = [None] * 16
    if grad is None:
        return tuple(result)
    saved = ctx.saved_tensors
    half = len(ctx.needed)
    gradients, inputs = saved[:half], saved[half:]
    dtypes_fit = all(gradient.dtype == tensor.dtype for gradient, tensor in zip(gradients, inputs, strict=True))
    # On the CPU the upstream gradient can be read: 1 spares a copy of everything. Under tracing it is not a plain tensor.
    if type(grad) is Tensor and grad.device.type == "cpu" and dtypes_fit and not torch.is_grad_enabled() and grad.item() == 1:
        scaled = gradients
    else:
        scaled = torch.ops.fastvlp.pairwise_sigmoid_backward(grad, gradients, inputs)
    for i, gradient in zip(ctx.needed, scaled, strict=True):
        result[i] = gradient
    return tuple(result)


_op.differentiate(NAME, _forward, _backward, _setup, _scale)


def sigmoid_forward(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    col_weight: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: str = "positive",
    offset: int | None = 0,
    compute_dtype: torch.dtype | None = None,
    needs: Sequence[bool] = (),
    impl: str | None = None,
) -> SigmoidSweep:
    """The sweep behind ``pairwise_sigmoid``, for losses that combine blocks: value and gradients of one block, without autograd.

    Arguments as of ``pairwise_sigmoid``; call it under ``no_grad`` or in an autograd function's forward. ``needs`` says which
    gradients to make, in the order x, y, scale, bias, row_bias, col_bias, row_weight, col_weight; what is left out is not made.
    Gradients are those of the sum (upstream gradient 1) in float32, so that blocks add up before anything is rounded.

    Raises:
        TypeError, ValueError, RuntimeError: as ``pairwise_sigmoid``.
    """
    needs = [*needs, *[False] * (8 - len(needs))]
    args = _arguments(x, y, scale, bias, row_bias, col_bias, row_weight, col_weight, row_ids, col_ids, ids, offset, compute_dtype)
    chosen = _op.choose(NAME, impl, x.device, IMPLEMENTATIONS[:2], args[-1:], args[:8])
    return SigmoidSweep(*torch.ops.fastvlp.pairwise_sigmoid(*args, 1.0, needs, chosen))


def pairwise_sigmoid(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    col_weight: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: str = "positive",
    offset: int | None = 0,
    factor: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """Sum over pairs of w_i w_j softplus(-z_ij (scale <x_i, y_j> + row_bias_i + col_bias_j + bias)), the loss of SigLIP
    (https://arxiv.org/abs/2303.15343) before its division by the batch.

    z is +1 for positive pairs and -1 for negative ones. Value and gradients come out of one sweep in which no M x N tensor
    exists; a gradient that nothing needs is not computed. Sums are in float32, gradients are rounded once, after the upstream
    gradient has scaled them. All tensor arguments but the ids get exact first derivatives.

    Args:
        x, y: [M, D] and [N, D] float32, bfloat16 or float16 (float64 with impl "cpu" and "reference"), any strides.
        scale, bias: numbers or tensors of shape () or (1,).
        row_bias, col_bias: [M] and [N], added to the logits.
        row_weight, col_weight: [M] and [N], multiply the losses.
        row_ids, col_ids: [M] and [N] integers, both or neither; ids below zero match nothing.
        ids: "positive": pairs of equal id are positive; "exclude": they are left out unless they lie on the offset.
        offset: pairs (i, i + offset) are positive; None: no pair is by its place. In a block of a larger batch, the number of
            the block's first row less that of its first column.
        factor: a number that multiplies the sum and, in the same sweep, its gradients: 1 / M makes the mean of SigLIP. With upstream
            gradient 1, a division after the sum costs a copy of all gradients that this does not.
        compute_dtype: what the features are rounded to for the products; None: autocast's dtype, else that of the features.
        impl: "triton", "cpu", "reference"; None takes the first that runs on the device.

    Returns:
        0-d float32 (float64 for float64 products).

    Raises:
        TypeError: DTensors, dtypes that differ or are not allowed.
        ValueError: shapes or devices that do not fit, an unknown ``ids`` or ``impl``.
        RuntimeError: ``impl`` cannot run here; a second or a forward-mode derivative is asked for.
    """
    args = _arguments(x, y, scale, bias, row_bias, col_bias, row_weight, col_weight, row_ids, col_ids, ids, offset, compute_dtype)
    chosen = _op.choose(NAME, impl, x.device, IMPLEMENTATIONS, args[-1:], args[:8])
    if chosen == "reference":
        return reference.pairwise_sigmoid(*args) * factor
    return torch.ops.fastvlp.pairwise_sigmoid(*args, factor, _inputs.needs_grad(*args[:8]), chosen)[0]


def _arguments(x, y, scale, bias, row_bias, col_bias, row_weight, col_weight, row_ids, col_ids, ids, offset, compute_dtype) -> tuple:
    """The arguments of an implementation, checked: scale and bias as 0-d tensors, ``ids`` as a flag, the dtype of the products."""
    _check.features(NAME, x, y)
    _check.plain_tensors(
        NAME, x=x, row_bias=row_bias, col_bias=col_bias, row_weight=row_weight, col_weight=col_weight, row_ids=row_ids, col_ids=col_ids
    )
    M, N = x.shape[0], y.shape[0]
    floats = (("row_bias", row_bias, M), ("col_bias", col_bias, N), ("row_weight", row_weight, M), ("col_weight", col_weight, N))
    for name, tensor, length in floats:
        _check.vector(NAME, name, tensor, length)
    for name, tensor, length in (("row_ids", row_ids, M), ("col_ids", col_ids, N)):
        _check.vector(NAME, name, tensor, length, integer=True)
    if (row_ids is None) != (col_ids is None):
        raise ValueError(f"{NAME}: only {'row_ids' if col_ids is None else 'col_ids'} is given; give ids of both sides or of neither")
    if ids not in IDS:
        raise ValueError(f"{NAME}: ids={ids!r} is unknown; allowed: {', '.join(map(repr, IDS))}")
    if offset is not None and (isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt))):
        raise TypeError(f"{NAME}: offset is {type(offset).__name__}; it must be an integer, or None where all pairs are negative")
    dtype = _inputs.product_dtype(NAME, x, compute_dtype)
    accumulate = _inputs.sum_dtype(dtype)
    scale, bias = (_inputs.scalar(NAME, name, value, x, accumulate) for name, value in (("scale", scale), ("bias", bias)))
    return x, y, scale, bias, row_bias, col_bias, row_weight, col_weight, row_ids, col_ids, ids == "exclude", offset, dtype
