"""Pooling through padded batches of similar segments; segments of one length are pooled where they lie."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvlp_kernels._inputs import sum_dtype
from fastvlp_kernels._ragged import batches

ELEMENTS = 1 << 20  # gathered at once


def forward(x: Tensor, lengths: Tensor, mode: str, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """out [S, C]; total [S], the sums of the weights; first [S, C], the token of the maximum, -1 for none ([0] for means)."""
    S, C, dtype = len(lengths), x.shape[1], sum_dtype(x.dtype)
    out, total = x.new_zeros(S, C), x.new_zeros(S, dtype=dtype)
    first = torch.full((S, C) if mode == "max" else (0,), -1, dtype=torch.int64, device=x.device)
    for batch in batches(lengths, x.device, max(1, ELEMENTS // max(C, 1))):
        if batch.full and len(batch.segments) == S:
            tokens = x.unflatten(0, batch.tokens.shape).to(dtype)
        else:
            tokens = x.index_select(0, batch.tokens.flatten()).unflatten(0, batch.tokens.shape).to(dtype)
        if mode == "max":
            tokens = tokens if batch.full else tokens.masked_fill(~batch.inside[..., None], -torch.inf)
            values, place = tokens.max(1)
            first[batch.segments] = batch.tokens[:, :1] + place
        else:
            tokens = tokens if batch.full else tokens.masked_fill_(~batch.inside[..., None], 0)
            shares = batch.inside.to(dtype) if weight is None else torch.where(batch.inside, weight[batch.tokens].to(dtype), 0)
            sums = shares.sum(1)
            total[batch.segments] = sums
            values = torch.bmm(shares[:, None], tokens).squeeze(1) / torch.where(sums == 0, 1, sums)[:, None]
        out[batch.segments] = values.to(x.dtype)
    return out, total, first


def mean_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, out: Tensor, total: Tensor, cu_seqlens: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weights; [0] where ``needs`` says no."""
    dx, dweight = x.new_empty(0), total.new_empty(0)
    share = torch.where(total == 0, 0, 1 / total)
    segment = torch.arange(len(total), device=x.device).repeat_interleave(cu_seqlens.diff(), output_size=x.shape[0])
    if needs[0]:
        if weight is None:
            dx = (grad.to(share.dtype) * share[:, None]).to(x.dtype).index_select(0, segment)
        else:
            dx = (grad.to(share.dtype).index_select(0, segment) * (share[segment] * weight.to(share.dtype))[:, None]).to(x.dtype)
    if needs[1]:
        g, centre = (t.to(share.dtype).index_select(0, segment) for t in (grad, out))
        dweight = (g * (x.to(share.dtype) - centre)).sum(1) * share[segment]
    return dx, dweight if weight is None else dweight.to(weight.dtype)
