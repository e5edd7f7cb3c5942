"""A pre-norm transformer block that does not know how its tokens are laid out."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp.layers.activation import SquaredReLU
from fastvlp_kernels import merge_plan, packed_attention
from fastvlp_kernels.packed import Packed

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

ACTIVATIONS = {"gelu": nn.GELU, "relu2": SquaredReLU}


def packed_attend(packed: Packed, causal: bool) -> Attend:
    """Attention inside the segments of ``packed``, for q, k, v of shape [T, H, d]; ``packed.size`` weighs the keys."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = packed_attention(
            q, k, v, packed.cu_seqlens, max_seqlen_q=packed.max_seqlen, key_size=packed.size, causal=causal, lengths=packed.lengths
        )
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
        return self._mlp(self._attention(x, attend)[0])

    def merging(self, packed: Packed, share: float) -> Packed:
        """``forward`` over the segments of ``packed`` [T, C], which lose a share of their tokens between attention and MLP.

        Tokens are matched by their keys, averaged over the heads (ToMe, https://arxiv.org/abs/2210.09461); a share is rounded down.
        """
        x, keys = self._attention(packed.x, packed_attend(packed, causal=False))
        plan = merge_plan(keys.detach().mean(1), packed.cu_seqlens, share, lengths=packed.lengths)
        packed = plan.apply(packed.replace(x=x))
        return packed.replace(x=self._mlp(packed.x))

    def _attention(self, x: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """x + attention(norm(x)) [..., C], and the keys [..., H, d]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return x + self.proj(attend(q, k, v).flatten(-2)), k

    def _mlp(self, x: Tensor) -> Tensor:
        return x + self.down(self.activation(self.up(self.norm2(x))))


def packed_blocks(blocks: Iterable[nn.Module], packed: Packed, causal: bool, merge: Sequence[float]) -> Packed:
    """Tokens [T, C] through every block; in block i each segment loses the share ``merge[i]`` of its tokens."""
    for block, share in zip(blocks, merge, strict=True):
        block = cast(Block, block)
        packed = block.merging(packed, share) if share else packed.replace(x=block(packed.x, packed_attend(packed, causal)))
    return packed
