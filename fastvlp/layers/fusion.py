"""Fusion in the backbone: the last blocks of two towers, in which each reads the other's tokens, or does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvlp.layers.cross_attention import CrossAttention
from fastvlp.layers.transformer import packed_attend, packed_blocks
from fastvlp_kernels.packed import Packed


class GatedReading(nn.Module):
    """g * attention(norm(x), y) with a learned g that starts at 0, so that the towers start as they were.

    Args:
        width, heads, source, depth: as in :class:`CrossAttention`.
    """

    def __init__(self, width: int, heads: int, source: int, depth: int) -> None:
        super().__init__()
        self.cross = CrossAttention(width, heads, source, depth)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Packed, y: Packed) -> Tensor:
        """Packed [T, C] and [T', source] of as many segments -> [T, C], what is added to x."""
        return self.gate * self.cross.read(x, y)


class FusedBlocks(nn.Module):
    """Pairs of blocks, one of each tower: s = attention(norm(x)), then x + s + g * attention(norm(s), y), then the MLP (FIBER,
    https://arxiv.org/abs/2206.07643; github.com/microsoft/FIBER). y are the other tower's tokens before its block.

    The blocks stay the towers' own, so that the same weights also run without fusion.

    Args:
        image_width, text_width, heads: of the two towers. depth: how many pairs, the last blocks of each.
    """

    def __init__(self, image_width: int, text_width: int, heads: int, depth: int) -> None:
        super().__init__()
        # What a head on the fused pair gets: both sides' means, side by side.
        self.width = image_width + text_width
        self.image_reads = nn.ModuleList(GatedReading(image_width, heads, text_width, depth) for _ in range(depth))
        self.text_reads = nn.ModuleList(GatedReading(text_width, heads, image_width, depth) for _ in range(depth))

    def forward(self, patches: Packed, words: Packed, image_blocks: Sequence[nn.Module],
                text_blocks: Sequence[nn.Module]) -> tuple[Packed, Packed]:
        """Tokens [T, image_width] and [T', text_width] of as many segments, and ``depth`` blocks of each tower -> both behind them."""
        for image, text, of_image, of_text in zip(image_blocks, text_blocks, self.image_reads, self.text_reads, strict=True):
            patches, words = _fused(image, of_image, patches, words), _fused(text, of_text, words, patches)
        return patches, words

    def below(self, tower: Any, tokens: Packed) -> Packed:
        """A tower's input -> its tokens before the blocks that can read: the same with and without fusion."""
        depth = len(self.image_reads)
        return packed_blocks(tower.blocks[:-depth], tower.embed(tokens).replace(pos=None), False, tower.merge[:-depth])

    def alone(self, tower: Any, tokens: Packed) -> Packed:
        """What :meth:`below` gave -> the tower's tokens, normalised, when it reads nothing."""
        depth = len(self.image_reads)
        tokens = packed_blocks(tower.blocks[-depth:], tokens, False, tower.merge[-depth:])
        return tokens.replace(x=tower.norm_out(tokens.x))

    def together(self, image: Any, text: Any, patches: Packed, words: Packed) -> tuple[Packed, Packed]:
        """What :meth:`below` gave for both towers -> the tokens of both, normalised, when each reads the other."""
        depth = len(self.image_reads)
        patches, words = self(patches, words, image.blocks[-depth:], text.blocks[-depth:])
        return patches.replace(x=image.norm_out(patches.x)), words.replace(x=text.norm_out(words.x))


def _fused(block: nn.Module, reading: nn.Module, x: Packed, y: Packed) -> Packed:
    def look(summed: Tensor) -> Tensor:
        own = x.replace(x=summed - x.x)  # what the block's own attention added
        read: Tensor = reading(own, y)
        return summed + read

    return x.replace(x=block(x.x, packed_attend(x, causal=False), look))
