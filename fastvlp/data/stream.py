"""The endless stream of batches that training reads."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastvlp.data.batch import Batch, Stage
from fastvlp.data.fields import Field
from fastvlp.data.images import MAX_PIXELS
from fastvlp.data.loader import Flat, Loader, Request
from fastvlp.data.order import Order
from fastvlp.data.patches import mix
from fastvlp.data.shards import Index, Shards, expand
from fastvlp.data.workers import from_workers

MIXTURE = 0x6A09E667F3BCC908  # sets the words that choose sources apart from those that order samples

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Shards, how often a step takes its samples from them, and their own fields instead of the recipe's (None: the recipe's)."""

    shards: Shards
    weight: float = 1.0
    fields: Mapping[str, Field] | None = None


class Stream:
    """Batches for ever, from batch number ``start``; iterating again begins at ``start`` again.

    All samples of a batch come from one source, chosen by (seed, number of the batch, weights). Inside a source the global order is that
    of ``Order``: every usable sample once per epoch, epochs without a gap, counted in samples. A place's captions, augmentation and kept
    patches come from its own random word. So a run that is started where another stopped sees exactly what that would have seen, with any
    number of workers; with another batch size it neither repeats nor leaves out a sample; and W ranks see the slices (by the rule of
    ``torch.tensor_split``) of the batches that one rank would see.

    Samples without a usable header entry are no places at all. A sample that turns out unusable when it is read keeps its place, which
    is filled by another sample chosen by the place's random word: from the same shard, and after 16 bad ones from any shard. After 256
    bad ones in a row the stream ends with an error. A sample that a worker decodes for more than a minute of its processor, or on which its
    decoder crashes, is such a one: another worker takes over.

    Args:
        sources: a ``Source``, several, or shards alone (see ``expand``).
        fields: by the name of the stream, bound to the system (``fields.bind``).
        batch_size: samples in the global batch.
        stage_at: the Stage of each batch number, or one Stage for all.
        workers: processes that read ahead; 0 reads in this one.
        rank, world_size: this process gets slice ``rank`` of ``world_size``.
        start: number of the first batch. positions: samples that each source has given before it (``Batch.positions``); None: as many as
            batches of this size and these weights give.
        cache_mb: memory for decoded, scaled pictures, divided among the workers; when it is full, the rest are decoded each time.
        shuffle: size of the windows that are permuted as a whole, in samples.
        on_skip: hears (reason, "shard: key") of each bad sample once; without it they go to the log as warnings.
        pin_memory: batches lie in page-locked memory. timeout: seconds to wait for a worker before a RuntimeError, 0 for ever.

    Attributes:
        skips: (reason, digest of "shard: key") of the bad samples met so far by this rank; the union over ranks counts each sample once.
        indices: the index of each source's shards. read: samples that this rank has got.

    Raises:
        FileNotFoundError: a shard list matches nothing.
        RuntimeError: no usable sample. ValueError: a batch is larger than its source (both while iterating).
    """

    def __init__(self, sources: Source | Sequence[Source] | Shards, fields: Mapping[str, Field], batch_size: int, seed: int,
                 stage_at: Stage | Callable[[int], Stage], workers: int = 0, rank: int = 0, world_size: int = 1, start: int = 0,
                 positions: Sequence[int] | None = None, *, cache_mb: int = 512, shuffle: int = 1 << 15, max_pixels: int = MAX_PIXELS,
                 on_skip: Callable[[str, str], None] | None = None, pin_memory: bool = False, timeout: float = 0) -> None:
        if not 0 <= rank < world_size <= batch_size:
            raise ValueError(f"rank {rank} of {world_size} with a global batch of {batch_size}: need 0 <= rank < world_size <= batch_size")
        if workers < 0 or start < 0 or timeout < 0 or shuffle < 1:
            raise ValueError("workers, start and timeout must be at least 0, shuffle at least 1")
        self.sources = _sources(sources)
        if positions is not None and len(positions) != len(self.sources):
            raise ValueError(f"positions has {len(positions)} numbers for {len(self.sources)} sources; one for each is needed")
        self.read = 0
        self.skips: set[tuple[str, int]] = set()  # the names of millions of bad samples would take gigabytes
        self.on_skip = on_skip or _warn
        self.indices = [Index(expand(source.shards), self._skip) for source in self.sources]
        self.batch_size, self.seed, self.workers, self.start, self.shuffle = batch_size, seed, workers, start, shuffle
        slices = [_slice(batch_size, number, world_size) for number in range(world_size)]
        self.slice, self.sizes_of_ranks = slices[rank], tuple(high - low for low, high in slices)
        self.stage_at, self.positions = stage_at, positions
        self.pin_memory, self.timeout = pin_memory, timeout
        read = [(index.paths, source.fields or fields) for index, source in zip(self.indices, self.sources, strict=True)]
        self._loader = Loader(read, max_pixels, cache_bytes=(cache_mb << 20) // max(1, workers))

    @property
    def skipped(self) -> Counter[str]:
        """Number of bad samples by reason, met so far by this rank."""
        return Counter(reason for reason, _ in self.skips)

    def met(self) -> int:
        """Samples that this rank knows more of than their number: whose headers were read, or which were read (each time they were)."""
        return max(self.read, sum(index.scanned for index in self.indices))

    def sizes(self) -> list[int]:
        """Usable samples of each source by the headers of all shards, which are read for it (half a minute for a million samples)."""
        return [sum(index.count(number) for number in range(len(index.paths))) for index in self.indices]

    def __iter__(self) -> Generator[Batch, None, None]:
        for flat in self._read():
            self.read += len(flat)
            for reason, name in flat.skips:
                self._skip(reason, name)
            yield flat.batch(self.sizes_of_ranks, self.slice[0])

    def _read(self) -> Iterator[Flat]:
        if self.workers == 0:
            return map(self._load, self._requests())
        return from_workers(self._loader, self._requests(), self.workers, self._loader.guard, pin_memory=self.pin_memory,
                            timeout=self.timeout)

    def _load(self, request: Request) -> Flat:
        flat = self._loader[request]
        return flat.pin_memory() if self.pin_memory else flat

    def _requests(self) -> Iterator[Request]:
        low, high = self.slice
        orders = [Order(index, _seed(self.seed, number), self.shuffle) for number, index in enumerate(self.indices)]
        checked: set[int] = set()
        positions = self._positions()
        step = self.start
        while True:
            stage = self._stage(step)
            source = self._source(step, stage)
            if source not in checked:
                orders[source].require(self.batch_size)
                checked.add(source)
            picks = orders[source].take(positions[source] + low, high - low)
            positions[source] += self.batch_size
            yield Request(step, stage, source, picks, tuple(positions))
            step += 1

    def _positions(self) -> list[int]:
        if self.positions is not None:
            return list(self.positions)
        if len(self.sources) == 1:
            return [self.start * self.batch_size]
        taken = Counter(self._source(step, self._stage(step)) for step in range(self.start))
        return [taken[number] * self.batch_size for number in range(len(self.sources))]

    def _stage(self, step: int) -> Stage:
        return self.stage_at if isinstance(self.stage_at, Stage) else self.stage_at(step)

    def _source(self, step: int, stage: Stage) -> int:
        """The source of a batch: a pure function of its number, the seed and the weights."""
        weights = [source.weight for source in self.sources] if stage.weights is None else stage.weights
        if len(weights) != len(self.sources) or min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"weights are {list(weights)} for {len(self.sources)} sources; each has one, none is negative, one is "
                             "positive")
        word = mix(np.array([self.seed], dtype=np.int64).astype(np.uint64) ^ np.uint64(MIXTURE), np.array([step]))[0]
        shares = np.cumsum(weights) / sum(weights)
        shares[np.flatnonzero(weights)[-1]:] = 1.0  # whatever the sum was rounded to
        return int(np.searchsorted(shares, float(word >> np.uint64(11)) / (1 << 53), side="right"))

    def _skip(self, reason: str, name: str) -> None:
        known = reason, int.from_bytes(hashlib.blake2b(name.encode("utf-8", "backslashreplace"), digest_size=8).digest(), "big")
        if known not in self.skips:
            self.skips.add(known)
            self.on_skip(reason, name)


def _sources(given: Source | Sequence[Source] | Shards) -> list[Source]:
    if isinstance(given, Source):
        return [given]
    if not isinstance(given, str) and isinstance(given, Sequence) and any(isinstance(one, Source) for one in given):
        return [one if isinstance(one, Source) else Source(one) for one in given]
    return [Source(given)]  # type: ignore[arg-type]  # what is no source is a list of shards


def _seed(seed: int, source: int) -> int:
    """Each source has an order of its own; the first has the seed itself."""
    return seed if source == 0 else int(mix(np.array([seed], dtype=np.int64), np.array([source]))[0] >> np.uint64(1))


def _slice(batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Bounds of a rank's part of the batch: the first batch_size % world_size ranks get one more."""
    size, extra = divmod(batch_size, world_size)
    low = rank * size + min(rank, extra)
    return low, low + size + (rank < extra)


def _warn(reason: str, name: str) -> None:
    log.warning("skipped, %s: %s", reason, name)
