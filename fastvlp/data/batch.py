"""What a step trains on: some samples, each with an entry in every stream; and the stage of training that it was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvlp import packing
from fastvlp_kernels.packed import Packed


@dataclass(frozen=True)
class Stage:
    """One stretch of training, up to the fraction ``until`` of all steps. What is None stays as the fields (or the run) say.

    Attributes:
        image_size: the longest side in pixels. keep: the fraction of patches that training keeps. augment: strength of crop, shift and
            colour changes, 0 is none, 1 the full range. They hold for the ``Image`` fields that leave theirs open.
        frozen: parts of the system that do not train in this stage (``image``, ``text.blocks.0``). weights: of the sources.
    """

    until: float = 1.0
    image_size: int | None = None
    keep: float | None = None
    augment: float | None = None
    frozen: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"until is {self.until}; a fraction of all steps, above 0 and at most 1, is needed")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; it must be at least 1 pixel")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; it is a fraction of patches, above 0 and at most 1")
        if self.augment is not None and not 0 <= self.augment <= 4:
            raise ValueError(f"augment is {self.augment}; a strength from 0 (none) to 4 is allowed, 1 is the usual full range")


class UnknownStream(AttributeError, ValueError):
    """A system asked a batch for a stream that the recipe's fields do not make."""


@dataclass(frozen=True)
class Batch:
    """n samples of one process. ``batch.NAME`` is the stream NAME.

    Attributes:
        streams: by name, an entry a sample: a tensor [n, ...], or ``Packed`` with the same number of segments for every sample (one, or as
            many as there are views, frames or captions).
        ids: int64 [n], a stable hash of the class (or, without a class, of the first caption): pairs of equal id show the same thing.
        sizes: samples of each process; empty: this is all. counts: what ``System.counts`` gave, summed over all processes.
        first: the place of this process's first sample in the whole batch.
        index: number of the batch, from 0. keys: the samples' names. source: number of the source that all samples come from.
        positions: samples that each source has given after this batch, to all processes together; a stream that is started there continues.
    """

    streams: Mapping[str, Tensor | Packed]
    ids: Tensor
    sizes: Sequence[int] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    first: int = 0
    index: int = 0
    keys: Sequence[str] = ()
    source: int = 0
    positions: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def total(self) -> int:
        """Samples of the whole batch, of all processes."""
        return sum(self.sizes) if self.sizes else len(self)

    @property
    def world(self) -> int:
        """Processes that share the batch."""
        return max(1, len(self.sizes))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for these before there are streams
            raise AttributeError(name)
        try:
            return self.__dict__["streams"][name]
        except KeyError:
            known = ", ".join(self.__dict__.get("streams", ()))
            raise UnknownStream(f"the batch has no stream {name!r}; this recipe's fields are {known}") from None

    def take(self, rows: Sequence[int] | Tensor) -> Batch:
        """Some of the samples, in this order; ``sizes`` and ``counts`` stay those of the whole batch."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        streams = {name: take_samples(stream, index, len(self)) for name, stream in self.streams.items()}
        return replace(self, streams=streams, ids=self.ids[index.to(self.ids.device)], sizes=self.sizes or (len(self),),
                       keys=[self.keys[i] for i in index.tolist()] if self.keys else ())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """All streams and the ids on a device."""
        streams = {name: stream.to(device, non_blocking=non_blocking) for name, stream in self.streams.items()}
        return replace(self, streams=streams, ids=self.ids.to(device, non_blocking=non_blocking))

    def microbatches(self, budgets: Mapping[str, int], widths: Mapping[str, int]) -> int:
        """How many micro-batches these samples need, so that each stays within ``budgets`` (tokens by stream).

        Processes agree on the largest, since sharded parameters are gathered by all at once. ``widths``: of the towers, by stream.
        """
        lengths = self._lengths()
        return packing.parts(packing.costs(len(self), lengths, widths), lengths, budgets)

    def cost(self, widths: Mapping[str, int]) -> float:
        """Operations of a transformer block of these widths over all tokens (``packing.costs``): how the work of batches compares."""
        return float(packing.costs(len(self), self._lengths(), widths).sum())

    def split(self, k: int, widths: Mapping[str, int]) -> list[Tensor]:
        """The rows (int64) of k micro-batches of nearly equal work, none empty: what ``take`` takes."""
        return [torch.from_numpy(rows) for rows in packing.split(packing.costs(len(self), self._lengths(), widths), k)]

    def _lengths(self) -> dict[str, np.ndarray]:
        return {name: stream.lengths.numpy().reshape(len(self), -1) for name, stream in self.streams.items() if isinstance(stream, Packed)}

    def per_token(self, sums: Tensor, name: str) -> Tensor:
        """A loss summed over the words of each sample [n] as the ``*_loss`` whose mean over samples is the mean over ``counts[name]``."""
        return sums * (self.total / max(1, self.counts[name]))


def take_samples(stream: Tensor | Packed, rows: Tensor, samples: int) -> Tensor | Packed:
    """The entries of some samples; a packed stream has the same number of segments for each."""
    if isinstance(stream, Tensor):
        return stream[rows.to(stream.device)]
    each = len(stream) // samples
    return stream.take((rows[:, None] * each + torch.arange(each)).flatten())
