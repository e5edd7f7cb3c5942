"""Learned compression: every picture becomes the same small number of tokens."""

import torch
from torch import Tensor, nn

from fastvlp_kernels import packed_attention
from fastvlp_kernels.packed import Packed, check_packed

_WIDEST = 128  # of a value in one pass of the kernel


class TokenLearner(nn.Module):
    """z_m = sum_t softmax_t(mlp(norm(x_t))_m) x_t (TokenLearner in its version 1.1, https://arxiv.org/abs/2106.11297).

    Of the tokens of pictures alone, or of pictures and texts in one segment (Piergiovanni and Angelova's joint adaptive representations).

    Args:
        dim: C. num_tokens: M, how many tokens each segment becomes. hidden: width of the MLP.
    """

    def __init__(self, dim: int, num_tokens: int = 8, hidden: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, num_tokens))

    def forward(self, packed: Packed) -> Tensor:
        """Packed [T, C] -> [S, M, C]; ``packed.size`` weighs the tokens, and an empty segment gives zeros."""
        check_packed("TokenLearner", self.norm.normalized_shape[0], packed=packed)
        x, segments = packed.x, len(packed)
        scores = self.mlp(self.norm(x))
        tokens = scores.shape[1]
        part = max(width for width in range(1, _WIDEST + 1) if x.shape[1] % width == 0)
        parts = x.shape[1] // part
        # One query of zeros per segment: the scores are the keys' bias, one head for each token and part of the width.
        out = packed_attention(
            x.new_zeros(segments, parts * tokens, 1), x.new_zeros(packed.total, parts, 1), x.unflatten(1, (parts, part)),
            torch.arange(segments + 1, dtype=torch.int32, device=x.device), packed.cu_seqlens, 1, packed.max_seqlen,
            key_size=packed.size, key_bias=scores.t().repeat(parts, 1), lengths=torch.ones(segments, dtype=torch.int64),
            lengths_k=packed.lengths,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out.unflatten(1, (parts, tokens)).transpose(1, 2).flatten(2)
