"""Pictures of many sizes in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastvlp.data.batch import Stage
from fastvlp.data.fields.field import KEPT, SIDE, Record
from fastvlp.data.fields.image import Image
from fastvlp.data.patches import mix
from fastvlp_kernels.packed import Packed


@dataclass(frozen=True)
class Resolutions(Image):
    """``Image`` with a size and a share of kept patches of its own for each picture (NaViT, https://arxiv.org/abs/2307.06304).

    The longest side is drawn uniformly from ``smallest``, ``smallest`` + patch, ... up to the size that ``Image`` would have, the share
    uniformly from ``least`` to the ``keep`` that it would have. ``prepare`` gives what ``Image`` gives.
    """

    smallest: int = 32
    least: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smallest < 1 or not 0 < self.least <= 1 or self.views != 1:
            raise ValueError(f"Resolutions: smallest is {self.smallest}, least is {self.least} and views is {self.views}; at least 1 "
                             "pixel, a share above 0 and at most 1, and one view are needed")

    def __call__(self, samples: Sequence[Record], words: np.ndarray, stage: Stage) -> Packed:
        size, patch, keep, _ = self.at(stage)
        steps = max(0, size - self.smallest) // patch + 1
        sides = np.minimum(size, self.smallest + patch * (_uniform(words, SIDE) * steps).astype(np.int64))
        pictures = [sample.picture(side, patch) for sample, side in zip(samples, sides.tolist(), strict=True)]
        # A stage may keep less than ``least``; the range then is a single number.
        least = min(self.least, keep)
        return self.pack(pictures, words, stage, least + (keep - least) * _uniform(words, KEPT))


def _uniform(words: np.ndarray, which: int) -> np.ndarray:
    """A number from 0 to below 1 of each random word."""
    return (mix(words, np.array([which])) >> np.uint64(11)).astype(np.float64) / (1 << 53)
