"""Pooling over the segments of a packed batch."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp.layers.attention import AttentionPool
from fastvlp_kernels import segment_pool
from fastvlp_kernels.packed import Packed, check_packed

MODES = ("mean", "last", "first", "attention")


def segment_mean(packed: Packed) -> Tensor:
    """The mean token of each segment: [S, C] of the dtype of ``packed.x`` [T, C], weighted by ``packed.size``; zeros of no tokens."""
    check_packed("segment_mean", packed=packed)
    return segment_pool(packed.x, packed.cu_seqlens, "mean", packed.size, lengths=packed.lengths)


class Pool(nn.Module):
    """One unit feature for each segment: its tokens pooled, projected and normalised. A segment without tokens gives zeros.

    Args:
        width: C, of the tokens. out: D, of the features.
        mode: the mean token (weighted by the sizes of merged ones), the last (of causal text), the first (a class token), or what a
            learned query attends to, of ``heads`` heads.
    """

    def __init__(self, width: int, out: int, mode: str = "mean", heads: int = 8) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"Pool: mode is {mode!r}; allowed: {', '.join(MODES)}")
        self.mode = mode
        self.attention = AttentionPool(width, heads) if mode == "attention" else None
        self.projection = nn.Parameter(torch.randn(width, out) * width**-0.5)

    def forward(self, tokens: Packed) -> Tensor:
        """Packed [T, C] -> [S, D] of length 1."""
        check_packed("Pool", self.projection.shape[0], tokens=tokens)
        return F.normalize(self.pooled(tokens) @ self.projection, dim=-1)

    def pooled(self, tokens: Packed) -> Tensor:
        """Packed [T, C] -> [S, C], before the projection."""
        if self.mode == "mean":
            return segment_mean(tokens)
        if self.attention is not None:
            # The projection's bias would give an empty segment a feature; it has none in the other modes.
            return cast(Tensor, self.attention(tokens)) * (tokens.cu_seqlens.diff() > 0)[:, None]
        # Merging moves tokens: what stands first or last afterwards may be the mean of any others.
        if tokens.size is not None:
            raise ValueError(f"Pool: mode is {self.mode!r}, but these tokens have merged and none is the {self.mode} any more; use 'mean'")
        # An empty segment has no first or last token; its place would be a neighbour's.
        rows = (tokens.lengths > 0).nonzero().squeeze(1).to(tokens.x.device, non_blocking=True)
        place = tokens.cu_seqlens[1:] - 1 if self.mode == "last" else tokens.cu_seqlens[:-1]
        one = tokens.x.index_select(0, place.index_select(0, rows))
        return one if len(rows) == len(tokens) else one.new_zeros(len(tokens), one.shape[1]).index_copy(0, rows, one)
