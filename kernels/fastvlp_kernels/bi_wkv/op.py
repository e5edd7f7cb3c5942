"""``bi_wkv``: bidirectional linear attention with a decay per channel and token."""

import torch
from torch import Tensor

from fastvlp_kernels import _check, _op
from fastvlp_kernels._ragged import check_segments, host_lengths, known_lengths

from . import cpu, reference

NAME = "bi_wkv"
IMPLEMENTATIONS = ("triton", "cpu", "reference")


@_op.custom_op(NAME)
def _forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, cu_seqlens: Tensor, lengths: Tensor | None, scale: float, impl: str
) -> Tensor:
    if impl == "triton":
        whole = known_lengths(NAME, cu_seqlens, lengths, v.shape[0]) is not None
        return _op.module(__package__, impl).forward(r, k, v, w, u, cu_seqlens, whole, scale)
    return cpu.forward(r, k, v, w, u, host_lengths(NAME, cu_seqlens, lengths, v.shape[0]), scale)


@_forward.register_fake
def _(r, k, v, w, u, cu_seqlens, lengths, scale, impl):
    return v.new_empty(v.shape)


@_op.custom_op(f"{NAME}_backward")
def _backward(
    grad: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, cu_seqlens: Tensor, lengths: Tensor | None, scale: float,
    needs: list[bool], impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if impl == "triton":
        whole = known_lengths(NAME, cu_seqlens, lengths, v.shape[0]) is not None
        return _op.module(__package__, impl).backward(grad, r, k, v, w, u, cu_seqlens, whole, scale, needs)
    return cpu.backward(grad, r, k, v, w, u, host_lengths(NAME, cu_seqlens, lengths, v.shape[0]), scale, needs)


@_backward.register_fake
def _(grad, r, k, v, w, u, cu_seqlens, lengths, scale, needs, impl):
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip((r, k, v, w, u), needs, strict=True))


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad):
    needs = list(ctx.needs_input_grad[:5])
    results = torch.ops.fastvlp.bi_wkv_backward(grad, *ctx.saved_tensors, ctx.scale, needs, ctx.impl)
    return *(x if need else None for x, need in zip(results, needs, strict=True)), None, None, None, None


_op.differentiate(NAME, _forward, _backward, _setup, _gradients)


def bi_wkv(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    cu_seqlens: Tensor,
    scale: float = 1.0,
    *,
    lengths: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """The bidirectional WKV of RWKV-CLIP (https://arxiv.org/abs/2406.06973) inside each segment, in linear time.

    y_t = scale * r_t . (sum_{s<t} D(s, t) k_s v_s + u k_t v_t + sum_{s>t} D(t, s) k_s v_s), where D(a, b) is the product over a < j < b
    of exp(-exp(w_j)), for each of the K channels: neighbours do not decay. Chunks of tokens are products of matrices, and states go
    from one to the next in both directions; no exponent is positive, so that any w is safe, infinities too. Sums are in float32
    (float64 for float64). Backward computes the states again, so that nothing is kept between the two, and is deterministic.

    Args:
        r, k: [T, H, K]. v: [T, H, V]. All float32, bfloat16, float16 or float64, of one dtype. K and V: at most 128 with "triton".
        w: [T, H, K], the logarithm of the rate of decay; u: [H, K], the weight of the token itself. Any of those dtypes.
        cu_seqlens: int32 or int64 [S+1]: where each segment starts, then T. Where only a device knows that it ends before T, the tokens
            behind belong to no segment and have 0; segments are cut at T.
        scale: of the result.
        lengths: integers [S] on the CPU, what cu_seqlens says (``Packed.lengths``); of use where "cpu" or "reference" computes on
            another device than the CPU, which otherwise costs a synchronisation.
        impl: "triton", "cpu", "reference"; None takes the first that runs on the device.

    Returns:
        [T, H, V] in the dtype of ``v``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
        RuntimeError: ``impl`` cannot run here; a second or a forward-mode derivative is asked for.
    """
    cu_seqlens = check_segments(NAME, "v", v, cu_seqlens, lengths)
    _check_tensors(r, k, v, w, u)
    # States of K x V stay in registers while a program walks the chunks.
    wide = "computes heads of at most 128 channels" if max(k.shape[2], v.shape[2]) > 128 else ""
    chosen = _op.choose(NAME, impl, v.device, IMPLEMENTATIONS, (v.dtype, w.dtype, u.dtype), (r, k, v, w, u), wide)
    if chosen == "reference":
        return reference.bi_wkv(r, k, v, w, u, host_lengths(NAME, cu_seqlens, lengths, v.shape[0]).tolist(), scale)
    return torch.ops.fastvlp.bi_wkv(r, k, v, w, u, cu_seqlens, lengths, float(scale), chosen)


def _check_tensors(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> None:
    _check.plain_tensors(NAME, 5, r=r, k=k, v=v, w=w, u=u)
    shapes = f"r {tuple(r.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, w {tuple(w.shape)}, u {tuple(u.shape)}"
    if v.ndim != 3 or k.ndim != 3 or not r.shape == k.shape == w.shape or k.shape[:2] != v.shape[:2] or u.shape != k.shape[1:]:
        raise ValueError(f"{NAME}: got {shapes}; r, k and w must be [T, H, K], v [T, H, V] and u [H, K]")
    if 0 in (*u.shape, v.shape[2]):
        raise ValueError(f"{NAME}: got {shapes}; at least one head and one channel are needed")
    if not r.dtype == k.dtype == v.dtype:
        raise TypeError(f"{NAME}: r is {r.dtype}, k is {k.dtype} and v is {v.dtype}; cast them to one dtype")
    if any(x.dtype not in _check.FLOATS for x in (v, w, u)):
        raise TypeError(f"{NAME}: v is {v.dtype}, w is {w.dtype}, u is {u.dtype}; allowed: float32, bfloat16, float16, float64")
