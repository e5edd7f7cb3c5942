"""The endless stream of batches that training reads."""

from __future__ import annotations

import logging
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvlp.data.batch import Batch, Stage
from fastvlp.data.images import MAX_PIXELS, Unusable, augment, augmentations, fit
from fastvlp.data.order import Order, Picks
from fastvlp.data.patches import mix
from fastvlp.data.samples import Labels, Reader, Skips
from fastvlp.data.shards import Index, Shards, expand
from fastvlp.data.tokenizer import Tokenizer

NEAR, TRIES = 16, 256
CAPTION, SUBSTITUTE = 1, 1000  # which of a place's random words is used for what; augmentation takes 100 to 108

log = logging.getLogger(__name__)


class Stream:
    """Image-text batches for ever, from batch number ``start``; iterating again begins at ``start`` again.

    Batch k is a pure function of (shards, seed, k): the global order is that of ``Order`` (every usable sample once per epoch, epochs
    without a gap), and a place's caption, augmentation and patch dropout come from its own random word. So a run that is started at k
    sees exactly what an uninterrupted one would have seen, with any number of workers, and W ranks see the slices (by the rule of
    ``torch.tensor_split``) of the batches that one rank would see.

    Samples without a usable header entry are no places at all. A sample that turns out unusable when it is read keeps its place, which
    is filled by another sample chosen by the place's random word: from the same shard, and after 16 bad ones from any shard. After 256
    bad ones in a row the stream ends with an error.

    Args:
        shards: see ``expand``: paths, folders, globs, brace ranges, mini:train, or a list of these.
        tokenizer: turns captions into ids.
        batch_size: pairs in the global batch.
        patch_size: both sides of every picture are multiples of it.
        context_length: longest caption in tokens.
        stage_at: the Stage of each batch number, or one Stage for all.
        workers: processes that read ahead; 0 reads in this one.
        rank, world_size: this process gets slice ``rank`` of ``world_size``.
        cache_mb: memory for decoded, scaled pictures, divided among the workers; when it is full, the rest are decoded each time.
        shuffle: size of the windows that are permuted as a whole, in samples.
        max_captions: use only the first so many captions of a sample.
        on_skip: hears (reason, "shard: key") of each bad sample once; without it they go to the log as warnings.

    Attributes:
        skipped: number of bad samples by reason, met so far (by this rank).
        index: the shards' index; ``samples_per_epoch`` reads all of it.

    Raises:
        FileNotFoundError: the shard list matches nothing.
        RuntimeError: no usable sample (while iterating).
    """

    def __init__(self, shards: Shards, tokenizer: Tokenizer, batch_size: int, patch_size: int, context_length: int, seed: int,
                 stage_at: Stage | Callable[[int], Stage], workers: int = 0, rank: int = 0, world_size: int = 1,
                 start: int = 0, *, cache_mb: int = 512, shuffle: int = 1 << 15, max_pixels: int = MAX_PIXELS,
                 max_captions: int | None = None, on_skip: Callable[[str, str], None] | None = None) -> None:
        if not 0 <= rank < world_size <= batch_size:
            raise ValueError(f"rank {rank} of {world_size} with a global batch of {batch_size}: need 0 <= rank < world_size <= batch_size")
        if workers < 0 or start < 0 or patch_size < 1 or shuffle < 1 or (max_captions is not None and max_captions < 1):
            raise ValueError("workers and start must be at least 0; patch_size, shuffle and max_captions at least 1")
        self._skips = Skips(on_skip or _warn)
        self.index = Index(expand(shards), self._skips)
        self.batch_size, self.seed, self.workers, self.start, self.shuffle = batch_size, seed, workers, start, shuffle
        self.slice = _slice(batch_size, rank, world_size)
        self.stage_at = stage_at
        self._loader = _Loader(self.index.paths, tokenizer, patch_size, context_length, max_pixels, max_captions,
                               cache_bytes=(cache_mb << 20) // max(1, workers))

    @property
    def skipped(self) -> Counter[str]:
        return self._skips.counts

    def samples_per_epoch(self) -> int:
        """Usable samples by the headers of all shards, which are read for it (about half a minute for a million samples)."""
        return sum(self.index.count(number) for number in range(len(self.index.paths)))

    def __iter__(self) -> Iterator[Batch]:
        requests = self._requests()
        loaded: Iterable[_Flat] = map(self._loader.__getitem__, requests)
        if self.workers > 0:
            loaded = DataLoader(self._loader, batch_size=None, sampler=requests, num_workers=self.workers, collate_fn=_as_is,
                                worker_init_fn=_quiet)
        for flat in loaded:
            for reason, name in flat.skips:
                self._skips(reason, name)
            yield flat.batch()

    def _requests(self) -> Iterator[_Request]:
        order = Order(self.index, self.seed, self.shuffle)
        low, high = self.slice
        index = self.start
        while True:
            stage = self.stage_at if isinstance(self.stage_at, Stage) else self.stage_at(index)
            yield _Request(index, stage, order.take(index * self.batch_size + low, high - low))
            index += 1


@dataclass(frozen=True)
class _Request:
    index: int
    stage: Stage
    picks: Picks


@dataclass(frozen=True)
class _Flat:
    """A batch in few tensors, as it travels between processes."""

    pixels: Tensor
    sizes: list[tuple[int, int]]
    tokens: Tensor
    lengths: list[int]
    ids: Tensor
    keys: list[str]
    index: int
    seeds: Tensor
    skips: list[tuple[str, str]]

    def batch(self) -> Batch:
        parts = self.pixels.split([height * width * 3 for height, width in self.sizes])
        images = [part.view(height, width, 3) for part, (height, width) in zip(parts, self.sizes, strict=True)]
        return Batch(images, list(self.tokens.split(self.lengths)), self.ids, self.keys, self.index, self.seeds)


class _Loader(Dataset[_Flat]):
    """Reads the samples of a request; lives in a worker or in the training process."""

    def __init__(self, paths: list[str], tokenizer: Tokenizer, patch_size: int, context_length: int, max_pixels: int,
                 max_captions: int | None, cache_bytes: int) -> None:
        self.tokenizer, self.patch_size, self.context_length, self.max_captions = tokenizer, patch_size, context_length, max_captions
        self.skips: list[tuple[str, str]] = []
        self.reader = Reader(Index(paths, self._skip), max_pixels)
        self.room = cache_bytes
        self.cache: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
        self.labels: dict[tuple[int, int], Labels] = {}
        self.bad: set[tuple[int, int]] = set()

    def __getitem__(self, request: _Request) -> _Flat:
        picks, stage = request.picks, request.stage
        places = list(zip(picks.shard.tolist(), picks.member.tolist(), strict=True))
        found = [self._find(*place, seed, stage.image_size) for place, seed in zip(places, picks.seeds, strict=True)]
        images = [image for _, image, _ in found]
        if stage.augment > 0:
            place, colour = augmentations(picks.seeds, stage.augment)
            images = [augment(*each) for each in zip(images, place.tolist(), colour.tolist(), strict=True)]
        choice = (mix(picks.seeds, np.full(len(found), CAPTION)) >> np.uint64(1)).tolist()
        texts = []
        for (_, _, labels), word in zip(found, choice, strict=True):
            captions = labels.captions[:self.max_captions]
            texts.append(self.tokenizer.encode(captions[word % len(captions)], self.context_length))
        skips, self.skips[:] = list(self.skips), []
        return _Flat(
            pixels=torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])),
            sizes=[image.shape[:2] for image in images],
            tokens=torch.tensor([token for text in texts for token in text], dtype=torch.int64),
            lengths=[len(text) for text in texts],
            ids=torch.tensor([labels.id for _, _, labels in found], dtype=torch.int64),
            keys=[key for key, _, _ in found],
            index=request.index,
            seeds=torch.from_numpy((picks.seeds >> np.uint64(1)).astype(np.int64)),
            skips=skips,
        )

    def _find(self, shard: int, member: int, seed: np.uint64, size: int) -> tuple[str, np.ndarray, Labels]:
        """(key, picture, labels) of a place: its own sample, or the first usable substitute."""
        index = self.reader.index
        for attempt in range(TRIES):
            if attempt:
                a, b = mix(np.repeat(seed, 2), np.array([2 * attempt, 2 * attempt + 1]) + SUBSTITUTE)
                shard = shard if attempt <= NEAR else int(a % np.uint64(len(index.paths)))
                if index.count(shard) == 0:
                    continue
                member = int(b % np.uint64(index.count(shard)))
            if (shard, member) in self.bad:
                continue
            try:
                return index.shard(shard).keys[member], *self._load(shard, member, size)
            except Unusable as reason:
                self.bad.add((shard, member))
                self._skip(str(reason), self.reader.name(shard, member))
        reasons = ", ".join(f"{reason} ({count})" for reason, count in Counter(reason for reason, _ in self.skips).most_common())
        raise RuntimeError(f"{TRIES} samples in a row could not be used, the last in {index.paths[shard]}: {reasons or 'all bad before'}")

    def _load(self, shard: int, member: int, size: int) -> tuple[np.ndarray, Labels]:
        place = shard, member
        labels = self.labels.get(place) or self.reader.labels(shard, member)
        cached = self.cache.get(place)
        if cached is not None and cached[0] == size:
            return cached[1], labels
        image = fit(self.reader.image(shard, member, wanted=size), size, self.patch_size)
        room = self.room + (cached[1].nbytes if cached is not None else 0) - image.nbytes
        if cached is None:
            room -= 1024  # labels, key, bookkeeping
        if room >= 0:
            self.room = room
            self.cache[place] = size, image
            self.labels[place] = labels
        return image, labels

    def _skip(self, reason: str, name: str) -> None:
        self.skips.append((reason, name))


def _slice(batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Bounds of a rank's part of the batch: the first batch_size % world_size ranks get one more."""
    size, extra = divmod(batch_size, world_size)
    low = rank * size + min(rank, extra)
    return low, low + size + (rank < extra)


def _warn(reason: str, name: str) -> None:
    log.warning("skipped, %s: %s", reason, name)


def _as_is(flat: Any) -> Any:
    return flat


def _quiet(worker: int) -> None:
    """Ctrl-C is for the training process, which stops the workers when it has written its checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
