"""Numbers that stand beside a picture: cached features and labels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastvlp.data.batch import Stage
from fastvlp.data.fields.field import UNIFORM, Field, Record
from fastvlp.data.images import Unusable
from fastvlp.data.patches import mix


@dataclass(frozen=True)
class Vector(Field):
    """A list of numbers of the sample's JSON, or else its member ``KEY.npy``, such as features of a frozen teacher: float32 [n, width].

    ``width``: how many numbers there must be; samples with another number are bad ones. None: as many in all.
    """

    key: str
    width: int | None = None

    def check(self, sample: Record, stage: Stage) -> None:
        self._vector(sample)

    def __call__(self, samples: Sequence[Record], words: np.ndarray, stage: Stage) -> Tensor:
        vectors = [self._vector(sample) for sample in samples]
        for sample, vector in zip(samples, vectors, strict=True):
            if len(vector) != len(vectors[0]):
                raise ValueError(f"Vector: {self.key!r} has {len(vector)} numbers in {sample.key} and {len(vectors[0])} in "
                                 f"{samples[0].key}; give width=, and samples with another number are skipped")
        return torch.from_numpy(np.stack(vectors))

    def _vector(self, sample: Record) -> np.ndarray:
        """float32 [width]. Raises Unusable."""
        given = sample.values.get(self.key)
        if given is None:
            given = _array(sample.npy(self.key), self.key)
        try:
            vector = np.asarray(given, dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise Unusable(f"{self.key} is no list of numbers") from error
        if vector.ndim != 1 or (self.width is not None and len(vector) != self.width):
            raise Unusable(f"{self.key} has the shape {vector.shape}")
        # A single one would make NaN of the loss of the whole batch.
        if not np.isfinite(vector).all():
            raise Unusable(f"{self.key} is not finite")
        return vector


@dataclass(frozen=True)
class Label(Field):
    """An integer of the sample's JSON, or the place in ``names`` of a string: int64 [n]."""

    key: str = "class"
    names: tuple[str, ...] = ()

    def check(self, sample: Record, stage: Stage) -> None:
        self._label(sample)

    def __call__(self, samples: Sequence[Record], words: np.ndarray, stage: Stage) -> Tensor:
        return torch.tensor([self._label(sample) for sample in samples], dtype=torch.int64)

    def _label(self, sample: Record) -> int:
        value = sample.values.get(self.key)
        if isinstance(value, str) and value in self.names:
            return self.names.index(value)
        # Beyond int64 torch would raise for the whole batch and not for this sample.
        if isinstance(value, int) and not self.names and -(1 << 63) <= value < 1 << 63:
            return int(value)
        raise Unusable(f"{self.key} is none of the {len(self.names)} names" if self.names else f"{self.key} is no whole number")


@dataclass(frozen=True)
class Uniform(Field):
    """A random number of each sample in [0, 1): float64 [n], of which a system makes its own draws (a mask, the length of a prefix).

    ``salt``: fields with other salts draw other numbers.
    """

    salt: int = 0

    def __post_init__(self) -> None:
        if self.salt < 0:
            raise ValueError(f"Uniform: salt is {self.salt}; it is 0 or more")

    def __call__(self, samples: Sequence[Record], words: np.ndarray, stage: Stage) -> Tensor:
        drawn = mix(mix(words, np.array([UNIFORM])), np.array([self.salt]))
        # As many bits as float64 holds exactly, so that 1 is never reached.
        return torch.from_numpy((drawn >> np.uint64(11)).astype(np.float64) / (1 << 53))


def _array(data: bytes | None, key: str) -> np.ndarray:
    """The array of a .npy file: of numbers, as large as the file, since NumPy would take memory for whatever the header says."""
    if data is None:
        raise Unusable(f"no {key}")
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(file)
        if kind.hasobject:
            raise ValueError("holds Python objects")
        return np.frombuffer(data, kind, offset=file.tell()).reshape(shape)
    except Exception as error:  # hostile headers raise almost anything
        raise Unusable(f"{key}.npy is broken") from error
