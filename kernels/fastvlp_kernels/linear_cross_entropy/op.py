"""``linear_cross_entropy``: the loss of a classifier over many classes, as captioners end in, without its logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check, _op
from .._inputs import needs_grad, product_dtype, sum_dtype
from . import cpu, reference
from .rows import IGNORED, UNLISTED, Inputs, Rows, losses

OP = "linear_cross_entropy"
IMPLEMENTATIONS = ("triton", "cpu", "reference")
REDUCTIONS = ("mean", "sum", "none")
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@_op.custom_op(OP)
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    classes: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    dtype: torch.dtype,
    needs: Sequence[bool],
    impl: str,
) -> Five:
    """The loss; what a backward that computes the logits again wants, [3, T]; or the gradients of x, weight and bias for upstream 1."""
    a = _listed(x, weight, bias, targets, classes, ignore_index, label_smoothing, z_loss, dtype)
    if impl == "triton":
        from . import triton

        rows = triton.forward(a)
        dx, dweight, dbias = (x.new_empty(0, dtype=torch.float32) for _ in range(3))
        return _reduce(losses(rows, a), a.targets, reduction), torch.stack(rows[:3]), dx, dweight, dbias
    # With one upstream gradient for all rows, the sweep that makes the loss makes the gradients too: three products, not four.
    grad = None if reduction == "none" or not any(needs) else _upstream(a, reduction)
    loss, dx, dweight, dbias = cpu.sweep(a, grad, needs)
    dweight, dbias = (_widen(gradient, weight.shape[0], classes) for gradient in (dweight, dbias))
    return _reduce(loss, a.targets, reduction), x.new_empty(0, 0, dtype=loss.dtype), dx, dweight, dbias


@_forward.register_fake
def _(x, weight, bias, targets, classes, ignore_index, label_smoothing, z_loss, reduction, dtype, needs, impl):
    acc = sum_dtype(dtype)
    in_forward = impl != "triton" and reduction != "none"
    shapes = (x.shape, weight.shape, weight.shape[:1])
    made = (x.new_empty(shape if need and in_forward else (0,), dtype=acc) for shape, need in zip(shapes, needs, strict=True))
    loss = x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=acc)
    return loss, x.new_empty((3, x.shape[0]) if impl == "triton" else (0, 0), dtype=acc), *made


@_op.custom_op(f"{OP}_backward")
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    classes: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    dtype: torch.dtype,
    needs: Sequence[bool],
    impl: str,
    statistics: Tensor,
    made: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes = (x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    if any(gradient.numel() for gradient in made):
        # Scaled before the one rounding, which brings the loss scale of float16 into range.
        dx, dweight, dbias = (
            torch.mul(gradient, grad, out=torch.empty_like(gradient, dtype=d)) for gradient, d in zip(made, dtypes, strict=True)
        )
        return dx, dweight, dbias
    a = _listed(x, weight, bias, targets, classes, ignore_index, label_smoothing, z_loss, dtype)
    of_rows = grad.to(sum_dtype(dtype)) * _upstream(a, reduction)
    if impl == "triton":
        from . import triton

        peak, others, target = statistics
        dx, dweight, dbias = triton.backward(a, of_rows, Rows(peak, others, target, statistics.new_empty(0)), needs)
    else:
        _, dx, dweight, dbias = cpu.sweep(a, of_rows, needs)
    dweight, dbias = (_widen(gradient, weight.shape[0], classes) for gradient in (dweight, dbias))
    return dx.to(dtypes[0]), dweight.to(dtypes[1]), dbias.to(dtypes[2])


@_backward.register_fake
def _(grad, x, weight, bias, targets, classes, ignore_index, label_smoothing, z_loss, reduction, dtype, needs, impl, statistics, made):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dtypes = (x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    return tuple(x.new_empty(shape if need else (0,), dtype=d) for shape, d, need in zip(shapes, dtypes, needs, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Five) -> None:
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.rest = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    x, weight, bias, targets, classes, statistics, *made = ctx.saved_tensors
    needs = ctx.rest[5]
    dtypes = (x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    fit = all(g.dtype == d for g, d, need in zip(made, dtypes, needs, strict=True) if need) and any(g.numel() for g in made)
    # On the CPU the upstream gradient can be read: 1 spares a copy of everything. Under tracing it is not a plain tensor.
    if fit and type(grad) is Tensor and grad.device.type == "cpu" and not torch.is_grad_enabled() and grad.item() == 1:
        found = made
    else:
        found = torch.ops.fastvlp.linear_cross_entropy_backward(grad, x, weight, bias, targets, classes, *ctx.rest, statistics, made)
    return (*(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 9)


_op.differentiate(OP, _forward, _backward, _save, _differentiate)


def _upstream(a: Inputs, reduction: str) -> Tensor:
    """[T]: the gradient of the reduced loss with respect to the rows' own."""
    ones = a.x.new_ones(a.x.shape[0], dtype=sum_dtype(a.dtype))
    return ones / (a.targets != IGNORED).sum().clamp(min=1) if reduction == "mean" else ones


def _reduce(loss: Tensor, targets: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / (targets != IGNORED).sum().clamp(min=1) if reduction == "mean" else total


def _widen(gradient: Tensor, V: int, classes: Tensor | None) -> Tensor:
    """The gradient of all classes from that of the listed ones."""
    if classes is None or gradient.numel() == 0:
        return gradient
    return gradient.new_zeros(V, *gradient.shape[1:]).index_add_(0, classes, gradient)


def _listed(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, classes: Tensor | None, ignore_index: int, label_smoothing: float,
    z_loss: float, dtype: torch.dtype,
) -> Inputs:  # fmt: skip
    """The classes that count, numbered from 0, and targets that say so.

    Raises:
        ValueError: on the CPU, a target or a class is out of range, or a target is not among ``classes``.
    """
    V, ignored = weight.shape[0], targets == ignore_index
    on_host = x.device.type == "cpu"
    if on_host:
        wrong = targets[~ignored & ((targets < 0) | (targets >= V))]
        if len(wrong):
            raise ValueError(f"{OP}: a target is {wrong[0]}; allowed: 0 to {V - 1}, and ignore_index, {ignore_index}")
    targets = targets.masked_fill(ignored, IGNORED)
    if classes is not None:
        if on_host and not 0 <= int(classes.min()) <= int(classes.max()) < V:
            raise ValueError(f"{OP}: classes go from {classes.min()} to {classes.max()}; allowed: 0 to {V - 1}")
        weight, bias = weight.index_select(0, classes), None if bias is None else bias.index_select(0, classes)
        place = classes.new_full((V,), UNLISTED).index_copy_(0, classes, torch.arange(len(classes), device=classes.device))
        local = place[targets.masked_fill(ignored, 0)]
        if on_host and (wrong := targets[~ignored & (local == UNLISTED)]).numel():
            raise ValueError(f"{OP}: target {wrong[0]} is not among classes; add the batch's own targets to them")
        targets = local.masked_fill(ignored, IGNORED)
    return Inputs(x.detach(), weight.detach(), None if bias is None else bias.detach(), targets, label_smoothing, z_loss, dtype)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    classes: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """Cross-entropy of the logits x weight' + bias, which are never stored: ``F.cross_entropy(F.linear(x, weight, bias), targets)``.

    With l the logits of a row, lse their log-sum-exp and e ``label_smoothing``, a row's loss is
    (1 - e) (lse - l_target) + e (lse - mean of l) + z_loss lse^2.

    Args:
        x: [T, D] and weight: [V, D], float32, bfloat16 or float16 (float64 with impl "cpu" and "reference"), any strides; bias: [V],
            floating point. V, D >= 1. Of two dtypes where ``compute_dtype`` or autocast says which to multiply in.
        targets: [T] int64, from 0 to V - 1 or ``ignore_index``. On a CUDA device, where looking would cost a synchronisation, any other
            gives a wrong loss or PyTorch's device-side assertion.
        ignore_index: the target of rows that do not count. On the CPU such rows cost nothing.
        label_smoothing: from 0 to 1, the share that all classes get alike (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567).
        reduction: "mean" over the rows that count (0 where there are none), "sum", or "none": each row's own, 0 where it does not count.
        z_loss: weight of lse^2, which keeps logits from drifting (PaLM, https://arxiv.org/abs/2204.02311).
        classes: int64 [K]: the classes of this step's softmax (sampled softmax, https://arxiv.org/abs/1412.2007); the others have
            neither logit nor gradient, and targets are among them (on a CUDA device, one that is not gives an infinite loss). An id that
            is listed twice counts twice.
        compute_dtype: what x and weight are rounded to for the products; None: autocast's dtype, else theirs. Sums are float32.
        impl: "triton", "cpu", "reference" (dense); None takes the first that runs on the device.

    Returns:
        0-d, or [T] with reduction "none"; float32 (float64 for float64 products). x, weight and bias get exact first derivatives, each
        in its own dtype; one that needs none is not made.

    Raises:
        TypeError, ValueError: wrong inputs. RuntimeError: ``impl`` cannot run here; a second or a forward-mode derivative is asked for.
    """
    _check.plain_tensors(OP, 3, x=x, weight=weight, targets=targets, bias=bias, classes=classes)
    dtype = _checked(x, weight, targets, bias, label_smoothing, reduction, z_loss, classes, compute_dtype)
    chosen = _op.choose(OP, impl, x.device, IMPLEMENTATIONS, (dtype,), (x, weight, bias))
    if chosen == "reference":
        a = _listed(x, weight, bias, targets, classes, ignore_index, label_smoothing, z_loss, dtype)
        rows = slice(None) if classes is None else classes
        a = a._replace(x=x, weight=weight[rows], bias=None if bias is None else bias[rows])
        return _reduce(reference.row_losses(a), a.targets, reduction)
    arguments = (ignore_index, float(label_smoothing), float(z_loss), reduction, dtype, needs_grad(x, weight, bias), chosen)
    return torch.ops.fastvlp.linear_cross_entropy(x, weight, bias, targets, classes, *arguments)[0]


def _checked(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, label_smoothing: float, reduction: str, z_loss: float,
    classes: Tensor | None, compute_dtype: torch.dtype | None,
) -> torch.dtype:  # fmt: skip
    """The dtype of the products, after everything that needs no value has been looked at."""
    for name, matrix, sides in (("x", x, "[tokens, width]"), ("weight", weight, "[classes, width]")):
        if matrix.ndim != 2 or matrix.dtype not in _check.FLOATS:
            raise ValueError(f"{OP}: {name} is {matrix.dtype} {tuple(matrix.shape)}; it must be {sides}, floating point")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"{OP}: x has width {x.shape[1]} and weight has width {weight.shape[1]}; they must be equal")
    if weight.numel() == 0:
        raise ValueError(f"{OP}: weight has shape {tuple(weight.shape)}; at least one class and width 1 are needed")
    if targets.dtype != torch.int64 or targets.shape != x.shape[:1]:
        got = f"targets are {targets.dtype} {tuple(targets.shape)}"
        raise ValueError(f"{OP}: {got}; they must be int64 ({x.shape[0]},), one for each row of x")
    if classes is not None and (classes.dtype != torch.int64 or classes.ndim != 1 or classes.shape[0] == 0):
        raise ValueError(f"{OP}: classes are {classes.dtype} {tuple(classes.shape)}; they must be int64 [K] with at least one id")
    _check.vector(OP, "bias", bias, weight.shape[0])
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction={reduction!r} is unknown; allowed: {', '.join(map(repr, REDUCTIONS))}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{OP}: label_smoothing={label_smoothing}; it must be from 0 to 1")
    dtype = product_dtype(OP, x, compute_dtype)
    if dtype != product_dtype(OP, weight, compute_dtype):
        raise TypeError(f"{OP}: x is {x.dtype} and weight is {weight.dtype}; cast one of them, or name compute_dtype")
    return dtype
