"""Wrong captions on purpose."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fastvlp.data.batch import Stage
from fastvlp.data.fields.field import Other, Record
from fastvlp_kernels.packed import Packed


@dataclass(frozen=True)
class Noisy(Other):
    """A field of the sample, except that a ``share`` of all samples show another sample's: always the same ones, by a hash of their names,
    and each time another one's.
    """

    share: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ValueError(f"Noisy: share is {self.share}; it is a share of the samples, from 0 to 1")

    def bind(self, model: Any, tokenizer: Any) -> Noisy:
        return Noisy(self.field.bind(model, tokenizer), self.share)

    def check(self, sample: Record, stage: Stage) -> None:
        self.field.check(self._shown(sample), stage)

    def __call__(self, samples: Sequence[Record], words: np.ndarray, stage: Stage) -> Tensor | Packed:
        return self.field([self._shown(sample) for sample in samples], words, stage)

    def _shown(self, sample: Record) -> Record:
        # By name and not by draw: a wrong caption is wrong in every epoch, as on the web.
        number = int.from_bytes(hashlib.blake2b(sample.key.encode(), digest_size=8).digest(), "big")
        return sample.other if number < self.share * 2**64 else sample
