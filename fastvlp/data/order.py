"""The order of samples: a pure function of (seed, epoch, position), from which any rank or restarted run takes its slice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastvlp.data.patches import mix
from fastvlp.data.shards import Index


@dataclass(frozen=True)
class Picks:
    """n consecutive places of the stream: int64 [n] number of the shard and of the sample in it, uint64 [n] randomness of the place."""

    shard: np.ndarray
    member: np.ndarray
    seeds: np.ndarray


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
            pieces.append(Picks(shard[low:high], member[low:high], mix(np.repeat(self._word(), high - low), place)))
            first, n = first + high - low, n - (high - low)
        return Picks(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("shard", "member", "seeds")))

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
                raise RuntimeError(f"none of the {len(self.index.paths)} shards holds a usable sample (an image and a caption of one name)")
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

    def _word(self) -> np.uint64:
        """Randomness of the epoch."""
        return mix(np.array([self.seed], dtype=np.int64), np.array([self._epoch]))[0]
