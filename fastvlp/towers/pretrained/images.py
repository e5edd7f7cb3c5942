"""Others' image models with our contract: packed patches in, packed tokens out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp.towers import inputs
from fastvlp.towers.pretrained.segments import Segments
from fastvlp_kernels.packed import Packed, check_packed

Numbers = float | Sequence[float]


class ImageModel(nn.Module):
    """What packed and padded models share.

    Attributes:
        model: the other library's. width: C. patch_size, image_size: in pixels. grid: patches in a row or column.
        mean, std: three numbers each; pixels become (x / 255 - mean) / std. fixed: no picture has more patches in a row or column.
    """

    fixed = True
    shift: Tensor
    factor: Tensor

    def __init__(self, model: nn.Module, width: int, patch_size: int, image_size: int, mean: Numbers, std: Numbers) -> None:
        super().__init__()
        self.model: Any = model
        self.width, self.patch_size, self.image_size, self.grid = width, patch_size, image_size, image_size // patch_size
        # Patches are raw pixels in 0..255; the model's mean and deviation in 0..1 are folded into one subtraction and one product.
        shift, scale = (255 * torch.as_tensor(numbers, dtype=torch.float64).expand(3) for numbers in (mean, std))
        self.mean, self.std = ((numbers / 255).tolist() for numbers in (shift, scale))
        like = next(model.parameters())
        # Not persistent: they follow from the arguments, and the state stays the other library's.
        self.register_buffer("shift", shift.repeat(patch_size**2).to(like), persistent=False)
        self.register_buffer("factor", scale.reciprocal().repeat(patch_size**2).to(like), persistent=False)

    def pixels(self, images: Packed) -> Tensor:
        """Normalised pixels [T, P*P*3] of the dtype of the model, after a check of what came."""
        name = type(self.model).__name__
        check_packed(name, 3 * self.patch_size**2, images=images)
        pos = inputs.positions(name, images, "pack_images")
        if self.fixed:
            inputs.inside(name, "rows and columns of patches", pos[:, 1:], self.grid)
        return (images.x.to(self.factor.dtype) - self.shift) * self.factor


class PackedImages(ImageModel):
    """A ViT over packed tokens: ragged images and dropped patches cost what they have. Subclasses know where its parts are."""

    def forward(self, images: Packed) -> Packed:
        """Packed patches [T, P*P*3], uint8 or floating point in 0..255, with ``pos`` -> tokens [T', C] after the last norm.

        Class and register tokens come first in each segment, with pos (index, -1, -1).
        """
        return self.run(images.replace(x=self.embed(images), size=None), self.prefix().expand(len(images), -1, -1))

    def run(self, patches: Packed, prefix: Tensor) -> Packed:
        """Embedded patches [T, C] and what comes in front of each segment, [S, n, C], through the blocks."""
        tokens = with_prefix(patches, prefix)
        # Others' blocks may fail on no tokens at all.
        if not tokens.total:
            return tokens
        x = self.blocks(self.before(tokens.x)[None], Segments.of(tokens))
        return tokens.replace(x=self.after(x[0]))

    def embed(self, images: Packed) -> Tensor:
        """Patches with what they are told of their place: [T, C]."""
        raise NotImplementedError

    def prefix(self) -> Tensor:
        """Class and register tokens with their places: [n, C]."""
        raise NotImplementedError

    def before(self, x: Tensor) -> Tensor:
        """[T, C] before the blocks -> [T, C]."""
        return x

    def blocks(self, x: Tensor, segments: Segments) -> Tensor:
        """All blocks: [1, T, C] -> [1, T, C]."""
        raise NotImplementedError

    def after(self, x: Tensor) -> Tensor:
        """The last norm: [T, C] -> [T, C]."""
        raise NotImplementedError

    def at(self, images: Packed, table: Tensor) -> Tensor:
        """Rows of a table of places [G * G, C] for all patches: [T, C]."""
        assert images.pos is not None
        place = images.pos.long()
        return table[place[:, 1] * self.grid + place[:, 2]]


class PaddedImages(ImageModel):
    """A model that needs whole pictures of one size, such as a ConvNeXt, and gives feature maps or tokens.

    A picture that is not a full square of ``image_size`` lies in the upper left of one of mean colour, and dropped patches are of mean
    colour. Tokens come back of the patches that were given, and of class and register tokens. A token stands for a patch, so that the
    patch size follows from the number of tokens, which one picture through the model says.

    Args:
        model: pictures [B, 3, h, w] -> [B, C, h', w'], or [B, n + h' * w', C] with n tokens in front, fewer than 2 h' + 1.
        method: of the model, that does so. last: whether the maps are [B, h', w', C].
    """

    def __init__(self, model: nn.Module, image_size: int, mean: Numbers, std: Numbers, method: str = "forward", last: bool = False) -> None:
        training, like = model.training, next(model.parameters())
        # A blank picture says width, grid and class tokens of any model, whatever its configuration calls them.
        with torch.no_grad():
            picture = torch.zeros(1, 3, image_size, image_size, device=like.device, dtype=like.dtype)
            tokens = _tokens(getattr(model.eval(), method)(picture), last)
        # As it was: a frozen model must stay in evaluation mode.
        model.train(training)
        # Fewer than 2 h + 1 tokens in front leave the whole part of the root at h.
        grid = math.isqrt(tokens.shape[1])
        if image_size % grid:
            raise ValueError(f"{type(model).__name__} makes {tokens.shape[1]} tokens of a picture of {image_size} pixels, {grid} in a row; "
                             "choose an image_size that this divides")
        super().__init__(model, tokens.shape[2], image_size // grid, image_size, mean, std)
        self.method, self.last, self.leading = method, last, tokens.shape[1] - grid * grid

    def forward(self, images: Packed) -> Packed:
        """As ``PackedImages.forward``; with ``pos`` as there."""
        pixels, count, g, p = self.pixels(images), len(images), self.grid, self.patch_size
        if not count:
            return images.replace(x=pixels.new_zeros(0, self.width))
        assert images.pos is not None
        counts = images.lengths.to(pixels.device, non_blocking=True)
        owner = torch.arange(count, device=pixels.device).repeat_interleave(counts, output_size=images.total)
        # Patches go to their places on a blank canvas: dropped ones stay at the mean, and what came of them is not read back.
        place = (owner * g + images.pos[:, 1]) * g + images.pos[:, 2]
        canvas = pixels.new_zeros(count * g * g, pixels.shape[1]).index_copy(0, place, pixels)
        # [picture, row, column, y, x, channel] to [picture, channel, row y, column x].
        canvas = canvas.view(count, g, g, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(count, 3, g * p, g * p)
        tokens = _tokens(getattr(self.model, self.method)(canvas), self.last)
        patches = tokens[:, self.leading :].flatten(0, 1).index_select(0, place)
        return with_prefix(images.replace(x=patches, size=None), tokens[:, : self.leading])


def _tokens(found: Any, last: bool) -> Tensor:
    """[B, n + h * w, C] of what a model gives."""
    x: Tensor = found if isinstance(found, Tensor) else found.last_hidden_state
    if x.ndim == 4:
        x = x.flatten(1, 2) if last else x.flatten(2).transpose(1, 2)
    return x


def with_prefix(patches: Packed, prefix: Tensor) -> Packed:
    """``prefix`` [S, n, C] in front of each segment, with pos (index, -1, -1)."""
    n = prefix.shape[1]
    if not n:
        return patches
    pos = torch.full((len(patches), n, 3), -1, dtype=torch.int32, device=prefix.device)
    pos[..., 0] = torch.arange(n, dtype=torch.int32, device=prefix.device)
    front = Packed.of(prefix.flatten(0, 1), [n] * len(patches), pos=pos.flatten(0, 1))
    return front.join(patches)


def project(convolution: Any, pixels: Tensor) -> Tensor:
    """Pixels [T, P*P*3] (row, column, channel) by the weights of a convolution with kernel and stride P: [T, C]."""
    # A convolution whose stride is its kernel is a matrix product over patches, which ragged pictures need no canvas for.
    return F.linear(pixels, convolution.weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)
