"""Features of all samples of some shards, in batches, so that memory holds one batch of pictures at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastvlp.data.samples import Labels, samples
from fastvlp.data.shards import Shards
from fastvlp.evaluate.reading import How, Prepared, Samples

if TYPE_CHECKING:
    from PIL import Image


class Encoder(Protocol):
    """What evaluation needs of a model; a ``System`` with two towers has it."""

    def encode_image(self, images: Any) -> Tensor: ...

    def encode_text(self, texts: Any) -> Tensor: ...


@dataclass(frozen=True)
class Features:
    """Normalised features of the n samples of some shards and of their m captions, float32 on the CPU; the same on every process.

    Attributes:
        images: [n, D]. texts: [m, D], of all captions, or [0, D] if captions were not asked for.
        captions: the m captions, sample after sample. owner: int64 [m], the sample each belongs to. first: int64 [n], each sample's first.
        classes: the n classes (None where a sample names none). keys: the n names.
        skipped: number of samples that could not be used, by reason.
    """

    images: Tensor
    texts: Tensor
    captions: list[str]
    owner: Tensor
    first: Tensor
    classes: list[str | None]
    keys: list[str]
    skipped: Counter[str]
    shards: Shards

    def pictures(self, rows: Sequence[int]) -> dict[int, Image.Image]:
        """The RGB pictures of some rows, read again from the shards."""
        wanted = set(rows)
        return {row: sample.image for row, sample in enumerate(islice(samples(self.shards), max(wanted, default=-1) + 1)) if row in wanted}


@torch.no_grad()
def features(model: Encoder, shards: Shards, how: How | int = 256, texts: bool = True) -> Features:
    """Encode every usable sample of ``shards``, in the order of the files; with several processes a collective call.

    Args:
        model: its ``encode_image`` takes a list of PIL images or what its field ``image`` makes of it, its ``encode_text`` a list of
            strings; put it into evaluation mode first.
        how: batch size, processes and workers; a number is the batch size alone.
        texts: also encode all captions.

    Raises:
        FileNotFoundError: the shard list matches nothing.
        ValueError: no sample could be used; says what was skipped and why.
    """
    how = how if isinstance(how, How) else How(how)
    reading = Samples(shards, Prepared.by(model), how)
    mine: dict[int, tuple[Tensor, list[Labels], list[str]]] = {}
    for number, read in reading:
        encoded = normalised(model.encode_image(read.pictures))
        # A batch that only keeps sharded parameters in step with the other processes.
        if number >= 0:
            mine[number] = encoded, read.labels, read.keys
    parts = how.together(mine)
    skipped = reading.skipped(len(parts))
    images = torch.cat([part[0] for part in parts])
    labels = [label for part in parts for label in part[1]]
    counts = torch.tensor([len(label.captions) for label in labels])
    captions = [caption for label in labels for caption in label.captions]
    return Features(images, encode_texts(model, captions, how) if texts else images[:0], captions,
                    torch.arange(len(labels)).repeat_interleave(counts), counts.cumsum(0) - counts, [label.name for label in labels],
                    [key for part in parts for key in part[2]], skipped, shards)


@torch.no_grad()
def encode_texts(model: Encoder, texts: Sequence[str], how: How) -> Tensor:
    """Normalised features of strings: float32 [n, D] on the CPU; with several processes a collective call."""
    mine = {}
    for number, batch in how.share([list(texts[i:i + how.batch_size]) for i in range(0, len(texts), how.batch_size)]):
        # A sign of life for each batch, or a long list would pass for a hang.
        how.beat()
        mine[number] = normalised(model.encode_text(batch))
    return torch.cat(how.together(mine))


def normalised(x: Tensor) -> Tensor:
    """Rows of length 1, float32 on the CPU."""
    return torch.nn.functional.normalize(x.float(), dim=-1).cpu()


def ranks(queries: Tensor, keys: Tensor, targets: Tensor, owner: Tensor, batch_size: int) -> Tensor:
    """How many wrong keys are more similar to each query than the best of its right ones is: int64 [Q], 0 is best.

    Among equally similar keys the one listed first counts as more similar; a similarity that is not a number counts against the model.
    Memory: batch_size x K similarities at a time.

    Args:
        queries: [Q, D]. keys: [K, D]. Key k is right for query q where owner[k] == targets[q]. targets: int64 [Q]. owner: int64 [K].
    """
    found = []
    place = torch.arange(len(keys))
    for query, target in zip(queries.split(batch_size), targets.split(batch_size), strict=True):
        # A batch of queries at a time: the whole matrix of a large set would not fit.
        similarity, right = query @ keys.T, owner == target[:, None]
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        # Among equal similarities the first key wins: a model whose features are all alike must not score as if it were perfect.
        first = place.where(right & (similarity == best), len(keys)).amin(1, keepdim=True)
        # Counted by what is behind: NaN compares as false everywhere, and so ranks last.
        behind = (similarity < best) | ((similarity == best) & (place > first))
        found.append((~behind & ~right).sum(1))
    return torch.cat(found)


def shares(rank: Tensor, tops: Sequence[int], name: str) -> dict[str, float]:
    """The share of ranks below each of ``tops``, as NAME1, NAME5, ..."""
    # In float64, since float32 cannot count beyond 2^24.
    return {f"{name}{k}": (rank < k).double().mean().item() for k in tops}


def reciprocal(rank: Tensor) -> float:
    """The mean reciprocal rank: of 1 / (rank + 1), since 0 is best here."""
    return (1 / (rank + 1).double()).mean().item()
