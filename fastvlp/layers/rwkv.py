"""RWKV-CLIP's block: tokens mixed in linear time, then channels, each looking at shifted neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp_kernels import bi_wkv
from fastvlp_kernels.packed import Packed

Shift = Callable[[Tensor], Tensor]
Wkv = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

MIX, DECAY = 32, 64  # widths of the products that make mixtures and decays depend on the data


def packed_wkv(packed: Packed) -> Wkv:
    """:func:`fastvlp.ops.bi_wkv` inside the segments of ``packed``: r, k, v, w of shape [T, H, d], u [H, d] -> [T, H, d]."""

    def wkv(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return bi_wkv(r, k, v, w, u, packed.cu_seqlens, lengths=packed.lengths)

    return wkv


class SpatialMix(nn.Module):
    """output(norm(wkv(r, k, v, w)) * silu(g)): each of r, k, v, w and g reads its own mixture of a token with its shifted neighbours, which
    depends on the token; so does the decay w of each channel.

    Args:
        width: C. heads: of the wkv and of its normalisation. layer, depth: number of the block and how many there are, for the start.
        eps: of the normalisation of each head.
    """

    def __init__(self, width: int, heads: int, layer: int, depth: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        # The start is RWKV-6's: deeper blocks look more at neighbours, and channels forget at rates from slow to fast, so that some carry
        # long context and some short from the first step on.
        rise, fall = layer / max(1, depth - 1), 1 - layer / depth
        place, last = torch.arange(width) / width, torch.arange(width) / max(1, width - 1)
        slow, fast = place**fall, place ** (fall / 2)
        self.mix = nn.Parameter(1 - torch.stack([slow, slow, slow, slow + 0.3 * rise, fast, fast]))  # of all, then of w, k, v, r, g
        self.mix_in = nn.Parameter(torch.zeros(width, 5 * MIX))
        self.mix_out = nn.Parameter(torch.empty(5, MIX, width).uniform_(-0.01, 0.01))
        self.decay = nn.Parameter(5 * last ** (0.7 + 1.3 * rise) - 6)
        self.decay_in = nn.Parameter(torch.zeros(width, DECAY))
        self.decay_out = nn.Parameter(torch.empty(DECAY, width).uniform_(-0.01, 0.01))
        # Breaks the symmetry between channels of a head that would otherwise start alike.
        zigzag = 0.1 * ((torch.arange(width) + 1) % 3 - 1)
        self.own = nn.Parameter((rise * (1 - last) + zigzag).unflatten(0, (heads, -1)))
        self.receptance, self.key, self.value, self.gate, self.output = (_linear(width, width) for _ in range(5))
        nn.init.normal_(self.output.weight, std=(2 * depth * width) ** -0.5)
        self.norm = nn.GroupNorm(heads, width, eps)

    def forward(self, x: Tensor, shift: Shift, wkv: Wkv) -> Tensor:
        """[T, C] -> [T, C]."""
        toward = shift(x) - x
        # Thin matrices make the mixtures depend on the token: five full ones would cost as much as the block itself.
        low = torch.tanh((x + toward * self.mix[0]) @ self.mix_in).unflatten(1, (5, -1))
        w, k, v, r, g = x + toward * (self.mix[1:, None] + torch.einsum("tnm,nmc->ntc", low, self.mix_out))
        decay = self.decay + torch.tanh(w @ self.decay_in) @ self.decay_out
        r, k, v, decay = (y.unflatten(1, (self.heads, -1)) for y in (self.receptance(r), self.key(k), self.value(v), decay))
        return self.output(self.norm(wkv(r, k, v, decay, self.own).flatten(1)) * F.silu(self.gate(g)))


class ChannelMix(nn.Module):
    """sigmoid(receptance(r)) * value(relu(key(k))^2), where k and r are mixtures of a token with its shifted neighbours.

    Args:
        width, layer, depth: as in :class:`SpatialMix`. hidden: width of the keys.
    """

    def __init__(self, width: int, hidden: int, layer: int, depth: int) -> None:
        super().__init__()
        slow = (torch.arange(width) / width) ** (1 - layer / depth)
        self.mix = nn.Parameter(1 - torch.stack([slow, slow]))
        self.key, self.receptance, self.value = _linear(width, hidden), _linear(width, width), _linear(hidden, width)
        nn.init.normal_(self.value.weight, std=(2 * depth * width) ** -0.5)

    def forward(self, x: Tensor, shift: Shift) -> Tensor:
        """[T, C] -> [T, C]."""
        k, r = x + (shift(x) - x) * self.mix[:, None]
        return torch.sigmoid(self.receptance(r)) * self.value(F.relu(self.key(k)).square())


class RwkvBlock(nn.Module):
    """x + spatial(norm(x)), then x + channel(norm(x)) (RWKV-CLIP, Gu et al. 2024, https://arxiv.org/abs/2406.06973).

    It does not know how tokens are laid out. Mixtures, decays and ``own`` start as in the authors' code, linear layers as those of
    ``Block``.

    Args:
        width: C, a multiple of ``heads``. hidden: width of the channel mix. layer, depth, eps: as in :class:`SpatialMix`.
    """

    def __init__(self, width: int, heads: int, hidden: int, layer: int, depth: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.spatial, self.channel = SpatialMix(width, heads, layer, depth, eps), ChannelMix(width, hidden, layer, depth)

    def forward(self, x: Tensor, shift: Shift, wkv: Wkv) -> Tensor:
        """x [T, C] -> [T, C]; ``shift`` maps [T, C] to [T, C], ``wkv`` r, k, v, w [T, H, d] and u [H, d] to [T, H, d]."""
        x = x + self.spatial(self.norm1(x), shift, wkv)
        return x + self.channel(self.norm2(x), shift)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=inputs**-0.5)
    return linear
