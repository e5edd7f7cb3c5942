"""One batch of pairs as micro-batches of packed tokens, on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlp.data import Batch, Stage, pack_images, pack_texts
from fastvlp.packing import microbatches
from fastvlp_kernels.packed import Packed


@dataclass(frozen=True)
class MicroBatches:
    """The images and, separately, the captions of one batch, each split under a token budget.

    Attributes:
        images, texts: packed micro-batches. Inside one, segments are sorted by length.
        image_rows, text_rows: int64 [B]: row b of the batch is row ``image_rows[b]`` of the concatenated image features, and likewise.
        image_tokens, text_tokens: how many tokens there are in all.
    """

    images: list[Packed]
    texts: list[Packed]
    image_rows: Tensor
    text_rows: Tensor
    image_tokens: int
    text_tokens: int

    def __len__(self) -> int:
        return len(self.image_rows)


def split(batch: Batch, stage: Stage, patch_size: int, image_budget: int | None, text_budget: int | None,
          device: torch.device) -> MicroBatches:
    """Pack a batch for the towers.

    Args:
        stage: its ``keep`` says which fraction of patches stays.
        image_budget, text_budget: most tokens of one micro-batch; None puts everything into one.
    """
    image_lengths = [_kept(image.shape[0] * image.shape[1] // patch_size**2, stage.keep) for image in batch.images]
    text_lengths = [len(text) for text in batch.texts]

    def images(rows: Sequence[int]) -> Packed:
        return pack_images([batch.images[i] for i in rows], patch_size, keep=stage.keep, seeds=batch.seeds[list(rows)])

    def texts(rows: Sequence[int]) -> Packed:
        return pack_texts([batch.texts[i] for i in rows])

    packed_images, image_rows = _pack(image_lengths, image_budget, images, device)
    packed_texts, text_rows = _pack(text_lengths, text_budget, texts, device)
    return MicroBatches(packed_images, packed_texts, image_rows, text_rows, sum(image_lengths), sum(text_lengths))


def _kept(patches: int, keep: float) -> int:
    return max(1, int(patches * keep + 0.5))


def _pack(lengths: list[int], budget: int | None, pack: Callable[[Sequence[int]], Packed],
          device: torch.device) -> tuple[list[Packed], Tensor]:
    groups = microbatches(lengths, sum(lengths) if budget is None else budget)
    order = torch.tensor([row for group in groups for row in group])
    return [pack(group).to(device) for group in groups], order.argsort().to(device)
