"""What the data part hands to the trainer: one batch, and the stage of training that it was made for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """How the pictures of a batch are prepared.

    Attributes:
        image_size: the longest side in pixels. Pictures keep their aspect ratio; both sides are rounded to multiples of the patch size.
        keep: the fraction of patches that training keeps (``pack_images`` drops the others); 1.0 keeps all.
        augment: strength of crop, shift and colour changes; 0 is none, 1 is the full range.
    """

    image_size: int
    keep: float = 1.0
    augment: float = 0.0

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; it must be at least 1 pixel")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; it is a fraction of patches, above 0 and at most 1")
        if not 0 <= self.augment <= 4:
            raise ValueError(f"augment is {self.augment}; a strength from 0 (none) to 4 is allowed, 1 is the usual full range")


@dataclass(frozen=True)
class Batch:
    """This rank's slice of one global batch of image-text pairs; every field has one entry per pair.

    Attributes:
        images: uint8 [h, w, 3] RGB, ragged; h and w are multiples of the patch size.
        texts: int64 [n] token ids (start and end tokens if the tokenizer has them), at most ``context_length`` long.
        ids: int64 [B], a stable hash of the class (or, without a class, of the first caption), never negative: pairs of equal id show
            the same thing.
        keys: the samples' names.
        index: number of the global batch, counted from the start of training.
        seeds: int64 [B], the samples' own randomness, a function of seed, epoch and position only: give it to ``pack_images`` and
            the dropped patches do not depend on ranks or micro-batches.
    """

    images: list[Tensor]
    texts: list[Tensor]
    ids: Tensor
    keys: list[str]
    index: int
    seeds: Tensor

    def __len__(self) -> int:
        return len(self.images)
