"""Tokens gathered around learned centres, each token by one of them."""

from typing import cast

import torch
from torch import Tensor, nn

from fastvlp_kernels import packed_attention
from fastvlp_kernels.packed import Packed, check_packed


class _Look(nn.Module):
    """Centres attend to themselves and to the tokens of their segment."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q, self.norm_kv, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, centres: Packed, tokens: Packed) -> Packed:
        # Centres and tokens of a segment have to lie together: a stable sort by segment keeps the centres in front.
        owner = [torch.arange(len(p), device=p.x.device).repeat_interleave(p.cu_seqlens.diff(), output_size=p.total)
                 for p in (centres, tokens)]  # fmt: skip
        both = Packed(
            torch.cat((centres.x, tokens.x))[torch.cat(owner).argsort(stable=True)], centres.cu_seqlens + tokens.cu_seqlens,
            centres.lengths + tokens.lengths, centres.total + tokens.total, centres.max_seqlen + tokens.max_seqlen,
        )  # fmt: skip
        q = self.q(self.norm_q(centres.x)).unflatten(-1, (self.num_heads, -1))
        k, v = self.kv(self.norm_kv(both.x)).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        out = packed_attention(
            q, k, v, centres.cu_seqlens, both.cu_seqlens, centres.max_seqlen, both.max_seqlen, lengths=centres.lengths,
            lengths_k=both.lengths,
        )  # fmt: skip
        x = centres.x + self.proj(cast(Tensor, out).flatten(1))
        return centres.replace(x=x + self.mlp(self.norm_mlp(x)))


class LearnedCentres(nn.Module):
    """Group the tokens of each segment around learned centres (SegCLIP's semantic group module, https://arxiv.org/abs/2211.14813).

    The centres look at the tokens; each token goes to the centre of highest q'k (in training with Gumbel noise, the gradient straight
    through the softmax over centres); a centre becomes mlp(q + mean of its tokens' values). k and v are full linear maps here.

    Args:
        dim: C, a multiple of ``num_heads``. num_centres: M. depth: how many times the centres look. temperature: of the noisy softmax.
    """

    def __init__(self, dim: int, num_centres: int = 8, num_heads: int = 8, depth: int = 2, temperature: float = 0.9) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"LearnedCentres: dim {dim} with {num_heads} heads; the heads must divide the width")
        self.temperature = temperature
        self.centres = nn.Parameter(torch.randn(num_centres, dim) * 0.02)
        self.looks = nn.ModuleList(_Look(dim, num_heads) for _ in range(depth))
        self.norm, self.norm_q, self.norm_k, self.norm_out = (nn.LayerNorm(dim) for _ in range(4))
        self.k, self.v = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.GELU())

    def forward(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """Packed [T, C] -> the centres [S, M, C], and int64 [T]: the centre that each token went to.

        ``packed.size`` weighs the means. A centre without tokens, and every centre of an empty segment, has a mean of 0.
        """
        check_packed("LearnedCentres", self.v.in_features, packed=packed)
        number = self.centres.shape[0]
        centres = Packed.of(self.centres.repeat(len(packed), 1), [number] * len(packed))
        for look in self.looks:
            centres = look(centres, packed)
        q = self.norm_q(centres.x).unflatten(0, (len(packed), number))
        normed = self.norm(packed.x)
        k, real = packed.replace(x=self.norm_k(self.k(normed))).to_padded()
        logits = k @ q.transpose(1, 2)
        if self.training:
            # Minus the logarithm of an exponential number is a Gumbel number, and argmax of logits + Gumbel a draw from their softmax.
            noise = -torch.empty_like(logits).exponential_().log()
            logits = (logits + noise) / self.temperature
        soft = logits.softmax(-1)
        which = soft.argmax(-1)
        # Forward it is one-hot, backward the softmax's gradient: straight through.
        share = nn.functional.one_hot(which, number).to(soft.dtype) - soft.detach() + soft
        weight = share * real[..., None].to(share.dtype)
        if packed.size is not None:
            weight = weight * packed.replace(x=packed.size).to_padded()[0][..., None].to(share.dtype)
        v, _ = packed.replace(x=self.v(normed)).to_padded()
        mean = weight.transpose(1, 2) @ v / weight.sum(1).clamp_min(1)[..., None]
        return self.mlp(self.norm_out(q + mean)), Packed.from_padded(which, packed.lengths).x
