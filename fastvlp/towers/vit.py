"""The image tower, and the embedding of patches that it shares with others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvlp.layers import packed_blocks, transformer_blocks
from fastvlp.towers import inputs
from fastvlp_kernels.packed import Packed, check_packed


class Patches(nn.Module):
    """Patches of ragged images at their own aspect ratio, and their factorised places -> tokens [T, C], normalised on entry, so that they
    are not small beside what blocks add (NaViT, https://arxiv.org/abs/2307.06304).

    Args:
        width: C. patch_size: P, in pixels. grid: at most so many patches in a row or column.
        image_size: the longest side, in pixels, of pictures that are scaled for this tower, to whole patches.
        mean, std: pixels become (x / 255 - mean) / std.
    """

    def __init__(self, width: int, patch_size: int, image_size: int, grid: int, mean: float, std: float) -> None:
        super().__init__()
        name = type(self).__name__
        if min(width, patch_size, grid) < 1 or std <= 0:
            raise ValueError(f"{name}: width {width}, patch_size {patch_size}, grid {grid} and std {std} must be positive")
        if not 1 <= image_size <= grid * patch_size:
            raise ValueError(f"{name}: image_size is {image_size}; with patches of {patch_size} and a grid of {grid} it lies between 1 and "
                             f"{grid * patch_size}")
        self.width, self.patch_size, self.image_size, self.grid, self.mean, self.std = width, patch_size, image_size, grid, mean, std
        self.patch = nn.Linear(3 * patch_size**2, width)
        # One table for rows and one for columns: any shape of picture has places, also shapes that training never saw.
        self.rows = nn.Parameter(torch.randn(grid, width) * width**-0.5)
        self.columns = nn.Parameter(torch.randn(grid, width) * width**-0.5)
        self.norm_in = nn.LayerNorm(width)

    def places(self, pos: Tensor) -> Tensor:
        """pos int32 [T, 3] = (frame, row, column) -> what tokens there are told of their place: [T, C]."""
        place = pos[:, 1:].long()
        inputs.inside(type(self).__name__, "rows and columns of patches", place, self.grid)
        return self.rows[place[:, 0]] + self.columns[place[:, 1]]

    def embed(self, images: Packed) -> Packed:
        """Packed patches [T, P*P*3], uint8 or floating point in 0..255, with ``pos`` -> the tokens before the first block, [T, C].

        Raises:
            TypeError, ValueError: these are no packed patches of this size, or carry no positions, or have some outside the grid.
        """
        name = type(self).__name__
        check_packed(name, self.patch.in_features, images=images)
        pos = inputs.positions(name, images, "pack_images")
        mean, std = 255 * self.mean, 255 * self.std
        # In the dtype of the weights, since uint8 cannot hold what is subtracted.
        pixels = images.x.to(self.patch.weight.dtype)
        # A uint8 batch was just converted, so that its copy may be changed in place; the caller's floats may not.
        pixels = pixels.sub_(mean).mul_(1 / std) if images.x.dtype == torch.uint8 else (pixels - mean) / std
        return images.replace(x=self.norm_in(self.patch(pixels) + self.places(pos)))


class Vit(Patches):
    """A ViT over patches.

    Args:
        width, patch_size, image_size, grid, mean, std: as in :class:`Patches`.
        depth, heads: of the blocks; feed-forward layers are ``mlp_ratio`` times as wide. activation: "relu2" or "gelu".
        merge: the share of each image's tokens that merges away in each block (ToMe), in training and after it: one for all blocks, or one
            for each; at most half can merge in one block, and a share is rounded down.
    """

    def __init__(
        self,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        patch_size: int = 16,
        image_size: int = 64,
        grid: int = 32,
        mlp_ratio: float = 4.0,
        activation: str = "relu2",
        merge: float | Sequence[float] = (),
        mean: float = 0.5,
        std: float = 0.5,
    ) -> None:
        super().__init__(width, patch_size, image_size, grid, mean, std)
        self.merge = inputs.merge_shares("Vit", merge, depth)
        self.blocks = transformer_blocks("Vit", width, depth, heads, mlp_ratio, activation)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, images: Packed) -> Packed:
        """As in :meth:`embed` -> the tokens after the last block, normalised: [T', C], fewer and with ``size`` where they merge."""
        tokens = packed_blocks(self.blocks, self.embed(images), causal=False, merge=self.merge)
        return tokens.replace(x=self.norm_out(tokens.x))
