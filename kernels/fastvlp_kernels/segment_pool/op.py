"""``segment_pool``: the mean or the maximum of the tokens of each segment."""

import torch
from torch import Tensor

from fastvlp_kernels import _check, _op
from fastvlp_kernels._inputs import sum_dtype
from fastvlp_kernels._ragged import check_segments, host_lengths, known_lengths

from . import cpu, reference

NAME = "segment_pool"
IMPLEMENTATIONS = ("triton", "cpu", "reference")
MODES = ("mean", "max")


@_op.custom_op(NAME)
def _pool(
    x: Tensor, cu_seqlens: Tensor, lengths: Tensor | None, mode: str, weight: Tensor | None, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "triton":
        known_lengths(NAME, cu_seqlens, lengths, x.shape[0])
        return _op.module(__package__, impl).forward(x, cu_seqlens, mode, weight)
    return cpu.forward(x, cu_seqlens, host_lengths(NAME, cu_seqlens, lengths, x.shape[0]), mode, weight)


@_pool.register_fake
def _(x, cu_seqlens, lengths, mode, weight, impl):
    S, C = cu_seqlens.shape[0] - 1, x.shape[1]
    first = x.new_empty((S, C) if mode == "max" else (0,), dtype=torch.int64)
    return x.new_empty(S, C), x.new_empty(S, dtype=sum_dtype(x.dtype)), first


@_op.custom_op(f"{NAME}_backward")
def _pool_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, out: Tensor, total: Tensor, first: Tensor, cu_seqlens: Tensor, mode: str,
    needs: list[bool], impl: str,
) -> tuple[Tensor, Tensor]:
    if mode == "max":
        # Row T takes the gradients of empty segments.
        dx = grad.new_zeros(x.shape[0] + 1, x.shape[1])
        return dx.scatter_(0, torch.where(first < 0, x.shape[0], first), grad)[:-1].clone(), total.new_empty(0)
    return _op.module(__package__, impl).mean_backward(grad, x, weight, out, total, cu_seqlens, needs)


@_pool_backward.register_fake
def _(grad, x, weight, out, total, first, cu_seqlens, mode, needs, impl):
    dweight = total.new_empty(0) if mode == "max" or not needs[1] else torch.empty_like(weight, memory_format=torch.contiguous_format)
    return x.new_empty(x.shape if needs[0] or mode == "max" else (0,)), dweight if weight is None else dweight.to(weight.dtype)


def _setup(ctx, inputs, output) -> None:
    x, cu_seqlens, _, ctx.mode, weight, ctx.impl = inputs
    ctx.save_for_backward(x, weight, *output, cu_seqlens)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[4]]
    dx, dweight = torch.ops.fastvlp.segment_pool_backward(grad, *ctx.saved_tensors, ctx.mode, needs, ctx.impl)
    return dx if needs[0] else None, None, None, None, dweight if needs[1] else None, None


_op.differentiate(NAME, _pool, _pool_backward, _setup, _backward)


def segment_pool(
    x: Tensor,
    cu_seqlens: Tensor,
    mode: str = "mean",
    weight: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """The mean or the maximum of each segment's tokens; 0 for an empty segment.

    Sums are in float32 (float64 for float64) and rounded once. ``x`` and ``weight`` get exact first derivatives; the gradient of a
    maximum goes to the first token that has it.

    Args:
        x: [T, C] float32, bfloat16, float16 or float64.
        cu_seqlens: int32 or int64 [S+1]: where each segment starts, then T. Where only a device knows that it ends before T, the tokens
            behind belong to no segment and get no gradient; segments are cut at T.
        mode: "mean": sum_i w_i x_i / sum_i w_i (0 where the weights sum to 0), or "max".
        weight: [T], for "mean": the sizes of merged tokens, or 0 to leave tokens out. None: 1 each.
        lengths: integers [S] on the CPU, what cu_seqlens says (``Packed.lengths``); of use where "cpu" or "reference" computes on
            another device than the CPU, which otherwise costs a synchronisation.
        impl: "triton", "cpu", "reference"; None takes the first that runs on the device.

    Returns:
        [S, C] in the dtype of ``x``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, an unknown mode, weights for a maximum.
        RuntimeError: ``impl`` cannot run here; a second or a forward-mode derivative is asked for.
    """
    op = NAME
    cu_seqlens = check_segments(op, "x", x, cu_seqlens, lengths)
    if x.ndim != 2 or x.dtype not in _check.FLOATS:
        raise ValueError(f"{op}: x is {x.dtype} {tuple(x.shape)}; it must be [tokens, width] in float32, bfloat16, float16 or float64")
    if mode not in MODES:
        raise ValueError(f"{op}: mode={mode!r} is unknown; allowed: {', '.join(MODES)} (for attention pooling: packed_attention)")
    if weight is not None:
        _check.plain_tensors(op, x=x, weight=weight)
        _check.vector(op, "weight", weight, x.shape[0])
        if mode == "max":
            raise ValueError(f"{op}: got weights for a maximum; they are for mode='mean'")
    chosen = _op.choose(op, impl, x.device, IMPLEMENTATIONS, (x.dtype,), (x, weight))
    if chosen == "reference":
        return reference.segment_pool(x, host_lengths(op, cu_seqlens, lengths, x.shape[0]).tolist(), mode, weight)
    return torch.ops.fastvlp.segment_pool(x, cu_seqlens, lengths, mode, weight, chosen)[0]
