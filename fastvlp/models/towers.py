"""The two towers. Each takes its tokens packed, or padded through ``fastvlp.models.padded``, with the same weights."""

import torch
from torch import Tensor, nn

from fastvlp.layers import Block, packed_blocks, segment_mean
from fastvlp.models.config import ImageConfig, TextConfig
from fastvlp_kernels.packed import Packed


class ImageTower(nn.Module):
    """A ViT over ragged images at their own aspect ratio (NaViT, Dehghani et al. 2023): factorised positions, mean pooling."""

    def __init__(self, config: ImageConfig, embed_dim: int) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.patch = nn.Linear(3 * config.patch_size**2, width)
        self.rows = nn.Parameter(torch.randn(config.grid, width) * width**-0.5)
        self.columns = nn.Parameter(torch.randn(config.grid, width) * width**-0.5)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.hidden, config.depth, config.activation) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width)
        self.projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)

    def embed(self, patches: Tensor, pos: Tensor) -> Tensor:
        """uint8 or float [..., P*P*3] pixels in 0..255 and positions [..., 3] -> tokens [..., C]."""
        mean, std = 255 * self.config.mean, 255 * self.config.std
        pixels = patches.to(self.patch.weight.dtype).sub_(mean).mul_(1 / std) if patches.dtype == torch.uint8 else (patches - mean) / std
        place = pos.long()
        return self.norm_in(self.patch(pixels) + self.rows[place[..., 1]] + self.columns[place[..., 2]])

    def forward(self, images: Packed) -> Tensor:
        """Packed patches [T, P*P*3] -> features [S, embed_dim], not normalised."""
        if images.pos is None:
            raise ValueError("ImageTower: the packed patches carry no positions; make them with fastvlp.data.pack_images")
        tokens = images.replace(x=self.embed(images.x, images.pos))
        tokens = packed_blocks(self.blocks, tokens, causal=False, merge=self.config.merged)
        return segment_mean(tokens.replace(x=self.norm_out(tokens.x))) @ self.projection


class TextTower(nn.Module):
    """A transformer over packed captions; tokens are normalised on entry, so that they are not small beside what the blocks add."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.tokens = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.places = nn.Parameter(torch.randn(config.context_length, width) * 0.01)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.hidden, config.depth, config.activation) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width)
        self.projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)

    def embed(self, tokens: Tensor, place: Tensor) -> Tensor:
        """Token ids [...] and their places in the caption [...] -> tokens [..., C]."""
        return self.norm_in(self.tokens(tokens) + self.places[place])

    def forward(self, texts: Packed) -> Tensor:
        """Packed token ids [T] -> features [S, embed_dim], not normalised."""
        if texts.pos is None:
            raise ValueError("TextTower: the packed captions carry no positions; make them with fastvlp.data.pack_texts")
        tokens = texts.replace(x=self.embed(texts.x, texts.pos[:, 0].long()))
        tokens = packed_blocks(self.blocks, tokens, self.config.causal, self.config.merged)
        tokens = tokens.replace(x=self.norm_out(tokens.x))
        pooled = segment_mean(tokens) if self.config.pool == "mean" else tokens.x[tokens.cu_seqlens[1:].long() - 1]
        return pooled @ self.projection
