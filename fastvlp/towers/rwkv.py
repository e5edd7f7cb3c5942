"""RWKV-CLIP's towers: images and captions in linear time."""

from __future__ import annotations

from functools import partial

from torch import nn

from fastvlp.layers import RwkvBlock, neighbours, previous_and_next, shift
from fastvlp.layers.rwkv import Shift, packed_wkv
from fastvlp.towers import inputs
from fastvlp.towers.vit import Patches
from fastvlp_kernels.packed import Packed


class RwkvImage(Patches):
    """RWKV-CLIP's image tower (Gu et al. 2024, https://arxiv.org/abs/2406.06973): quarters of each head's channels come from the patches
    beside, above and below. A patch that was dropped counts as zeros there.

    Args:
        width, patch_size, image_size, grid, mean, std: as in ``Vit``. depth, heads: of the blocks.
        ratio: the channel mix is so many times as wide.
    """

    def __init__(self, width: int = 192, depth: int = 6, heads: int = 3, patch_size: int = 16, image_size: int = 64, grid: int = 32,
                 ratio: float = 4.0, mean: float = 0.5, std: float = 0.5) -> None:
        super().__init__(width, patch_size, image_size, grid, mean, std)
        self.blocks = _blocks("RwkvImage", width, depth, heads, ratio, parts=4, eps=1e-5)
        self.norm_out, self.heads = nn.LayerNorm(width), heads

    def forward(self, images: Packed) -> Packed:
        """Packed patches as for ``Vit`` -> the tokens after the last block, normalised: [T, C]."""
        tokens = self.embed(images)
        # Neighbours are found once for all blocks; a patch that was dropped is nobody's.
        look = partial(shift, index=neighbours(inputs.positions("RwkvImage", images, "pack_images"), images.cu_seqlens), heads=self.heads)
        return _through(self, tokens, look)


class RwkvText(nn.Module):
    """RWKV-CLIP's text tower: halves of each head's channels come from the token before and the one after, which is all that tokens know
    of their places.

    Args:
        width, vocab_size, context_length: as in ``Text``. depth, heads, ratio: as in :class:`RwkvImage`.
    """

    def __init__(self, width: int = 192, depth: int = 4, heads: int = 3, ratio: float = 3.5, vocab_size: int = 4096,
                 context_length: int = 24) -> None:
        super().__init__()
        self.width, self.vocab_size, self.context_length, self.heads = width, vocab_size, context_length, heads
        self.tokens, self.norm_in = nn.Embedding(vocab_size, width), nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = _blocks("RwkvText", width, depth, heads, ratio, parts=2, eps=64e-5)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, texts: Packed) -> Packed:
        """Packed token ids as for ``Text`` -> the tokens after the last block, normalised: [T, C]."""
        # Checked and not used: tokens know of places by the shift alone.
        inputs.places("RwkvText", texts, self.vocab_size, self.context_length)
        # Within captions: the shift never reads a token of another one.
        look = partial(shift, index=previous_and_next(texts.cu_seqlens, texts.total), heads=self.heads)
        return _through(self, texts.replace(x=self.norm_in(self.tokens(texts.x))), look)


def _blocks(name: str, width: int, depth: int, heads: int, ratio: float, parts: int, eps: float) -> nn.ModuleList:
    # The channels of each head are cut into as many parts as there are neighbours.
    if min(width, depth, heads) < 1 or ratio <= 0 or width % (parts * heads):
        raise ValueError(f"{name}: width {width}, depth {depth}, heads {heads}, ratio {ratio}; all must be positive, and the width a "
                         f"multiple of {parts} times the heads")
    return nn.ModuleList(RwkvBlock(width, heads, int(width * ratio), layer, depth, eps) for layer in range(depth))


def _through(tower: RwkvImage | RwkvText, tokens: Packed, look: Shift) -> Packed:
    # Made once, since segments are the same in all blocks.
    x, wkv = tokens.x, packed_wkv(tokens)
    for block in tower.blocks:
        x = block(x, look, wkv)
    return tokens.replace(x=tower.norm_out(x))
