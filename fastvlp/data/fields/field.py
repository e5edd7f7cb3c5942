"""What a batch holds of each sample: small frozen objects, one for each stream, that turn samples into tensors where they are read."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from fastvlp.data.batch import Batch, Stage
from fastvlp.data.patches import mix
from fastvlp_kernels.packed import Packed

# Which of a sample's random words is used for what; augmentation takes 100 to 108. With 2, the order draws another sample, and from 1000
# on, the loader draws substitutes.
CAPTION, MASK, SHEAR, OTHER, MOTION, UNIFORM, KEPT, SIDE, VIEW = 1, 3, 4, 5, 6, 7, 8, 9, 200

Self = TypeVar("Self", bound="Field")


class Record(Protocol):
    """One sample, as a field may ask it; each question may raise ``Unusable``.

    Attributes:
        key: its name. captions: at least one. values: what its JSON holds, an empty one if there is none. other: another sample, the same
            for all who ask.
    """

    key: str

    @property
    def captions(self) -> Sequence[str]: ...

    @property
    def values(self) -> Mapping[str, Any]: ...

    @property
    def other(self) -> Record: ...

    def picture(self, size: int, patch: int) -> np.ndarray:
        """uint8 [h, w, 3], not to be written to: the longest side is ``size``, both are multiples of ``patch``."""

    def frames(self, size: int, patch: int) -> Sequence[np.ndarray]:
        """All pictures of an animation, at most 256 and none where the picture does not move; each as ``picture`` would give it."""

    def npy(self, name: str) -> bytes | None:
        """The contents of its member NAME.npy, or None."""


class Field:
    """A stream of a batch: a pure function of samples, their random words and the stage, which runs in the worker."""

    def bind(self: Self, model: Any, tokenizer: Any) -> Self:
        """This field with what was left open filled from a system and a tokenizer.

        Raises:
            ValueError: what is needed is neither said nor there; says its name.
        """
        return self

    def check(self, sample: Record, stage: Stage) -> None:
        """Read what is needed of a sample. Raises Unusable, and then another sample takes its place."""

    def __call__(self, samples: Sequence[Record], words: np.ndarray, stage: Stage) -> Tensor | Packed:
        """The stream of n samples that passed ``check``: [n, ...], or ``Packed`` with as many segments for each.

        Args:
            words: uint64 [n], a random word of each sample; all fields get the same.
        """
        raise NotImplementedError(f"{type(self).__name__} has no __call__; a field says how its stream is made of samples")

    def prepare(self, raw: Sequence[Any]) -> Tensor | Packed:
        """The stream of what someone has in hand (pictures, strings), for evaluation: nothing random, nothing left out."""
        raise NotImplementedError(f"{type(self).__name__} reads samples; it cannot be prepared by hand")


def bind(fields: Mapping[str, Field], model: Any, tokenizer: Any) -> dict[str, Field]:
    """All fields of a recipe, bound to its system and tokenizer.

    Raises:
        ValueError: a stream's name is not free, or a field needs what the system lacks.
    """
    bound = {}
    for name, one in fields.items():
        if not name.isidentifier() or hasattr(Batch, name) or name in Batch.__dataclass_fields__:
            raise ValueError(f"a stream cannot be called {name!r}: that is no name, or means something else in a batch; choose another")
        try:
            bound[name] = one.bind(model, tokenizer)
        except ValueError as error:
            raise ValueError(f"stream {name!r}: {error}") from error
    return bound


@dataclass(frozen=True)
class Other(Field):
    """A field of another sample, drawn at random: negatives for matching. All ``Other`` fields of a recipe ask the same one.

    The other sample shows something else (has another id), where there is one.
    """

    field: Field

    def __post_init__(self) -> None:
        if isinstance(self.field, Other):
            raise ValueError("Other: the field is an Other itself; there is one other sample, so ask it directly")

    def bind(self, model: Any, tokenizer: Any) -> Other:
        return Other(self.field.bind(model, tokenizer))

    def check(self, sample: Record, stage: Stage) -> None:
        self.field.check(sample.other, stage)

    def __call__(self, samples: Sequence[Record], words: np.ndarray, stage: Stage) -> Tensor | Packed:
        # Words of its own, or the other sample would be augmented exactly as the first one.
        return self.field([sample.other for sample in samples], mix(words, np.array([OTHER])), stage)

    def prepare(self, raw: Sequence[Any]) -> Tensor | Packed:
        return self.field.prepare(raw)


def with_bound(one: Self, **values: Any) -> Self:
    """A copy of a frozen field with what its constructor does not take."""
    other = copy.copy(one)
    for name, value in values.items():
        # dataclasses.replace cannot set fields that the constructor does not take.
        object.__setattr__(other, name, value)
    return other


def part_of(path: str, model: Any) -> Any:
    for name in path.split("."):
        model = getattr(model, name, None)
    return model


def of_part(one: Field, path: str, model: Any, attribute: str, argument: str, default: Any = None) -> Any:
    """What a part of the system says, or the default. Raises ValueError where there is neither."""
    part = part_of(path, model)
    value = getattr(part, attribute, None)
    if value is None and default is None:
        kind = type(one).__name__
        if part is None:
            known = ", ".join(name for name, _ in model.named_children()) if hasattr(model, "named_children") else "none"
            raise ValueError(f"{kind}: {argument} is open and the system has no part {path!r} (it has {known}); "
                             f"give {argument}= or part=")
        raise ValueError(f"{kind}: {argument} is open and the part {path!r} has no {attribute}; give {argument}=")
    return default if value is None else value
