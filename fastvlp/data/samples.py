"""One sample of a shard: its picture, captions and class; what cannot be used says why."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlp.data.images import MAX_IMAGE, MAX_PIXELS, Unusable, decode
from fastvlp.data.shards import Index, Shards, expand, printable
from fastvlp.data.tar import BrokenTar
from fastvlp.data.unpack import open_shard

if TYPE_CHECKING:
    from PIL import Image

MAX_TEXT, MAX_ARRAY = 1 << 20, 1 << 24  # bytes
REASONS = NOT_UTF8, EMPTY = "caption is not UTF-8", "caption is empty"  # the nearest first
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
        return f"{printable(self.index.paths[shard])}: {self.index.shard(shard).keys[member]}"

    def labels(self, shard: int, member: int) -> Labels:
        """Captions and class of one sample. Raises Unusable."""
        places = self.index.shard(shard).members[member]
        sizes = places[1:, 1]
        text, metadata = (self._read(shard, place) if place[1] <= MAX_TEXT else None for place in places[1:])
        try:
            return parse(text, metadata)
        except Unusable as error:
            if sizes.max() > MAX_TEXT:
                raise Unusable("caption file is too large") from error
            raise

    def image(self, shard: int, member: int, wanted: int | None = None) -> Image.Image:
        """RGB picture of one sample, ``wanted`` as in ``decode``. Raises Unusable."""
        return decode(self.picture(shard, member), self.max_pixels, wanted)

    def picture(self, shard: int, member: int) -> bytes:
        """The picture file of one sample. Raises Unusable."""
        place = self.index.shard(shard).members[member][0]
        if place[1] > MAX_IMAGE:  # before it is read
            raise Unusable("image file is too large")
        return self._read(shard, place) or b""

    def values(self, shard: int, member: int) -> dict[str, Any]:
        """The JSON object of one sample; empty where there is none. Raises Unusable."""
        place = self.index.shard(shard).members[member][2]
        if place[1] > MAX_TEXT:
            raise Unusable("json file is too large")
        values, problem = _object(self._read(shard, place))
        if problem is not None:
            raise Unusable(problem)
        return values

    def npy(self, shard: int, member: int, name: str) -> bytes | None:
        """The member NAME.npy of one sample, or None. Raises Unusable."""
        place = self.index.shard(shard).array(member, name)
        if place is None:
            return None
        if place[1] > MAX_ARRAY:
            raise Unusable(f"{name}.npy is too large")
        return self._read(shard, place)

    def _read(self, shard: int, place: np.ndarray) -> bytes | None:
        offset, size = int(place[0]), int(place[1])
        if size < 0:
            return None
        try:
            data = os.pread(self._file(shard), size, offset)
        except (OSError, BrokenTar) as error:
            raise Unusable("shard cannot be read") from error
        if len(data) < size:
            raise Unusable("shard cannot be read")
        return data

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            file, stamp = open_shard(self.index.paths[shard])
            if stamp != self.index.shard(shard).stamp:
                os.close(file)
                raise Unusable("shard was replaced while it was read")
            self._files[shard] = file
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

    Captions are the list "captions" of the JSON, or else the text, or else the string "caption" of the JSON: the first of these that
    holds one. Captions in a list that are empty or no text are left out.

    Raises:
        Unusable: none of them holds a caption; says what came nearest (text that is not UTF-8, empty, JSON that is broken).
    """
    fields, problem = _object(metadata)
    listed = fields.get("captions")
    reasons = []
    for source in (listed if isinstance(listed, list) else [], [text], [fields.get("caption")]):
        kept, reason = _captions(source)
        if kept:
            name = fields.get("class")
            name = name.strip() if isinstance(name, str) and name.strip() and _is_text(name) else None
            digest = hashlib.blake2b((name or kept[0]).lower().encode(), digest_size=8).digest()
            return Labels(kept, name, int.from_bytes(digest, "big") >> 1)
        reasons.append(reason)
    raise Unusable(next((reason for reason in REASONS if reason in reasons), problem or "no caption"))


def _object(metadata: bytes | None) -> tuple[dict[str, Any], str | None]:
    """The fields of a JSON object, none if it is another value; and what is wrong if it is no JSON."""
    if metadata is None:
        return {}, None
    try:
        fields = json.loads(metadata)
    except (ValueError, RecursionError):
        return {}, "json is broken"
    return (fields if isinstance(fields, dict) else {}), None


def _captions(source: list[Any]) -> tuple[tuple[str, ...], str | None]:
    """The captions among some values, and why there are none."""
    strings, reason = [], None
    for value in source:
        if isinstance(value, bytes):
            try:
                value = value.decode("utf-8-sig")
            except UnicodeDecodeError:
                return (), NOT_UTF8
        if isinstance(value, str):
            strings.append(value.strip())
            reason = reason or EMPTY
    kept = tuple(string for string in strings if string and _is_text(string))
    return kept, NOT_UTF8 if any(strings) else reason


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
