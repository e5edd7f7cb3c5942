"""Means as sums over segments; maxima through padded batches, segments of one length where they lie."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fastvlp_kernels._inputs import sum_dtype
from fastvlp_kernels._ragged import batches

ELEMENTS = 1 << 20  # gathered at once


def forward(
    x: Tensor, cu_seqlens: Tensor, lengths: Tensor, mode: str, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """out [S, C]; total [S], the sums of the weights; first [S, C], the token of the maximum, -1 for none ([0] for means)."""
    if mode == "max":
        return _maximum(x, lengths)
    dtype = sum_dtype(x.dtype)
    if weight is None:
        total = lengths.to(x.device, dtype)
    else:
        weight = weight.to(dtype)
        total = _sums(weight[:, None], cu_seqlens, None).squeeze(1)
    means = _sums(x.to(dtype), cu_seqlens, weight).div_(torch.where(total == 0, 1, total)[:, None])
    return means.to(x.dtype), total, torch.empty(0, dtype=torch.int64, device=x.device)


def _sums(x: Tensor, cu_seqlens: Tensor, weight: Tensor | None) -> Tensor:
    """[S, C], one pass over x; segment_reduce takes several times as long."""
    tokens = torch.arange(x.shape[0], dtype=cu_seqlens.dtype, device=x.device)
    return embedding_bag(tokens, x, cu_seqlens, mode="sum", per_sample_weights=weight, include_last_offset=True)


def segments(counts: Tensor, tokens: int) -> Tensor:
    """The segment of each token, int64 [tokens], from the number of tokens of each."""
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=tokens)


def _maximum(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    S, C, dtype = len(lengths), x.shape[1], sum_dtype(x.dtype)
    out, first = x.new_zeros(S, C), torch.full((S, C), -1, dtype=torch.int64, device=x.device)
    for batch in batches(lengths, x.device, max(1, ELEMENTS // max(C, 1))):
        tokens = batch.read(x).to(dtype)
        # Padding becomes -inf, against which no real token loses.
        values, place = (tokens if batch.full else tokens.masked_fill(~batch.inside[..., None], -torch.inf)).max(1)
        # Maxima go through padded batches, as scatter_reduce shares the gradient among equal maxima; this names the first.
        first[batch.segments] = batch.tokens[:, :1] + place
        out[batch.segments] = values.to(x.dtype)
    return out, x.new_zeros(S, dtype=dtype), first


def mean_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, out: Tensor, total: Tensor, cu_seqlens: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weights; [0] where ``needs`` says no."""
    dx, dweight = x.new_empty(0), total.new_empty(0)
    # A mean without weight is 0 whatever x is, so that its gradient is 0 and not 1 / 0.
    share = torch.where(total == 0, 0, 1 / total)
    segment = segments(cu_seqlens.diff(), x.shape[0])
    if needs[0]:
        if weight is None:
            # Rounded once for each segment and then copied: all of its tokens get the same.
            dx = (grad.to(share.dtype) * share[:, None]).to(x.dtype).index_select(0, segment)
        else:
            dx = (grad.to(share.dtype).index_select(0, segment) * (share[segment] * weight.to(share.dtype))[:, None]).to(x.dtype)
    if needs[1]:
        g, centre = (t.to(share.dtype).index_select(0, segment) for t in (grad, out))
        # d mean / d w_i = (x_i - mean) / total.
        dweight = (g * (x.to(share.dtype) - centre)).sum(1) * share[segment]
    return dx, dweight if weight is None else dweight.to(weight.dtype)
