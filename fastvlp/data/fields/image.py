"""Pictures as patches: of the sample, of its frames, of a rendered caption; and boxes in them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from fastvlp.data.batch import Stage
from fastvlp.data.fields.caption import Caption
from fastvlp.data.fields.field import MOTION, VIEW, Field, Record, of_part, with_bound
from fastvlp.data.images import Unusable, as_pixels, augment, augmentations, decode
from fastvlp.data.patches import mix, pack_pixels
from fastvlp_kernels.packed import Packed

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

SMALLEST = 0.5  # the smallest window of a pan or zoom, as a fraction of the sides

Self = TypeVar("Self", bound="Pictures")


class Pictures(Field):
    """What fields of pictures have in common: where their settings come from, and what becomes of pixels.

    Attributes:
        size: longest side in pixels, rounded to whole patches. keep: fraction of patches, drawn at random. augment: strength of crop, shift
            and colour changes. None: the stage's, else the part's ``image_size``, 1.0 and 0.0.
        patch: side of a patch; None: the part's ``patch_size``.
        part: of the system, such as ``image`` or ``teacher.image``.
    """

    size: int | None
    patch: int | None
    keep: float | None
    augment: float | None
    part: str
    _size: int | None  # the part's

    def __post_init__(self) -> None:
        Stage(image_size=self.size, keep=self.keep, augment=self.augment)  # refuses what is out of range
        if self.patch is not None and self.patch < 1:
            raise ValueError(f"{type(self).__name__}: patch is {self.patch}; it is at least 1 pixel")

    def bind(self: Self, model: Any, tokenizer: Any) -> Self:
        patch = self.patch or of_part(self, self.part, model, "patch_size", "patch")
        size = self.size or of_part(self, self.part, model, "image_size", "size")
        return with_bound(replace(self, patch=patch), _size=size)  # type: ignore[type-var]  # every subclass is a dataclass

    def at(self, stage: Stage) -> tuple[int, int, float, float]:
        """(size, patch, keep, augment) in a stage."""
        size = self.size or stage.image_size or self._size
        if size is None or self.patch is None:
            raise ValueError(f"{type(self).__name__}: size is {size} and patch is {self.patch}; give both, or bind the field to a system")
        return size, self.patch, _first(self.keep, stage.keep, 1.0), _first(self.augment, stage.augment, 0.0)

    def pack(self, pictures: list[np.ndarray], words: np.ndarray, stage: Stage, shares: np.ndarray | None = None) -> Packed:
        """Pictures, changed and cut, each by its own random word [len(pictures)]; ``shares``: of patches kept, where each has its own."""
        _, patch, keep, strength = self.at(stage)
        if strength > 0:
            place, colour = augmentations(words, strength)
            pictures = [augment(*each) for each in zip(pictures, place.tolist(), colour.tolist(), strict=True)]
        return pack_pixels(pictures, patch, keep if shares is None else shares, words >> np.uint64(1))

    def prepare(self, raw: Sequence[Any]) -> Packed:
        """All patches of PIL images, uint8 arrays or tensors [h, w, 3], float tensors [3, h, w] in 0..1, or paths of pictures."""
        size, patch, _, _ = self.at(Stage())
        images = [decode(Path(image).read_bytes()) if isinstance(image, (str, os.PathLike)) else image for image in raw]
        return pack_pixels([as_pixels(image, size, patch).numpy() for image in images], patch)


@dataclass(frozen=True)
class Image(Pictures):
    """Patches of the picture: ``Packed`` uint8 [T, P*P*3] with pos (0, row, column); ``views`` segments a sample.

    All ``Image`` fields of a recipe with as many views show the same, up to strength: the kept patches of one are patches of the other.
    ``views``: that many pictures of each sample, augmented each in its own way. The rest: see ``Pictures``.
    """

    size: int | None = None
    patch: int | None = None
    keep: float | None = None
    augment: float | None = None
    views: int = 1
    part: str = "image"
    _size: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views < 1:
            raise ValueError(f"Image: views is {self.views}; it is at least 1")

    def check(self, sample: Record, stage: Stage) -> None:
        sample.picture(*self.at(stage)[:2])

    def __call__(self, samples: Sequence[Record], words: np.ndarray, stage: Stage) -> Packed:
        size, patch, _, _ = self.at(stage)
        pictures = [sample.picture(size, patch) for sample in samples for _ in range(self.views)]
        if self.views > 1:
            # Each view draws its own crop and its own patches.
            words = mix(np.repeat(words, self.views), np.tile(np.arange(self.views), len(words)) + VIEW)
        return self.pack(pictures, words, stage)


@dataclass(frozen=True)
class Frames(Pictures):
    """Patches of ``count`` frames, one segment each: ``Packed`` uint8 [T, P*P*3] with pos (frame, row, column).

    Of an animated picture, every ``stride``-th frame from a random one on (the last again where it ends too soon). A still picture is seen
    through a window that moves and grows from one random place to another. A clip is augmented as one; each frame keeps its own patches.
    """

    count: int = 8
    stride: int = 1
    size: int | None = None
    patch: int | None = None
    keep: float | None = None
    augment: float | None = None
    part: str = "image"
    _size: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1 or self.stride < 1:
            raise ValueError(f"Frames: count is {self.count} and stride is {self.stride}; both are at least 1")

    def check(self, sample: Record, stage: Stage) -> None:
        size, patch, _, _ = self.at(stage)
        if len(sample.frames(size, patch)) < 2:
            sample.picture(2 * size, 2 * patch)

    def __call__(self, samples: Sequence[Record], words: np.ndarray, stage: Stage) -> Packed:
        size, patch, keep, strength = self.at(stage)
        pictures: list[np.ndarray] = []
        for sample, word in zip(samples, words, strict=True):
            frames = sample.frames(size, patch)
            if len(frames) > 1:
                first = int(mix(word[None], np.array([MOTION]))[0]) % max(1, len(frames) - (self.count - 1) * self.stride)
                pictures += [frames[min(first + number * self.stride, len(frames) - 1)] for number in range(self.count)]
            else:
                pictures += _panned(sample.picture(2 * size, 2 * patch), word, self.count)
        if strength > 0:
            place, colour = (np.repeat(each, self.count, 0).tolist() for each in augmentations(words, strength))
            pictures = [augment(*each) for each in zip(pictures, place, colour, strict=True)]
        seeds = mix(np.repeat(words, self.count), np.tile(np.arange(self.count), len(words)) + VIEW)
        return _numbered(pack_pixels(pictures, patch, keep, seeds), self.count)

    def prepare(self, raw: Sequence[Sequence[Any]]) -> Packed:
        """All patches of clips, each a list of ``count`` pictures (see ``Pictures``)."""
        for number, clip in enumerate(raw):
            if len(clip) != self.count:
                raise ValueError(f"Frames: clip {number} has {len(clip)} pictures; {self.count} are needed")
        return _numbered(super().prepare([picture for clip in raw for picture in clip]), self.count)


@dataclass(frozen=True)
class Pages(Pictures):
    """Patches of a caption drawn on a page, black on white: ``Packed`` uint8 [T, P*P*3] with pos (0, row, column) (Pix2Struct, CLIPPO).

    A page is as wide as ``size`` and as high as its text needs, at most ``size``; what does not fit is cut.

    Args:
        height: of the letters in pixels. font: a font file; None: Pillow's own, which has Latin letters.
    """

    height: int = 14
    font: str | None = None
    size: int | None = None
    patch: int | None = None
    keep: float | None = None
    augment: float | None = None
    part: str = "image"
    _size: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.height < 4:
            raise ValueError(f"Pages: height is {self.height}; letters of at least 4 pixels can be read")

    def check(self, sample: Record, stage: Stage) -> None:
        sample.captions  # noqa: B018  # reads them

    def __call__(self, samples: Sequence[Record], words: np.ndarray, stage: Stage) -> Packed:
        size, patch, _, _ = self.at(stage)
        texts = Caption().texts(samples, words)
        return self.pack([self.draw(text, size, patch) for text in texts], words, stage)

    def prepare(self, raw: Sequence[str]) -> Packed:
        """All patches of some strings."""
        size, patch, _, _ = self.at(Stage())
        return pack_pixels([self.draw(text, size, patch) for text in raw], patch)

    def draw(self, text: str, size: int, patch: int) -> np.ndarray:
        """uint8 [h, w, 3]; both sides are multiples of ``patch``."""
        from PIL import Image as pil
        from PIL import ImageDraw

        font, side = _font(self.font, self.height), max(patch, size // patch * patch)
        # Two pixels of margin on either side.
        lines = list(islice(_lines(text, lambda part: font.getlength(part) <= side - 4), max(1, (side - 4) // (self.height * 5 // 4))))
        height = min(side, max(1, math.ceil((4 + len(lines) * (self.height * 5 // 4)) / patch)) * patch)
        page = pil.new("L", (side, height), 255)
        ImageDraw.Draw(page).multiline_text((2, 2), "\n".join(lines), fill=0, font=font, spacing=self.height // 4)
        return np.asarray(page.convert("RGB"))


@dataclass(frozen=True)
class Regions(Field):
    """Boxes of the sample's JSON: ``Packed`` float32 [T, 4], one segment a sample, empty where there is none.

    A box is (left, top, right, bottom) in fractions of the sides, from 0 to 1. The boxes lie in the picture as ``Image`` shows it: with the
    same ``augment`` (None: the stage's) they move along; what falls outside is cut, and a box that is gone is left out.
    """

    boxes: str = "boxes"
    augment: float | None = None

    def check(self, sample: Record, stage: Stage) -> None:
        self._boxes(sample)

    def __call__(self, samples: Sequence[Record], words: np.ndarray, stage: Stage) -> Packed:
        strength, found = _first(self.augment, stage.augment, 0.0), [self._boxes(sample) for sample in samples]
        if strength > 0:
            place, _ = augmentations(words, strength)
            found = [_moved(boxes, each) for boxes, each in zip(found, place, strict=True)]
        return Packed.of(torch.from_numpy(np.concatenate(found).astype(np.float32)), [len(boxes) for boxes in found])

    def _boxes(self, sample: Record) -> np.ndarray:
        """float64 [n, 4]. Raises Unusable."""
        try:
            boxes = np.array(sample.values.get(self.boxes, ()), dtype=np.float64).reshape(-1, 4)
        except (TypeError, ValueError) as error:
            raise Unusable(f"{self.boxes} are no boxes") from error
        if not ((boxes >= 0) & (boxes <= 1)).all() or not (boxes[:, :2] < boxes[:, 2:]).all():
            raise Unusable(f"{self.boxes} are not (left, top, right, bottom) in fractions of the sides")
        return boxes


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _numbered(packed: Packed, count: int) -> Packed:
    """Segment after segment is frame 0, 1, ..., count - 1."""
    assert packed.pos is not None  # pack_pixels gives places
    packed.pos[:, 0] = (torch.arange(len(packed)) % count).repeat_interleave(packed.lengths)
    return packed


def _panned(picture: np.ndarray, word: np.uint64, count: int) -> list[np.ndarray]:
    """``count`` pictures of half the sides: what a window shows that goes from one random place and size to another."""
    from PIL import Image as pil

    height, width = picture.shape[:2]
    u = (mix(np.repeat(word, 6), np.arange(6) + (MOTION << 32)) >> np.uint64(11)).astype(np.float64) / (1 << 53)
    side = SMALLEST + (1 - SMALLEST) * u[:2]
    places = np.stack([(1 - side) * u[2:4], (1 - side) * u[4:6], side], 1)  # left, top and side, at the start and at the end
    image, frames = pil.fromarray(picture), []
    for left, top, part in np.linspace(places[0], places[1], count):
        # Rounding may bring an edge past 1, which Pillow refuses.
        box = (left * width, top * height, min(left + part, 1.0) * width, min(top + part, 1.0) * height)
        frames.append(np.asarray(image.resize((width // 2, height // 2), pil.Resampling.BILINEAR, box=box)))
    return frames


def _moved(boxes: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Boxes where an augmented picture shows them: input = scale * output + shift, for x and y."""
    scale, shift = place[[0, 2, 0, 2]], place[[1, 3, 1, 3]]
    moved = ((boxes - shift) / scale).clip(0, 1)
    return moved[(moved[:, :2] < moved[:, 2:]).all(1)]


def _lines(text: str, fits: Any) -> Iterator[str]:
    """Words on lines that fit; a word that is too long for a line is cut into pieces."""
    line = ""
    for word in text.split():
        if line and fits(f"{line} {word}"):
            line = f"{line} {word}"
            continue
        if line:
            yield line
        while not fits(word) and len(word) > 1:
            # At least one letter, or a page narrower than that would never end.
            at = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or fits(word[:n]))
            yield word[:at]
            word = word[at:]
        line = word
    if line:
        yield line


@lru_cache(maxsize=8)
def _font(path: str | None, height: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.truetype(path, height) if path else ImageFont.load_default(height)
