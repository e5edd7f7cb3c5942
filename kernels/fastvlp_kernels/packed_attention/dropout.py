"""Attention whose weights are dropped at random in training: PyTorch's, over segments padded to the longest, with O(S n m) weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import pairs


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Tensor, lengths_k: Tensor, key_size: Tensor | None, key_bias: Tensor | None,
    prefix_len: Tensor | None, causal: bool, scale: float, dropout_p: float, of_query: Tensor | None = None, of_key: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out [Tq, H, e]: each probability is 0 with chance ``dropout_p``, else divided by 1 - dropout_p."""
    if q.shape[0] == 0 or k.shape[0] == 0:
        return q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    longest_q, longest_k = int(lengths_q.max()), int(lengths_k.max())
    lengths_q, lengths_k = lengths_q.to(q.device), lengths_k.to(q.device)
    n, m = (torch.arange(longest, device=q.device) for longest in (longest_q, longest_k))
    real_q, real_k = n < lengths_q[:, None], m < lengths_k[:, None]

    def pad(x: Tensor, real: Tensor) -> Tensor:
        if x.shape[0] == real.numel():
            return x.unflatten(0, real.shape)
        return x.new_zeros(*real.shape, *x.shape[1:]).masked_scatter(real.unflatten(1, (-1, *[1] * (x.ndim - 1))), x)

    seen = real_k[:, None, None]
    terms = None
    if key_size is not None:
        sizes = pad(key_size.to(torch.promote_types(q.dtype, torch.float32)), real_k)
        seen = seen & (sizes > 0)[:, None, None]
        terms = torch.where(sizes > 0, sizes, 1).log()[:, None, None]
    if key_bias is not None:
        biases = pad(torch.atleast_2d(key_bias).t(), real_k).transpose(1, 2)[:, :, None]
        seen = seen & ~biases.detach().isneginf()
        biases = torch.where(seen, biases, 0)
        terms = biases if terms is None else terms + biases
    if causal:
        limit = n + 1 + (lengths_k - lengths_q)[:, None]
        if prefix_len is not None:
            limit = limit.maximum(prefix_len[:, None])
        seen = seen & (m < limit[:, None, :, None])
    if of_query is not None and of_key is not None:
        seen = seen & pairs(pad(of_query, real_q), pad(of_key, real_k))[:, None]
    # A query that sees nothing attends to everything, and is set to 0 below.
    some = seen.any(3, keepdim=True)
    mask = seen | ~some
    if terms is not None:
        mask = torch.where(mask, terms.to(q.dtype), -torch.inf)
    q, k, v = (pad(x, real).transpose(1, 2) for x, real in ((q, real_q), (k, real_k), (v, real_k)))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return torch.where(some, out, 0).transpose(1, 2)[real_q]
