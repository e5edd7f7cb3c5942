"""The worker's half of a stream: reads samples, replaces bad ones, and packs a batch to travel between processes."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastvlp.data.batch import Batch, Stage
from fastvlp.data.fields import Field, Other, Record
from fastvlp.data.frames import frames
from fastvlp.data.images import Unusable, fit
from fastvlp.data.order import Picks
from fastvlp.data.patches import mix
from fastvlp.data.samples import Labels, Reader
from fastvlp.data.shards import Index
from fastvlp.data.workers import Guard
from fastvlp_kernels.packed import Packed

NEAR, TRIES = 16, 256
SUBSTITUTE = 1000  # which of a place's random words draw the samples that fill it when its own is bad
OVERHEAD = 512  # bytes of a cached entry beside its contents: key, array or tuple, slot

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What one process reads for batch ``index``; ``positions`` is where the sources stand after the whole batch."""

    index: int
    stage: Stage
    source: int
    picks: Picks
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Flat:
    """A batch as it travels between processes: every tensor in one, since each would cost a file descriptor and a mapping.

    Attributes:
        data: uint8, all tensors end to end, each at a multiple of 64 bytes. layout: (first byte, dtype, shape) of each tensor.
        streams: by name, the numbers of the tensors (x, cu_seqlens, lengths, size, pos; None: not there), or of the only one. longest: by
            name, the longest segment. about: what else a ``Batch`` says. skips: (reason, name) of bad samples met on the way.
    """

    data: Tensor
    layout: list[tuple[int, torch.dtype, tuple[int, ...]]]
    streams: dict[str, int | tuple[int | None, ...]]
    longest: dict[str, int]
    about: dict[str, Any]
    skips: list[tuple[str, str]]

    @classmethod
    def of(cls, streams: Mapping[str, Tensor | Packed], ids: Tensor, about: dict[str, Any], skips: list[tuple[str, str]]) -> Flat:
        tensors = [ids]
        places: dict[str, int | tuple[int | None, ...]] = {}
        longest: dict[str, int] = {}

        def place(tensor: Tensor) -> int:
            tensors.append(tensor)
            return len(tensors) - 1

        for name, stream in streams.items():
            if isinstance(stream, Packed):
                parts = (stream.x, stream.cu_seqlens, stream.lengths, stream.size, stream.pos)
                places[name] = tuple(None if part is None else place(part) for part in parts)
                longest[name] = stream.max_seqlen
            else:
                places[name] = place(stream)
        layout, end = [], 0
        for tensor in tensors:
            layout.append((end, tensor.dtype, tuple(tensor.shape)))
            end += -(-tensor.nbytes // 64) * 64
        data = torch.empty(end, dtype=torch.uint8)
        for tensor, (first, _, _) in zip(tensors, layout, strict=True):
            data[first:first + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
        return cls(data, layout, places, longest, about, skips)

    def __len__(self) -> int:
        return self.layout[0][2][0]  # the ids

    def pin_memory(self) -> Flat:
        """In page-locked memory, from which copies to a GPU need not be waited for (DataLoader calls this)."""
        return replace(self, data=self.data.pin_memory())

    def batch(self, sizes: Sequence[int], first: int) -> Batch:
        """The batch, whose tensors are views of ``data``."""
        tensors = [self.data[start:start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
                   for start, dtype, shape in self.layout]
        streams: dict[str, Tensor | Packed] = {}
        for name, places in self.streams.items():
            if isinstance(places, int):
                streams[name] = tensors[places]
            else:
                x, cu_seqlens, lengths, size, pos = (tensors[0] if number is None else tensors[number] for number in places)
                streams[name] = Packed(x, cu_seqlens, lengths, x.shape[0], self.longest[name], None if places[3] is None else size,
                                       None if places[4] is None else pos)
        return Batch(streams, tensors[0], sizes=sizes, first=first, **self.about)


class Cache:
    """What was read, until a number of bytes is full; then the rest is read each time, since in an epoch nothing comes back soon."""

    def __init__(self, room: int) -> None:
        self.size = self.room = room
        self.entries: dict[Any, Any] = {}

    def get(self, key: Any, make: Callable[[], T], nbytes: Callable[[T], int]) -> T:
        """The entry of this key, or what ``make`` gives."""
        if key in self.entries:
            return self.entries[key]
        found = make()
        needed = nbytes(found) + OVERHEAD
        if needed <= self.room:
            self.room -= needed
            self.entries[key] = found
        return found

    def clear(self) -> None:
        self.entries.clear()
        self.room = self.size


class Sample:
    """A ``Record`` of a shard; what is read stays with it until its batch is done, whether the cache has room or not."""

    def __init__(self, loader: Loader, source: int, shard: int, member: int) -> None:
        self.place = source, shard, member
        self.key: str = loader.readers[source].index.shard(shard).keys[member]
        self.find_other: Callable[[], Sample] | None = None
        self._cache, self._reader = loader.cache, loader.readers[source]
        self._mine: dict[Any, Any] = {}

    @property
    def labels(self) -> Labels:
        return self._once("labels", self._reader.labels, lambda labels: sum(map(sys.getsizeof, labels.captions)))

    @property
    def captions(self) -> Sequence[str]:
        return self.labels.captions

    @cached_property
    def values(self) -> Mapping[str, Any]:
        return self._reader.values(*self.place[1:])

    @cached_property
    def other(self) -> Record:
        assert self.find_other is not None  # fields ask for it, and a sample that fields see has one
        return self.find_other()

    def picture(self, size: int, patch: int) -> np.ndarray:
        """uint8 [h, w, 3]: the longest side is ``size``, both are multiples of ``patch``."""
        def read(shard: int, member: int) -> np.ndarray:
            return fit(self._reader.image(shard, member, wanted=size), size, patch)

        return self._once((size, patch), read, lambda array: array.nbytes)

    def frames(self, size: int, patch: int) -> Sequence[np.ndarray]:
        """All pictures of an animation, none where the picture does not move."""
        def read(shard: int, member: int) -> list[np.ndarray]:
            return frames(self._reader.picture(shard, member), size, patch, self._reader.max_pixels)

        return self._once(("frames", size, patch), read, lambda found: sum(frame.nbytes for frame in found))

    def npy(self, name: str) -> bytes | None:
        """The contents of its member NAME.npy, or None."""
        return self._once(("npy", name), lambda shard, member: self._reader.npy(shard, member, name), lambda data: len(data or b""))

    def _once(self, what: Any, read: Callable[[int, int], T], nbytes: Callable[[T], int]) -> T:
        if what not in self._mine:
            self._mine[what] = self._cache.get((what, self.place), lambda: read(*self.place[1:]), nbytes)
        return self._mine[what]


class Loader(Dataset[Flat]):
    """Reads the samples of a request; lives in a worker or in the training process.

    Args:
        sources: for each, the paths of its shards and its fields.
        cache_bytes: memory for decoded, scaled pictures and captions.
    """

    def __init__(self, sources: Sequence[tuple[list[str], Mapping[str, Field]]], max_pixels: int, cache_bytes: int) -> None:
        self.fields = [fields for _, fields in sources]
        self.skips: list[tuple[str, str]] = []
        self.guard = Guard()
        self.readers = [Reader(Index(paths, self._skip), max_pixels) for paths, _ in sources]
        self.cache = Cache(cache_bytes)
        self.bad: set[tuple[bool, tuple[int, int, int]]] = set()  # for a place of its own, or as the other of one
        self._size: int | None = None

    def __getitem__(self, request: Request) -> Flat:
        picks, stage, fields = request.picks, request.stage, self.fields[request.source]
        if stage.image_size != self._size:
            self.cache.clear()  # pictures of the last stage's size, which do not come again
            self._size = stage.image_size
        samples = [self._sample(request.source, stage, *place) for place in
                   zip(picks.shard.tolist(), picks.member.tolist(), picks.seeds, picks.other.tolist(), strict=True)]
        streams = {name: _checked(name, one(samples, picks.seeds, stage), len(samples)) for name, one in fields.items()}
        ids = torch.tensor([sample.labels.id for sample in samples], dtype=torch.int64)
        skips, self.skips[:] = list(self.skips), []
        about = {"index": request.index, "source": request.source, "positions": request.positions, "keys": [one.key for one in samples]}
        return Flat.of(streams, ids, about, skips)

    def _sample(self, source: int, stage: Stage, shard: int, member: int, seed: np.uint64, other: tuple[int, int]) -> Sample:
        fields = list(self.fields[source].values())
        asked = [one.field for one in fields if isinstance(one, Other)]
        word = mix(np.array([seed]), np.array([SUBSTITUTE]))[0]

        def prepare(sample: Sample) -> None:
            sample.find_other = lambda: self._find(source, *other, word, asked, stage, lambda _: None, sample.labels.id)

        return self._find(source, shard, member, seed, fields, stage, prepare)

    def _find(self, source: int, shard: int, member: int, seed: np.uint64, fields: Sequence[Field], stage: Stage,
              prepare: Callable[[Sample], None], not_id: int | None = None) -> Sample:
        """The sample of a place, or the first usable substitute; one of another id than ``not_id`` where a few tries find it."""
        index = self.readers[source].index
        alike: Sample | None = None
        for attempt in range(TRIES):
            if attempt:
                a, b = mix(np.repeat(seed, 2), np.array([2 * attempt, 2 * attempt + 1]) + SUBSTITUTE)
                shard = shard if attempt <= NEAR else int(a % np.uint64(len(index.paths)))
                if index.count(shard) == 0:
                    continue
                member = int(b % np.uint64(index.count(shard)))
            role = not_id is None, (source, shard, member)
            if role in self.bad:
                continue
            sample = Sample(self, source, shard, member)
            prepare(sample)
            try:
                with self.guard.reading(source, shard, member):
                    labels = sample.labels
                    for one in fields:
                        one.check(sample, stage)
            except Unusable as reason:
                self.bad.add(role)
                self._skip(str(reason), self.readers[source].name(shard, member))
                continue
            if labels.id != not_id:
                return sample
            alike = alike or sample
            if attempt > 2 * NEAR:
                break
        if alike is not None:
            return alike
        reasons = ", ".join(f"{reason} ({count})" for reason, count in Counter(reason for reason, _ in self.skips).most_common())
        raise RuntimeError(f"{TRIES} samples in a row could not be used, the last in {index.paths[shard]}: {reasons or 'all bad before'}")

    def _skip(self, reason: str, name: str) -> None:
        self.skips.append((reason, name))


def _checked(name: str, stream: Tensor | Packed, samples: int) -> Tensor | Packed:
    """A stream that has an entry for each sample, as it must."""
    if len(stream) % samples or len(stream) == 0 or (isinstance(stream, Tensor) and len(stream) != samples):
        raise ValueError(f"the field {name!r} made {len(stream)} entries of {samples} samples; a tensor has one row a sample, Packed one "
                         "segment or as many for each")
    return stream
