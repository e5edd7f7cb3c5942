"""A pre-norm transformer block that does not know how its tokens are laid out."""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp.layers.activation import SquaredReLU
from fastvlp_kernels import packed_attention
from fastvlp_kernels.packed import Packed

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

ACTIVATIONS = {"gelu": nn.GELU, "relu2": SquaredReLU}


def packed_attend(packed: Packed, causal: bool) -> Attend:
    """Attention inside the segments of ``packed``, for q, k, v of shape [T, H, d]."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = packed_attention(q, k, v, packed.cu_seqlens, max_seqlen_q=packed.max_seqlen, causal=causal, lengths=packed.lengths)
        return cast(Tensor, out)

    return attend


def padded_attend(mask: Tensor, causal: bool) -> Attend:
    """Attention inside the rows of a padded batch, for q, k, v of shape [B, N, H, d]; ``mask`` [B, N] is True where a token is real."""
    keys = None if mask.all() else mask[:, None, None, :]
    if keys is not None and causal:
        n = mask.shape[1]
        keys = keys & mask.new_ones(n, n).tril()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys, is_causal=causal and keys is None).transpose(1, 2)

    return attend


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        width: C, a multiple of ``heads``.
        hidden: width of the feed-forward layer.
        depth: how many such blocks the tower has: residual outputs start smaller by sqrt(2 * depth), as in CLIP.
        activation: "gelu" or "relu2".
    """

    def __init__(self, width: int, heads: int, hidden: int, depth: int, activation: str) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]()
        residual = width**-0.5 * (2 * depth) ** -0.5
        for linear, std in ((self.qkv, width**-0.5), (self.proj, residual), (self.up, (2 * width) ** -0.5), (self.down, residual)):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """x [..., C] -> [..., C]; ``attend`` maps q, k, v [..., H, d] to [..., H, d]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        x = x + self.proj(attend(q, k, v).flatten(-2))
        return x + self.down(self.activation(self.up(self.norm2(x))))
