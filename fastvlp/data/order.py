"""The order of samples: a pure function of (seed, epoch, position), from which any rank or restarted run takes its slice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastvlp.data.patches import mix
from fastvlp.data.shards import Index

OTHER = 2  # which of a place's random words draws another sample


@dataclass(frozen=True)
class Picks:
    """n consecutive places of the stream.

    Attributes:
        shard, member: int64 [n], number of the shard and of the sample in it. seeds: uint64 [n], randomness of the place.
        other: int64 [n, 2], shard and member of another sample of the same window, each of them as likely (the sample itself where it
            is alone).
    """

    shard: np.ndarray
    member: np.ndarray
    seeds: np.ndarray
    other: np.ndarray


class Order:
    """Epoch after epoch without a gap, each usable sample once per epoch.

    In each epoch the shards are put in random order and collected into windows of at least ``shuffle`` samples; each window is
    permuted as a whole. A set that fits one window is permuted perfectly; a larger one needs only the headers of the shards up to the
    place that is read, and reads few files at a time.
    """

    def __init__(self, index: Index, seed: int, shuffle: int) -> None:
        self.index, self.seed, self.shuffle = index, seed, shuffle
        self._rewind()

    def take(self, first: int, n: int) -> Picks:
        """The places first, ..., first + n - 1, counted from the start of training.

        Raises:
            RuntimeError: there is no usable sample in any shard.
        """
        if first < self._begin:
            self._rewind()
        pieces: list[Picks] = []
        while n > 0:
            while first >= self._begin + self._size:
                self._advance()
            low = first - self._begin
            high = min(low + n, self._size)
            shard, member = self._permuted()
            place = np.arange(first, first + high - low) - self._epoch_begin
            seeds = mix(np.repeat(self._word(), high - low), place)
            ahead = mix(seeds, np.array([OTHER])) % np.uint64(max(1, self._size - 1)) + np.uint64(1)
            other = (np.arange(low, high) + ahead.astype(np.int64)) % self._size
            pieces.append(Picks(shard[low:high], member[low:high], seeds, np.stack([shard[other], member[other]], 1)))
            first, n = first + high - low, n - (high - low)
        return Picks(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("shard", "member", "seeds", "other")))

    def require(self, n: int) -> None:
        """Refuse a set of fewer than n samples, of which a batch of n would hold some twice; headers are read up to the nth sample.

        Raises:
            RuntimeError: there is no usable sample in any shard. ValueError: there are fewer than n.
        """
        found = 0
        for number in range(len(self.index.paths)):
            found += self.index.count(number)
            if found >= n:
                return
        if found == 0:
            raise RuntimeError(self._nothing())
        others = len(self.index.paths) - 1
        held = f"holds {found}" if not others else f"and {others} other{'s' * (others > 1)} hold {found}"
        raise ValueError(f"a batch of {n} is larger than its data: {self.index.paths[0]} {held} usable samples, and one that "
                         f"comes twice is its own negative; lower the batch size to at most {found}")

    def _rewind(self) -> None:
        self._epoch, self._epoch_begin = -1, 0
        self._begin = self._size = 0
        self._window: list[int] = []
        self._waiting: list[int] = []
        self._table: tuple[np.ndarray, np.ndarray] | None = None

    def _advance(self) -> None:
        self._begin += self._size
        self._size, self._window, self._table = 0, [], None
        if not self._waiting:
            if self._epoch >= 0 and self._begin == self._epoch_begin:
                raise RuntimeError(self._nothing())
            self._epoch += 1
            self._epoch_begin = self._begin
            count = len(self.index.paths)
            self._waiting = mix(np.repeat(self._word(), count), np.arange(-count, 0)).argsort(kind="stable").tolist()
        while self._waiting and self._size < self.shuffle:
            self._window.append(self._waiting.pop())
            self._size += self.index.count(self._window[-1])

    def _permuted(self) -> tuple[np.ndarray, np.ndarray]:
        if self._table is None:
            counts = [self.index.count(number) for number in self._window]
            shard = np.repeat(np.array(self._window, dtype=np.int64), counts)
            member = np.concatenate([np.arange(count) for count in counts])
            place = np.arange(self._size) + (self._begin - self._epoch_begin)
            words = mix(np.repeat(self._word() ^ np.uint64(0x5DEECE66D), self._size), place)
            permutation = words.argsort(kind="stable")
            self._table = shard[permutation], member[permutation]
        return self._table

    def _nothing(self) -> str:
        return f"none of the {len(self.index.paths)} shards holds a usable sample (an image and a caption of one name)"

    def _word(self) -> np.uint64:
        """Randomness of the epoch."""
        return mix(np.array([self.seed], dtype=np.int64), np.array([self._epoch]))[0]
