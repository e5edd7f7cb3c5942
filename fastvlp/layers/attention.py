"""Attention over packed tokens: of the tokens to one another, and of learned queries to the tokens of each segment."""

from typing import cast

import torch
from torch import Tensor, nn

from fastvlp_kernels import packed_attention
from fastvlp_kernels.packed import Packed, check_packed


class PackedAttention(nn.Module):
    """Multi-head self-attention inside each segment, proportional to the sizes of merged tokens.

    Its parameters are ``qkv`` and ``proj``, as in timm's Attention.

    Args:
        dim: C, a multiple of ``num_heads``. causal: a token sees those before it and itself.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True, proj_bias: bool = True, causal: bool = False) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"PackedAttention: dim {dim} with {num_heads} heads; the heads must divide the width")
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, packed: Packed) -> Packed:
        """Packed [T, C] -> the same segments, [T, C]; ``packed.size`` weighs the keys."""
        check_packed("PackedAttention", self.qkv.in_features, packed=packed)
        q, k, v = self.qkv(packed.x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        out = packed_attention(
            q, k, v, packed.cu_seqlens, max_seqlen_q=packed.max_seqlen, key_size=packed.size, causal=self.causal, lengths=packed.lengths
        )
        return packed.replace(x=self.proj(cast(Tensor, out).flatten(1)))


class AttentionPool(nn.Module):
    """Pool each segment by the attention of learned queries to its tokens (as in CoCa and SigLIP's head, without its MLP).

    Args:
        dim: C, a multiple of ``num_heads``. num_queries: how many rows each segment gives.
    """

    def __init__(self, dim: int, num_heads: int = 8, num_queries: int = 1) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"AttentionPool: dim {dim} with {num_heads} heads; the heads must divide the width")
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.randn(num_queries, dim) * dim**-0.5)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, packed: Packed) -> Tensor:
        """Packed [T, C] -> [S, C], or [S, Q, C] of several queries; ``packed.size`` weighs the tokens."""
        check_packed("AttentionPool", self.kv.in_features, packed=packed)
        segments, queries = len(packed), self.query.shape[0]
        # The queries are the same for all segments: they are projected once, and only the heads' views are repeated.
        q = self.q(self.query).unflatten(-1, (self.num_heads, -1)).expand(segments, -1, -1, -1).flatten(0, 1)
        k, v = self.kv(packed.x).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        starts = torch.arange(segments + 1, dtype=torch.int32, device=q.device) * queries
        out = packed_attention(
            q, k, v, starts, packed.cu_seqlens, queries, packed.max_seqlen, key_size=packed.size,
            lengths=torch.full((segments,), queries), lengths_k=packed.lengths,
        )  # fmt: skip
        pooled: Tensor = self.proj(cast(Tensor, out).flatten(1))
        return pooled if queries == 1 else pooled.unflatten(0, (segments, queries))
