"""Attention inside each segment, one segment at a time: the mathematics of ``packed_attention``."""

import torch
from torch import Tensor

from .types import pairs


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Tensor, lengths_k: Tensor, key_size: Tensor | None, key_bias: Tensor | None,
    prefix_len: Tensor | None, causal: bool, scale: float, seen: Tensor | None = None, kind: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [Tq, H, e] and the mass [Tk], probabilities summed over queries and heads. Differentiable; computes in the dtype of q."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    outs, masses = [q.new_zeros(0, heads, v.shape[2])], [q.new_zeros(0)]
    q_start = k_start = 0
    for segment, (n, m) in enumerate(zip(lengths_q.tolist(), lengths_k.tolist(), strict=True)):
        keys = slice(k_start, k_start + m)
        qs, ks, vs = q[q_start : q_start + n], k[keys].repeat_interleave(group, 1), v[keys].repeat_interleave(group, 1)
        scores = torch.einsum("nhd,mhd->hnm", qs, ks) * scale
        if key_bias is not None:
            scores = scores + key_bias[..., keys].unsqueeze(-2).to(scores.dtype)
        weight = scores.new_ones(n, m) if key_size is None else key_size[keys].to(scores.dtype).expand(n, m)
        if causal:
            place, last = torch.arange(m, device=q.device), torch.arange(m - n, m, device=q.device)[:, None]
            visible = place <= last
            if prefix_len is not None:
                visible = visible | (place < prefix_len[segment])
            weight = torch.where(visible, weight, 0)
        if seen is not None and kind is not None:
            weight = torch.where(pairs(seen[q_start : q_start + n], kind[keys]), weight, 0)
        scores = torch.where(weight > 0, scores, -torch.inf)
        # The usual maximum, but finite where a row is all -inf: -inf minus itself is NaN.
        maximum = scores.detach().amax(2, keepdim=True).clamp_min(torch.finfo(scores.dtype).min) if m else 0
        weighted = weight * torch.exp(scores - maximum)
        total = weighted.sum(2, keepdim=True)
        probability = weighted / torch.where(total > 0, total, 1)
        outs.append(torch.einsum("hnm,mhd->nhd", probability, vs))
        masses.append(probability.detach().sum((0, 1)))
        q_start, k_start = q_start + n, k_start + m
    return torch.cat(outs), torch.cat(masses)
