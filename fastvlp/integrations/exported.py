"""Merging and attention of evenly long images in PyTorch's own operators, which ``torch.export``, ONNX and ``torch.jit.trace`` know."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def exporting() -> bool:
    """Whether the model is being written down for others, who have none of our operators."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def unpadded(mask: Tensor) -> None:
    """Make what is written down stop at a mask that hides anything; that transformers' own hides nothing cannot be read here."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    # An assertion is part of the exported graph; a Python if would be decided once, at export.
    torch._assert_async(seen.all(), "fastvlp.accelerate: a model exported with merge= takes batches without padding")


def attend(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, bias: Tensor | None, scale: float | None, dropout: float) -> Tensor:
    """Attention of each image, [B, N, H, d]; ``size`` [B * N] weighs the keys, ``bias`` [B * N] or [H, B * N] is added to their scores."""
    rows, tokens = q.shape[:2]
    terms = None if bias is None else torch.atleast_2d(bias).unflatten(1, (rows, tokens)).transpose(0, 1)[:, :, None]
    if size is not None:
        # A factor s of exp(score) is log s added to the score.
        sizes = size.to(torch.promote_types(q.dtype, torch.float32)).log().view(rows, 1, 1, tokens)
        terms = sizes if terms is None else terms + sizes
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if terms is None else terms.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale).transpose(1, 2)


def merge(x: Tensor, size: Tensor | None, metric: Tensor, gone: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """``merge_plan`` of x [B, N, C] by metric [B * N, d]: x [B, N', C], size [B * N'], and the row of each token, [B * N]."""
    rows, tokens = x.shape[:2]
    unit = F.normalize(metric.unflatten(0, (rows, tokens)).float(), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    # Protected tokens neither merge away (rows, even places) nor are merged into (columns, odd places).
    scores[:, : (protected + 1) // 2] = -torch.inf
    scores[:, :, : protected // 2] = -torch.inf
    best, match = scores.max(2)
    ranked = best.topk(best.shape[1], dim=1).indices
    gone_at, stay = ranked[:, :gone], ranked[:, gone:]
    if protected:
        stay = stay.sort(1).values
    kept = stay.shape[1]
    # ToMe's order: tokens of even place that stay, then all of odd place.
    even = torch.zeros_like(ranked).scatter(1, stay, torch.arange(kept, device=x.device).expand(rows, kept))
    even = even.scatter(1, gone_at, kept + match.gather(1, gone_at))
    odd = (kept + torch.arange(tokens // 2, device=x.device)).expand(rows, -1)
    source = torch.zeros(rows, tokens, dtype=torch.int64, device=x.device)
    source[:, ::2], source[:, 1::2] = even, odd
    if protected == 2:
        source = torch.where(source == kept, 1, torch.where((source > 0) & (source < kept), source + 1, source))
    elif protected > 2:
        # The place of each kept token's first patch; sorting by it restores the order of the picture.
        first = torch.cat((2 * stay, 1 + 2 * torch.arange(tokens // 2, device=x.device).expand(rows, -1)), 1)
        source = first.argsort(1).argsort(1).gather(1, source)
    weight = x.new_ones(rows, tokens, dtype=torch.float32) if size is None else size.view(rows, tokens).float()
    total = weight.new_zeros(rows, tokens - gone).scatter_add(1, source, weight)
    sums = x.to(torch.promote_types(x.dtype, torch.float32)) * weight[:, :, None]
    sums = sums.new_zeros(rows, tokens - gone, x.shape[2]).scatter_add(1, source[:, :, None].expand_as(sums), sums)
    flat = source + torch.arange(rows, device=x.device)[:, None] * (tokens - gone)
    return (sums / total[:, :, None]).to(x.dtype), total.flatten().int(), flat.flatten()
