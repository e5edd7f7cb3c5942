"""``packed_attention``: attention inside each segment of a packed batch."""

import torch
from torch import Tensor

from fastvlp_kernels import _backend, _check

from . import cpu, reference

IMPLEMENTATIONS = ("cpu", "reference")


@torch.library.custom_op("fastvlp::packed_attention", mutates_args=())
def _packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, lengths: Tensor | None, lengths_k: Tensor | None,
    key_size: Tensor | None, key_bias: Tensor | None, prefix_len: Tensor | None, causal: bool, scale: float, with_mass: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.forward(q, k, v, *_host(cu_seqlens_q, cu_seqlens_k, lengths, lengths_k), key_size, key_bias, prefix_len, causal, scale, with_mass)


@_packed_attention.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k, key_size, key_bias, prefix_len, causal, scale, with_mass, impl):
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[0] * q.shape[1], dtype=statistics)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), lse, q.new_empty(k.shape[0] if with_mass else 0, dtype=torch.float32)


@torch.library.custom_op("fastvlp::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, lengths: Tensor | None,
    lengths_k: Tensor | None, key_size: Tensor | None, key_bias: Tensor | None, prefix_len: Tensor | None, causal: bool, scale: float,
    needs: list[bool], impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    host = _host(cu_seqlens_q, cu_seqlens_k, lengths, lengths_k)
    return cpu.backward(grad, q, k, v, out, lse, *host, key_size, key_bias, prefix_len, causal, scale, tuple(needs))


@_packed_attention_backward.register_fake
def _(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k, key_size, key_bias, prefix_len, causal, scale, needs, impl):
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip((q, k, v, lse if key_bias is None else key_bias), needs, strict=True))


def _setup(ctx, inputs, output) -> None:
    q, k, v, cu_q, cu_k, lengths, lengths_k, key_size, key_bias, prefix_len, ctx.causal, ctx.scale, _, ctx.impl = inputs
    ctx.save_for_backward(q, k, v, *output[:2], cu_q, cu_k, lengths, lengths_k, key_size, key_bias, prefix_len)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 8)]
    grads = torch.ops.fastvlp.packed_attention_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale, needs, ctx.impl)
    dq, dk, dv, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dq, dk, dv, None, None, None, None, None, dbias, None, None, None, None, None


def _refuse(ctx, *_):
    raise RuntimeError("packed_attention: second derivatives are not available; use impl='reference' for them")


_packed_attention.register_autograd(_backward, setup_context=_setup)
_packed_attention_backward.register_autograd(_refuse)


def _host(cu_q: Tensor, cu_k: Tensor, lengths: Tensor | None, lengths_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """The lengths on the CPU: read from the device only where the caller did not give them."""
    host_q = cu_q.diff().cpu() if lengths is None else lengths
    if cu_k is cu_q or (lengths is not None and lengths_k is lengths):
        return host_q, host_q
    return host_q, cu_k.diff().cpu() if lengths_k is None else lengths_k


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    key_size: Tensor | None = None,
    key_bias: Tensor | None = None,
    prefix_len: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_key_mass: bool = False,
    lengths: Tensor | None = None,
    lengths_k: Tensor | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + key_bias) v inside each segment."""
    _check.plain_tensors("packed_attention", q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, key_size=key_size, key_bias=key_bias)
    if cu_seqlens_k is None:
        cu_seqlens_k, lengths_k = cu_seqlens_q, lengths
    scale = q.shape[2] ** -0.5 if scale is None else scale
    chosen = _backend.choose("packed_attention", impl, q.device, IMPLEMENTATIONS)
    if chosen == "reference":
        host = _host(cu_seqlens_q, cu_seqlens_k, lengths, lengths_k)
        out, mass = reference.packed_attention(q, k, v, *host, key_size, key_bias, prefix_len, causal, scale)
    else:
        out, _, mass = torch.ops.fastvlp.packed_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k, key_size, key_bias, prefix_len, causal, scale, return_key_mass, chosen
        )
    return (out, mass) if return_key_mass else out
