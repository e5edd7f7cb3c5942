"""Attention of one batch's tokens to another's, segment by segment: words that look at their image, or patches at their caption."""

from typing import cast

import torch
from torch import Tensor, nn

from fastvlp_kernels import packed_attention
from fastvlp_kernels.packed import Packed, check_packed


class CrossAttention(nn.Module):
    """x + gate * attention(norm(x), y): each token of segment i of x reads the tokens of segment i of y.

    Args:
        width: C, of x, a multiple of ``heads``. source: of y; None: C.
        depth: how many such layers the tower has: residual outputs start smaller by sqrt(2 * depth), as in ``Block``.
        gated: gate = tanh(g) with a learned g that starts at 0, so that the layer starts as the identity (Flamingo, arXiv:2204.14198;
            FIBER's is ``fastvlp.layers.FusedBlocks``). Else gate = 1.
    """

    def __init__(self, width: int, heads: int, source: int | None = None, depth: int = 1, gated: bool = False) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"CrossAttention: width {width} with {heads} heads; the heads must divide the width")
        source = width if source is None else source
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(source, 2 * width), nn.Linear(width, width)
        self.gate = nn.Parameter(torch.zeros(1)) if gated else None
        # As in Block: what is added to the residual stream starts smaller, the deeper the tower is.
        for linear, std in ((self.q, width**-0.5), (self.kv, source**-0.5), (self.proj, width**-0.5 * (2 * depth) ** -0.5)):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Packed, y: Packed) -> Packed:
        """Packed [T, C] and [T', source] of as many segments -> the segments of x. ``y.size`` weighs what is read."""
        added = self.read(x, y)
        return x.replace(x=x.x + (added if self.gate is None else self.gate.tanh() * added))

    def read(self, x: Packed, y: Packed) -> Tensor:
        """What is added to x, before the gate: [T, C]."""
        check_packed("CrossAttention", self.q.in_features, x=x)
        check_packed("CrossAttention", self.kv.in_features, y=y)
        if len(x) != len(y):
            raise ValueError(f"CrossAttention: x has {len(x)} segments and y {len(y)}; as many are needed (Packed.repeat makes copies)")
        q = self.q(self.norm(x.x)).unflatten(-1, (self.heads, -1))
        k, v = self.kv(y.x).unflatten(-1, (2, self.heads, -1)).unbind(1)
        read = packed_attention(
            q, k, v, x.cu_seqlens, y.cu_seqlens, x.max_seqlen, y.max_seqlen, key_size=y.size, lengths=x.lengths, lengths_k=y.lengths
        )
        return cast(Tensor, self.proj(cast(Tensor, read).flatten(1)))
