"""What a batch holds of each sample: small frozen objects, one for each stream, that turn samples into tensors where they are read."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastvlp.data.batch import Batch, Stage
from fastvlp.data.images import as_pixels, augment, augmentations, decode
from fastvlp.data.patches import mix, pack_pixels, pack_texts
from fastvlp_kernels.packed import Packed

if TYPE_CHECKING:
    from fastvlp.data.tokenizer import Tokenizer

# Which of a sample's random words is used for what; 2 draws another sample, augmentation takes 100 to 108, substitutes from 1000 on.
CAPTION, MASK, SHEAR, OTHER, VIEW = 1, 3, 4, 5, 200

Self = TypeVar("Self", bound="Field")


class Record(Protocol):
    """One sample, as a field may ask it; each question may raise ``Unusable``.

    Attributes:
        key: its name. captions: at least one. values: what its JSON holds. other: another sample, the same for all who ask.
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
        raise NotImplementedError

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
class Image(Field):
    """Patches of the picture: ``Packed`` uint8 [T, P*P*3] with pos (0, row, column); ``views`` segments a sample.

    All ``Image`` fields of a recipe with as many views show the same, up to strength: the kept patches of one are patches of the other.

    Args:
        size: longest side in pixels. keep: fraction of patches, drawn at random. augment: strength of crop, shift and colour changes.
            None: the stage's, else the part's ``image_size``, 1.0 and 0.0.
        patch: side of a patch; None: the part's ``patch_size``.
        views: that many pictures of each sample, augmented each in its own way.
        part: of the system, such as ``image`` or ``teacher.image``.
    """

    size: int | None = None
    patch: int | None = None
    keep: float | None = None
    augment: float | None = None
    views: int = 1
    part: str = "image"
    _size: int | None = field(default=None, init=False, repr=False)  # the part's

    def __post_init__(self) -> None:
        Stage(image_size=self.size, keep=self.keep, augment=self.augment)  # refuses what is out of range
        if self.views < 1 or (self.patch is not None and self.patch < 1):
            raise ValueError(f"Image: views is {self.views} and patch is {self.patch}; both are at least 1")

    def bind(self, model: Any, tokenizer: Any) -> Image:
        patch = self.patch or _of_part(self, model, "patch_size", "patch")
        return _with(replace(self, patch=patch), _size=self.size or _of_part(self, model, "image_size", "size"))

    def at(self, stage: Stage) -> tuple[int, int, float, float]:
        """(size, patch, keep, augment) in a stage."""
        size = self.size or stage.image_size or self._size
        if size is None or self.patch is None:
            raise ValueError(f"Image: size is {size} and patch is {self.patch}; give both, or bind the field to a system")
        keep = self.keep if self.keep is not None else stage.keep if stage.keep is not None else 1.0
        strength = self.augment if self.augment is not None else stage.augment if stage.augment is not None else 0.0
        return size, self.patch, keep, strength

    def check(self, sample: Record, stage: Stage) -> None:
        sample.picture(*self.at(stage)[:2])

    def __call__(self, samples: Sequence[Record], words: np.ndarray, stage: Stage) -> Packed:
        size, patch, keep, strength = self.at(stage)
        pictures = [sample.picture(size, patch) for sample in samples]
        if self.views > 1:
            pictures = [picture for picture in pictures for _ in range(self.views)]
            words = mix(np.repeat(words, self.views), np.tile(np.arange(self.views), len(words)) + VIEW)
        if strength > 0:
            place, colour = augmentations(words, strength)
            pictures = [augment(*each) for each in zip(pictures, place.tolist(), colour.tolist(), strict=True)]
        return pack_pixels(pictures, patch, keep, words >> np.uint64(1))

    def prepare(self, raw: Sequence[Any]) -> Packed:
        """All patches of PIL images, uint8 arrays or tensors [h, w, 3], float tensors [3, h, w] in 0..1, or paths of pictures."""
        size, patch, _, _ = self.at(Stage())
        images = [decode(Path(image).read_bytes()) if isinstance(image, (str, os.PathLike)) else image for image in raw]
        return pack_pixels([as_pixels(image, size, patch).numpy() for image in images], patch)


@dataclass(frozen=True)
class Caption(Field):
    """Token ids of a caption: ``Packed`` int64 [T] with pos (index, -1, -1); one segment a sample, or ``pick`` of them.

    All ``Caption`` fields of a recipe show the same captions of a sample, so those that differ in nothing but ``mask`` have the same tokens
    where they are not masked.

    Args:
        length: most tokens; None: the part's ``context_length``, else the tokenizer's.
        pick: "one" at random, or a number of captions, none twice while there are enough.
        mask: share of the words that is hidden, at least one (all tokens of a word, where the tokenizer knows words).
        shear: keep a stretch of that many words, at a random place (block masking of CLIPA, Li et al. 2023).
        max_captions: use only the first so many captions of a sample.
        part: of the system. mask_id: the token that stands for a hidden one, which no caption has.
    """

    length: int | None = None
    pick: Literal["one"] | int = "one"
    mask: float = 0.0
    shear: int | None = None
    max_captions: int | None = None
    part: str = "text"
    mask_id: int | None = None
    _tokenizer: Any = field(default=None, init=False, repr=False)  # a Tokenizer

    def __post_init__(self) -> None:
        if self.pick != "one" and not (isinstance(self.pick, int) and self.pick >= 1):
            raise ValueError(f'Caption: pick is {self.pick!r}; "one" or a number of captions is allowed')
        if not 0 <= self.mask <= 1:
            raise ValueError(f"Caption: mask is {self.mask}; it is a share of the words, from 0 to 1")
        if any(value is not None and value < 1 for value in (self.length, self.shear, self.max_captions)):
            raise ValueError(f"Caption: length {self.length}, shear {self.shear} and max_captions {self.max_captions} are at least 1")

    def bind(self, model: Any, tokenizer: Any) -> Caption:
        if tokenizer is None:
            raise ValueError("Caption: the recipe has no tokenizer; give it one, such as tokenizer='mini'")
        length = self.length or _of_part(self, model, "context_length", "length", tokenizer.context_length)
        if self.mask and self.mask_id is None:
            raise ValueError(f"Caption: mask is {self.mask} without a mask_id; give an id that captions do not use (the tokenizer's are "
                             f"0 to {tokenizer.vocab_size - 1})")
        part = _part(self.part, model)
        for name, value, most in (("length", length, getattr(part, "context_length", None)),
                                  ("the tokenizer's vocabulary", tokenizer.vocab_size, getattr(part, "vocab_size", None)),
                                  ("mask_id + 1", (self.mask_id or 0) + 1, getattr(part, "vocab_size", None))):
            if most is not None and value > most:
                raise ValueError(f"Caption: {name} is {value} and the part {self.part!r} was made for {most}; raise that, or lower this")
        return _with(replace(self, length=length), _tokenizer=tokenizer)

    def check(self, sample: Record, stage: Stage) -> None:
        sample.captions  # noqa: B018  # reads them

    def __call__(self, samples: Sequence[Record], words: np.ndarray, stage: Stage) -> Packed:
        texts = self.texts(samples, words)
        ids = [self._encode(text) for text in texts]
        if self.mask:
            seeds = self._words(words, MASK)
            ids = [self._masked(text, tokens, seed) for text, tokens, seed in zip(texts, ids, seeds, strict=True)]
        return pack_texts([torch.tensor(tokens) for tokens in ids])

    def texts(self, samples: Sequence[Record], words: np.ndarray) -> list[str]:
        """The captions that are shown, ``pick`` of each sample."""
        chosen: list[str] = []
        draws = (self._words(words, CAPTION) >> np.uint64(1)).reshape(len(words), -1).tolist()
        for sample, numbers in zip(samples, draws, strict=True):
            captions = sample.captions[:self.max_captions]
            rest: list[str] = []
            for number in numbers:
                rest = rest or list(captions)
                chosen.append(rest.pop(number % len(rest)))
        if self.shear is None:
            return chosen
        return [_sheared(text, self.shear, int(word)) for text, word in zip(chosen, self._words(words, SHEAR), strict=True)]

    def _words(self, words: np.ndarray, which: int) -> np.ndarray:
        """A random word for each caption of each sample; those of the first do not depend on how many there are."""
        each = 1 if self.pick == "one" else self.pick
        first = mix(words, np.array([which]))
        return first if each == 1 else np.stack([first, *(mix(first, np.array([number])) for number in range(1, each))], 1).reshape(-1)

    def prepare(self, raw: Sequence[str]) -> Packed:
        """All tokens of some strings."""
        if isinstance(raw, str):
            raise TypeError("Caption: got one string; pass a list of strings")
        return pack_texts([torch.tensor(self._encode(text)) for text in raw])

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise ValueError("Caption: no tokenizer yet; bind the field to a system and a tokenizer")
        return self._tokenizer.encode(text, self.length)

    def _masked(self, text: str, tokens: list[int], seed: np.uint64) -> list[int]:
        """``tokens`` with a share of the words hidden: those with the smallest scores, as patches are kept."""
        tokenizer = self._tokenizer
        assert tokenizer is not None and self.mask_id is not None  # bind saw to them
        first, body = len(tokenizer.start), len(tokenizer.encode(text, self.length)) - len(tokenizer.start) - len(tokenizer.end)
        word_of = np.array(_word_of_tokens(tokenizer, text)[:body])
        if not len(word_of):  # an empty caption
            return tokens
        count = int(word_of.max()) + 1
        hidden = mix(np.repeat(seed, count), np.arange(count)).argsort(kind="stable")[:max(1, int(count * self.mask + 0.5))]
        masked = np.array(tokens)
        masked[first:first + body][np.isin(word_of, hidden)] = self.mask_id
        return masked.tolist()


@dataclass(frozen=True)
class Other(Field):
    """A field of another sample, drawn at random: negatives for matching. All ``Other`` fields of a recipe ask the same one.

    The other sample shows something else (has another id), where there is one.
    """

    field: Field

    def bind(self, model: Any, tokenizer: Any) -> Other:
        return Other(self.field.bind(model, tokenizer))

    def check(self, sample: Record, stage: Stage) -> None:
        self.field.check(sample.other, stage)

    def __call__(self, samples: Sequence[Record], words: np.ndarray, stage: Stage) -> Tensor | Packed:
        return self.field([sample.other for sample in samples], mix(words, np.array([OTHER])), stage)

    def prepare(self, raw: Sequence[Any]) -> Tensor | Packed:
        return self.field.prepare(raw)


def _with(one: Self, **values: Any) -> Self:
    """A copy of a frozen field with what its constructor does not take."""
    other = copy.copy(one)
    for name, value in values.items():
        object.__setattr__(other, name, value)
    return other


def _part(path: str, model: Any) -> Any:
    for name in path.split("."):
        model = getattr(model, name, None)
    return model


def _of_part(one: Image | Caption, model: Any, attribute: str, argument: str, default: Any = None) -> Any:
    """What a part of the system says, or the default. Raises ValueError where there is neither."""
    part = _part(one.part, model)
    value = getattr(part, attribute, None)
    if value is None and default is None:
        kind = type(one).__name__
        if part is None:
            known = ", ".join(name for name, _ in model.named_children()) if hasattr(model, "named_children") else "none"
            raise ValueError(f"{kind}: {argument} is open and the system has no part {one.part!r} (it has {known}); "
                             f"give {argument}= or part=")
        raise ValueError(f"{kind}: {argument} is open and the part {one.part!r} has no {attribute}; give {argument}=")
    return default if value is None else value


def _sheared(text: str, keep: int, word: int) -> str:
    words = text.split()
    first = word % max(1, len(words) - keep + 1)
    return " ".join(words[first:first + keep])


def _word_of_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """The number of the word that each token of a caption belongs to, without start and end."""
    encoding = tokenizer.core.encode(text, add_special_tokens=False)
    words = [word for word in encoding.word_ids if word is not None]
    return words if len(words) == len(encoding.ids) else list(range(len(encoding.ids)))
