"""Pairs of tokens, one distance after the other, in float64: the mathematics of ``bi_wkv``."""

import torch
from torch import Tensor


def bi_wkv(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, lengths: list[int], scale: float) -> Tensor:
    """[T, H, V] in the dtype of v; differentiable."""
    parts = [v[:0].double()]
    for R, K, V, W in zip(*(x.double().split(lengths) for x in (r, k, v, w)), strict=True):
        # Where exp(-exp(w)) is 0 its derivative is too, not 0 * inf.
        decay = torch.exp(-torch.exp(W.clamp_max(9)))
        y = (R * u.double() * K).sum(2, keepdim=True) * V
        D = torch.ones_like(K)  # D[t] = D(t, t + distance)
        for distance in range(1, len(V)):
            D = D[:-1] * (decay[distance - 1 : -1] if distance > 1 else 1)
            later = (R[distance:] * D * K[:-distance]).sum(2, keepdim=True) * V[:-distance]
            earlier = (R[:-distance] * D * K[distance:]).sum(2, keepdim=True) * V[distance:]
            nothing = V.new_zeros(distance, *V.shape[1:])
            y = y + torch.cat((nothing, later)) + torch.cat((earlier, nothing))
        parts.append(scale * y)
    return torch.cat(parts).to(v.dtype)
