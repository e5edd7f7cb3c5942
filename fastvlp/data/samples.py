"""One sample of a shard: its picture, captions and class; what cannot be used says why."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlp.data.images import MAX_PIXELS, Unusable, decode
from fastvlp.data.shards import Index, Shards, expand

if TYPE_CHECKING:
    from PIL import Image

MAX_TEXT, MAX_IMAGE = 1 << 20, 1 << 28  # bytes
OPEN_FILES = 64


@dataclass(frozen=True)
class Labels:
    """What is written about a picture: its captions (at least one), its class or None, and a stable non-negative hash of the class,
    or of the first caption where there is no class."""

    captions: tuple[str, ...]
    name: str | None
    id: int


@dataclass(frozen=True)
class Sample:
    """A decoded sample."""

    key: str
    image: Image.Image
    labels: Labels


class Reader:
    """Reads samples by shard number and place; keeps a bounded number of files open."""

    def __init__(self, index: Index, max_pixels: int = MAX_PIXELS) -> None:
        self.index, self.max_pixels = index, max_pixels
        self._files: OrderedDict[int, int] = OrderedDict()

    def name(self, shard: int, member: int) -> str:
        """Shard file and key, for messages."""
        return f"{self.index.paths[shard]}: {self.index.shard(shard).keys[member]}"

    def labels(self, shard: int, member: int) -> Labels:
        """Captions and class of one sample. Raises Unusable."""
        members = self.index.shard(shard).members[member]
        return parse(self._read(shard, members[1], MAX_TEXT, "caption"), self._read(shard, members[2], MAX_TEXT, "caption"))

    def image(self, shard: int, member: int, wanted: int | None = None) -> Image.Image:
        """RGB picture of one sample, ``wanted`` as in ``decode``. Raises Unusable."""
        data = self._read(shard, self.index.shard(shard).members[member][0], MAX_IMAGE, "image")
        return decode(data or b"", self.max_pixels, wanted)

    def _read(self, shard: int, place: np.ndarray, limit: int, what: str) -> bytes | None:
        offset, size = int(place[0]), int(place[1])
        if size < 0:
            return None
        if size > limit:
            raise Unusable(f"{what} file is too large")
        try:
            data = os.pread(self._file(shard), size, offset)
        except OSError as error:
            raise Unusable("shard cannot be read") from error
        if len(data) < size:
            raise Unusable("shard cannot be read")
        return data

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            self._files[shard] = os.open(self.index.paths[shard], os.O_RDONLY)
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        return self._files[shard]

    def close(self) -> None:
        """Close all files; they are opened again when needed."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()


def parse(text: bytes | None, metadata: bytes | None) -> Labels:
    """Labels from the contents of .txt and .json.

    Captions are the list "captions" of the JSON, or else the text, or else the string "caption" of the JSON. Empty captions in a list
    are left out.

    Raises:
        Unusable: broken JSON, text that is not UTF-8, or no caption that is not empty.
    """
    fields: dict[str, Any] = {}
    if metadata is not None:
        try:
            fields = json.loads(metadata)
        except (ValueError, RecursionError) as error:
            raise Unusable("json is broken") from error
        if not isinstance(fields, dict):
            raise Unusable("json is broken")
    captions = fields.get("captions")
    if not (isinstance(captions, list) and captions):
        if text is not None:
            try:
                captions = [text.decode("utf-8-sig")]
            except UnicodeDecodeError as error:
                raise Unusable("caption is not UTF-8") from error
        else:
            captions = [fields.get("caption")]
    strings = [caption.strip() for caption in captions if isinstance(caption, str)]
    if not strings:
        raise Unusable("no caption")
    filled = [caption for caption in strings if caption]
    if not filled:
        raise Unusable("caption is empty")
    kept = tuple(caption for caption in filled if _is_text(caption))
    if not kept:
        raise Unusable("caption is not UTF-8")
    name = fields.get("class")
    name = name.strip() if isinstance(name, str) and name.strip() and _is_text(name) else None
    digest = hashlib.blake2b((name or kept[0]).lower().encode(), digest_size=8).digest()
    return Labels(kept, name, int.from_bytes(digest, "big") >> 1)


def _is_text(caption: str) -> bool:
    """Neither NULs (UTF-16 read as UTF-8) nor lone surrogates (broken escapes in JSON)."""
    try:
        return b"\0" not in caption.encode("utf-8")
    except UnicodeEncodeError:
        return False


def samples(shards: Shards, max_pixels: int = MAX_PIXELS, on_skip: Callable[[str, str], None] | None = None) -> Iterator[Sample]:
    """All usable samples in the order of the files; ``on_skip(reason, "shard: key")`` hears of each of the others.

    Raises:
        FileNotFoundError: the shard list matches nothing.
    """
    index, places = _all(shards, on_skip)
    reader = Reader(index, max_pixels)
    for shard, member in places:
        try:
            labels = reader.labels(shard, member)
            image = reader.image(shard, member)
        except Unusable as reason:
            if on_skip is not None:
                on_skip(str(reason), reader.name(shard, member))
            continue
        yield Sample(index.shard(shard).keys[member], image, labels)


def captions(shards: Shards, on_skip: Callable[[str, str], None] | None = None) -> Iterator[str]:
    """All captions of all samples; pictures are not read."""
    index, places = _all(shards, on_skip)
    reader = Reader(index)
    for shard, member in places:
        try:
            yield from reader.labels(shard, member).captions
        except Unusable as reason:
            if on_skip is not None:
                on_skip(str(reason), reader.name(shard, member))


def _all(shards: Shards, on_skip: Callable[[str, str], None] | None) -> tuple[Index, Iterator[tuple[int, int]]]:
    index = Index(expand(shards), on_skip or _ignore)
    return index, ((shard, member) for shard in range(len(index.paths)) for member in range(index.count(shard)))


def _ignore(reason: str, name: str) -> None:
    pass


class Skips:
    """Counts skipped samples by reason, each sample once, and passes on their names."""

    def __init__(self, on_skip: Callable[[str, str], None] | None) -> None:
        self.counts: Counter[str] = Counter()
        self._on_skip = on_skip
        self._known: set[tuple[str, str]] = set()

    def __call__(self, reason: str, name: str) -> None:
        if (reason, name) not in self._known:
            self._known.add((reason, name))
            self.counts[reason] += 1
            if self._on_skip is not None:
                self._on_skip(reason, name)
