"""A pre-norm transformer block that does not know how its tokens are laid out."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp_kernels import bias_activation, merge_plan, packed_attention, residual_norm
from fastvlp_kernels.packed import Packed

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class SquaredReLU(nn.Module):
    """max(x, 0)^2 (So et al., Primer, 2021); any shape [..., C], any floating-point dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return bias_activation(x, activation="relu2")


# On a CPU a product adds its bias for nothing, and the Python around an operator costs more than the pass over a small batch that it saves.
FUSED_ON = ("cuda",)
ACTIVATIONS = {"gelu": nn.GELU, "relu2": SquaredReLU}


def packed_attend(packed: Packed, causal: bool, prefix: Tensor | None = None) -> Attend:
    """Attention inside the segments of ``packed``, for q, k, v of shape [T, H, d]; ``packed.size`` weighs the keys.

    ``prefix``: integers [S], where ``causal``: so many first tokens of each segment are seen by all of it (prefix-LM).
    """
    if prefix is not None:
        prefix = prefix.to(packed.x.device, torch.int32, non_blocking=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = packed_attention(
            q, k, v, packed.cu_seqlens, max_seqlen_q=packed.max_seqlen, key_size=packed.size, causal=causal, prefix_len=prefix,
            lengths=packed.lengths,
        )  # fmt: skip
        return cast(Tensor, out)

    return attend


def padded_attend(mask: Tensor, causal: bool) -> Attend:
    """Attention inside the rows of a padded batch, for q, k, v of shape [B, N, H, d]; ``mask`` [B, N] is True where a token is real."""
    # Without a mask, scaled_dot_product_attention may take its fast kernels.
    keys = None if mask.all() else mask[:, None, None, :]
    if keys is not None and causal:
        n = mask.shape[1]
        keys = keys & mask.new_ones(n, n).tril()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys, is_causal=causal and keys is None).transpose(1, 2)

    return attend


def bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` is what a layer of ``kind`` computes and nothing else, so that its weights may be used without a call.

    Who counts, watches or adapts layers hooks or replaces them, and then they are called.
    """
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return type(module) is kind and not any(hooks)


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
        # 2 * depth layers add to the residual stream; so its variance at the end does not depend on the depth.
        residual = width**-0.5 * (2 * depth) ** -0.5
        for linear, std in ((self.qkv, width**-0.5), (self.proj, residual), (self.up, (2 * width) ** -0.5), (self.down, residual)):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, attend: Attend, between: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """x [..., C] -> [..., C]; ``attend`` maps q, k, v [..., H, d] to [..., H, d].

        ``between``: what happens to x [..., C] after attention and before the MLP: merging, or a decoder's look at the image.
        """
        attended = self.proj(attend(*self._qkv(x)).flatten(-2))
        if between is None and x.device.type in FUSED_ON and bare(self.norm2, nn.LayerNorm):
            normed, x = residual_norm(x, attended, self.norm2.weight, self.norm2.bias, eps=self.norm2.eps)
        else:
            x = x + attended if between is None else between(x + attended)
            normed = self.norm2(x)
        return x + self.down(self._hidden(normed))

    def _hidden(self, x: Tensor) -> Tensor:
        """activation(up(x)), the bias and the activation in one pass."""
        kind = next((name for name, kind in ACTIVATIONS.items() if bare(self.activation, kind)), "")
        exact = getattr(self.activation, "approximate", "none") == "none"
        if not (kind and exact and x.device.type in FUSED_ON and bare(self.up, nn.Linear)):
            hidden: Tensor = self.activation(self.up(x))
            return hidden
        return bias_activation(F.linear(x, self.up.weight), self.up.bias, kind)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [..., C] -> what its attention compares and mixes, three times [..., H, d]."""
        return self._qkv(x)  # forward asks the other, since FSDP gathers and frees weights around each public call

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)


def transformer_blocks(name: str, width: int, depth: int, heads: int, mlp_ratio: float, activation: str) -> nn.ModuleList:
    """``depth`` blocks of the module ``name``; feed-forward layers are ``mlp_ratio`` times as wide.

    Raises:
        ValueError: a size is not positive, the heads do not divide the width, or the activation is unknown.
    """
    if min(width, depth, heads) < 1 or mlp_ratio <= 0:
        raise ValueError(f"{name}: width {width}, depth {depth}, heads {heads}, mlp_ratio {mlp_ratio}; all must be positive")
    if width % heads:
        raise ValueError(f"{name}: width is {width} and heads is {heads}; the width must be a multiple of the heads")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation is {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    return nn.ModuleList(Block(width, heads, int(width * mlp_ratio), depth, activation) for _ in range(depth))


def packed_blocks(blocks: Iterable[nn.Module], packed: Packed, causal: bool, merge: Sequence[float]) -> Packed:
    """Tokens [T, C] through every block; in block i each segment loses the share ``merge[i]`` of its tokens, rounded down.

    They merge between attention and MLP, matched by their keys, averaged over the heads (ToMe, https://arxiv.org/abs/2210.09461).
    """
    for block, share in zip(blocks, merge, strict=True):
        if share:
            packed = _merging(block, packed, share)
        else:
            packed = packed.replace(x=block(packed.x, packed_attend(packed, causal)))
    return packed


def _merging(block: nn.Module, packed: Packed, share: float) -> Packed:
    """Through ``block.forward``, which is what FSDP, checkpointing and compilation wrap."""
    inside, keys, merged = packed_attend(packed, causal=False), packed.x, packed

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The metric of ToMe is what attention computed anyway; detached, since matching has no gradient.
        nonlocal keys
        keys = k.detach().mean(1)
        return inside(q, k, v)

    def merge(x: Tensor) -> Tensor:
        nonlocal merged
        merged = merge_plan(keys, packed.cu_seqlens, share, lengths=packed.lengths).apply(packed.replace(x=x))
        return merged.x

    x = block(packed.x, attend, merge)
    return merged.replace(x=x)
