"""Batches of the shipped pairs as training has them, and their pictures as others want them."""

from __future__ import annotations

from torch import Tensor

from benchmarks import open_clip_baseline as rival
from fastvlp.data import Batch, Caption, Image, Stage, Stream, load_tokenizer
from fastvlp_kernels.packed import Packed

PATCH = 16


def shipped(count: int, tokenizer: str = "mini", seed: int = 0, max_captions: int | None = None) -> Batch:
    """The first pairs of the training data in the order of ``seed``: pictures whose longest side is 64 pixels, nothing dropped."""
    words = load_tokenizer(tokenizer, rival.CONTEXT)
    fields = {"image": Image(rival.SIDE, PATCH), "text": Caption(length=rival.CONTEXT, max_captions=max_captions)}
    bound = {name: field.bind(None, words) for name, field in fields.items()}
    return next(iter(Stream("mini:train", bound, count, seed=seed, stage_at=Stage())))


def pictures(images: Packed, patch: int = PATCH) -> list[Tensor]:
    """Packed patches, all of each picture, as pictures [h, w, 3]."""
    assert images.pos is not None
    out = []
    for patches, pos in zip(images.segments(), images.pos.split(images.lengths.tolist()), strict=True):
        rows, columns = (int(last) + 1 for last in pos[-1, 1:])
        out.append(patches.view(rows, columns, patch, patch, 3).transpose(1, 2).reshape(rows * patch, columns * patch, 3))
    return out
