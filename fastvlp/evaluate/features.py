"""Features of all samples of some shards, in batches, so that memory holds one batch of pictures at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastvlp.data.samples import Sample, samples
from fastvlp.data.shards import Shards

if TYPE_CHECKING:
    from PIL import Image


class Encoder(Protocol):
    """What evaluation needs of a model; a ``System`` with two towers has it."""

    def encode_image(self, images: Any) -> Tensor: ...

    def encode_text(self, texts: Any) -> Tensor: ...


@dataclass(frozen=True)
class Features:
    """Normalised features of the n samples of some shards, float32 on the CPU.

    Attributes:
        images: [n, D]. texts: [n, D], of each sample's first caption, or [0, D] if captions were not asked for.
        captions: the n first captions. classes: the n classes (None where a sample names none). keys: the n names.
        owner: int64 [n], the image each caption belongs to.
        skipped: number of samples that could not be used, by reason.
    """

    images: Tensor
    texts: Tensor
    captions: list[str]
    classes: list[str | None]
    keys: list[str]
    owner: Tensor
    skipped: Counter[str]
    shards: Shards

    def pictures(self, rows: Sequence[int]) -> dict[int, Image.Image]:
        """The RGB pictures of some rows, read again from the shards."""
        wanted = set(rows)
        return {row: sample.image for row, sample in enumerate(islice(samples(self.shards), max(wanted, default=-1) + 1)) if row in wanted}


@torch.no_grad()
def features(model: Encoder, shards: Shards, batch_size: int = 256, texts: bool = True) -> Features:
    """Encode every usable sample of ``shards``, in the order of the files.

    Args:
        model: its ``encode_image`` takes a list of PIL images, its ``encode_text`` a list of strings; put it into evaluation mode first.
        batch_size: samples encoded (and decoded pictures held) at a time.
        texts: also encode each sample's first caption; a sample's further captions are not used.

    Raises:
        FileNotFoundError: the shard list matches nothing.
        ValueError: no sample could be used; says what was skipped and why.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    skipped: Counter[str] = Counter()
    names: list[str] = []

    def on_skip(reason: str, name: str) -> None:
        skipped[reason] += 1
        names.append(name)

    images: list[Tensor] = []
    encoded: list[Tensor] = []
    captions: list[str] = []
    classes: list[str | None] = []
    keys: list[str] = []
    for batch in _batches(samples(shards, on_skip=on_skip), batch_size):
        first = [sample.labels.captions[0] for sample in batch]
        images.append(_normalised(model.encode_image([sample.image for sample in batch])))
        if texts:
            encoded.append(encode_texts(model, first, batch_size))
        captions += first
        classes += [sample.labels.name for sample in batch]
        keys += [sample.key for sample in batch]
    if not images:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped.most_common())
        raise ValueError(f"no sample of {shards!r} can be used" + (f": {reasons}; the first is {names[0]}" if names else ""))
    x = torch.cat(images)
    return Features(x, torch.cat(encoded) if encoded else x[:0], captions, classes, keys, torch.arange(len(x)), skipped, shards)


@torch.no_grad()
def encode_texts(model: Encoder, texts: Sequence[str], batch_size: int) -> Tensor:
    """Normalised features of strings: float32 [n, D] on the CPU."""
    return torch.cat([_normalised(model.encode_text(list(texts[i:i + batch_size]))) for i in range(0, len(texts), batch_size)])


def _normalised(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.float(), dim=-1).cpu()


def _batches(stream: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while batch := list(islice(stream, size)):
        yield batch


def ranks(queries: Tensor, keys: Tensor, targets: Tensor, batch_size: int) -> Tensor:
    """How many keys are more similar to each query than its target is: int64 [Q], 0 is best.

    Among equally similar keys the one listed first counts as more similar; a similarity that is not a number counts against the model.
    Memory: batch_size x K similarities at a time.

    Args:
        queries: [Q, D]. keys: [K, D]. targets: int64 [Q], the right key of each query.
    """
    found = []
    place = torch.arange(len(keys))
    for query, target in zip(queries.split(batch_size), targets.split(batch_size), strict=True):
        similarity = query @ keys.T
        own = similarity.gather(1, target[:, None])
        behind = (similarity < own) | ((similarity == own) & (place > target[:, None]))
        found.append((~behind).sum(1) - 1)
    return torch.cat(found)
