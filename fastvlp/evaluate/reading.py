"""Every usable sample of some shards once, in the order of the files: decoded in workers, each batch by one of the processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastvlp.data.fields import Pages
from fastvlp.data.images import MAX_PIXELS, Unusable
from fastvlp.data.samples import Labels, Reader
from fastvlp.data.shards import Index, Shards, expand
from fastvlp.data.workers import Guard, from_workers
from fastvlp.systems.system import System

T = TypeVar("T")
Prepare = Callable[[list[Any], list[str]], Any]


class Ranks(Protocol):
    """The processes that evaluate together; ``fastvlp.train.parallel.World`` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: object) -> list: ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def gather(self, value: object) -> list:
        return [value]


@dataclass(frozen=True)
class How:
    """How a set is gone through.

    Attributes:
        batch_size: samples encoded (and decoded pictures held) at a time. world: who shares the work; all call together.
        workers: loading processes per process; 0 loads in this one. beat: called at every batch.
        timeout: seconds to wait for a worker before a RuntimeError, 0 for ever.
    """

    batch_size: int = 256
    world: Ranks = field(default_factory=Alone)
    workers: int = 0
    beat: Callable[[], object] = lambda: None
    timeout: float = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise ValueError(f"batch_size is {self.batch_size} and workers is {self.workers}; batch_size must be at least 1, workers not "
                             "negative")

    def share(self, items: Sequence[T]) -> Iterator[tuple[int, T]]:
        """This process's part of some items, numbered; as many on every process: who has fewer gets the first again, with number -1."""
        world = self.world
        # Sharded parameters are gathered by all processes at once, so that each has to make as many batches as the others.
        for number in range(world.rank, -(-len(items) // world.size) * world.size, world.size):
            yield (number, items[number]) if number < len(items) else (-1, items[0])

    def loaded(self, data: Dataset[T], numbered: Sequence[tuple[int, Any]], guard: Guard | None = None) -> Iterator[tuple[int, T]]:
        """(number, ``data[key]``) of some (number, key) in their order, read by the workers; ``guard`` as in ``from_workers``."""
        keys = [key for _, key in numbered]
        found: Iterable[T] = map(data.__getitem__, keys)
        if self.workers and len(keys) > 1:
            found = from_workers(data, keys, min(self.workers, len(keys)), guard, timeout=self.timeout)
        for (number, _), one in zip(numbered, found, strict=True):
            self.beat()
            yield number, one

    def together(self, mine: Mapping[int, T]) -> list[T]:
        """What all processes made of their parts, in order (a collective call)."""
        everyone: dict[int, T] = {}
        for theirs in self.world.gather(dict(mine)):
            everyone |= theirs
        return [everyone[number] for number in sorted(everyone) if number >= 0]


@dataclass(frozen=True)
class Read:
    """Some samples: ``pictures`` as they were prepared, and what is written about each.

    Attributes:
        others: for each, the first caption of another sample, of another class or caption where there is one.
        skips: (reason, "shard: key") of those that could not be used.
    """

    pictures: Any
    keys: list[str]
    labels: list[Labels]
    others: list[str]
    skips: list[tuple[str, str]]


class Reading(Dataset[Read]):
    """The batches of a set by number; lives in a worker or in this process.

    Args:
        prepare: makes what the model takes of PIL images and first captions. others: look for other samples' captions, too.
        pad: a batch of which no sample can be used holds a blank picture, so that it is encoded like all others.
    """

    def __init__(self, paths: Sequence[str], places: np.ndarray, prepare: Prepare, batch_size: int, others: bool, pad: bool) -> None:
        self.places, self.prepare, self.batch_size, self.others, self.pad = places, prepare, batch_size, others, pad
        self.reader = Reader(Index(paths, _known), MAX_PIXELS)
        self.guard = Guard()

    def __len__(self) -> int:
        return -(-len(self.places) // self.batch_size)

    def __getitem__(self, number: int) -> Read:
        first, reader = number * self.batch_size, self.reader
        pictures, keys, labels, others, skips = [], list[str](), list[Labels](), list[str](), list[tuple[str, str]]()
        for place in range(first, min(first + self.batch_size, len(self.places))):
            shard, member = self.places[place].tolist()
            try:
                with self.guard.reading(0, shard, member):
                    label, picture = reader.labels(shard, member), reader.image(shard, member)
            except Unusable as reason:
                skips.append((str(reason), reader.name(shard, member)))
                continue
            pictures.append(picture)
            labels.append(label)
            keys.append(reader.index.shard(shard).keys[member])
            if self.others:
                others.append(self._other(place, label))
        captions = [label.captions[0] for label in labels]
        # For the same reason a batch without a usable picture is still a forward pass.
        if not pictures and self.pad:
            pictures, captions = [_blank()], [""]
        return Read(self.prepare(pictures, captions) if pictures else None, keys, labels, others, skips)

    def _other(self, place: int, own: Labels) -> str:
        """The first caption of the next sample in the order of the files that shows something else; its own where there is none."""
        # By class or caption, not by place: neighbours in a shard often show the same thing.
        for step in range(1, len(self.places)):
            try:
                found = self.reader.labels(*self.places[(place + step) % len(self.places)].tolist())
            except Unusable:
                continue
            if found.id != own.id:
                return found.captions[0]
        return own.captions[0]


class Samples:
    """Iterates over (number, ``Read``) of this process's batches; as many on every process, and -1 for a batch that does not count.

    Raises:
        FileNotFoundError: the shard list matches nothing.
    """

    def __init__(self, shards: Shards, prepare: Prepare, how: How, others: bool = False) -> None:
        self.shards, self.how = shards, how
        self.skips: list[tuple[str, str]] = []
        paths = expand(shards)
        index = Index(paths, self._skip if how.world.rank == 0 else _known)  # every process sees the same headers
        places = [(shard, member) for shard in range(len(paths)) for member in range(index.count(shard))]
        table = np.array(places, dtype=np.int64).reshape(-1, 2)
        self.reading = Reading(paths, table, prepare, how.batch_size, others, pad=how.world.size > 1)

    def __iter__(self) -> Iterator[tuple[int, Read]]:
        for number, read in self.how.loaded(self.reading, list(self.how.share(range(len(self.reading)))), self.reading.guard):
            if number >= 0:
                self.skips += read.skips
            if read.pictures is not None:
                yield number if read.keys else -1, read

    def skipped(self, usable: int) -> Counter[str]:
        """Samples that could not be used, by reason, of all processes (a collective call).

        Raises:
            ValueError: no sample was ``usable``; says why.
        """
        everyone = [skip for theirs in self.how.world.gather(self.skips) for skip in theirs]
        counts = Counter(reason for reason, _ in everyone)
        if not usable:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in counts.most_common())
            why = f": {reasons}; the first is {everyone[0][1]}" if everyone else ""
            raise ValueError(f"no sample of {self.shards!r} can be used{why}")
        return counts

    def _skip(self, reason: str, name: str) -> None:
        self.skips.append((reason, name))


@torch.no_grad()
def judged(system: System, shards: Shards, how: How, judge: Callable[[Any, list[str], list[str]], list[Tensor]],
           others: bool = False) -> tuple[list[Tensor], Counter[str]]:
    """What a system makes of each sample's picture and first caption, in the order of the files; with several processes a collective call.

    Args:
        judge: (prepared pictures on the system's device, captions, others' captions) -> tensors [n] of a batch. A system of words alone,
            without a field ``image``, gets None.

    Returns:
        Those of all samples, on the CPU, and the number of samples that could not be used, by reason.
    """
    reading = Samples(shards, Prepared.by(system), how, others)
    mine = {}
    for number, read in reading:
        captions = [label.captions[0] for label in read.labels] or [""]  # of the blank picture
        pictures = None if system.fields and "image" not in system.fields else system.prepared("image", read.pictures)
        found = judge(pictures, captions, read.others or [""])
        mine[number] = [value.cpu() for value in found]
    parts = how.together(mine)
    skipped = reading.skipped(len(parts))
    return [torch.cat(values) for values in zip(*parts, strict=True)], skipped


@dataclass(frozen=True)
class Prepared:
    """Makes the stream ``image`` where samples are read; a model without such a field takes pictures as they are."""

    field: Any

    @classmethod
    def by(cls, model: Any) -> Prepared:
        return cls(getattr(model, "fields", {}).get("image"))

    def __call__(self, pictures: list[Any], captions: list[str]) -> Any:
        if self.field is None:
            return pictures
        return self.field.prepare(captions if isinstance(self.field, Pages) else pictures)


def _blank() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 64))


def _known(reason: str, name: str) -> None:
    """Problems of headers, which the index of the first process has reported."""
