"""One sample of a source: its picture, captions and class; what cannot be used says why."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fastvlp.data.images import MAX_PIXELS, Unusable, decode
from fastvlp.data.labels import Labels as Labels
from fastvlp.data.shards import Index, Shards, expand, printable
from fastvlp.data.sources.piece import UNREAD, Opened
from fastvlp.data.tar import BrokenTar

if TYPE_CHECKING:
    from PIL import Image

OPEN_FILES = 64

T = TypeVar("T")


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
        self._files: OrderedDict[int, Opened] = OrderedDict()

    def name(self, shard: int, member: int) -> str:
        """Shard file and key, for messages."""
        return f"{printable(self.index.paths[shard])}: {self.index.shard(shard).keys[member]}"

    def labels(self, shard: int, member: int) -> Labels:
        """Captions and class of one sample. Raises Unusable."""
        return self._read(shard, lambda opened: opened.labels(member))

    def image(self, shard: int, member: int, wanted: int | None = None) -> Image.Image:
        """RGB picture of one sample, ``wanted`` as in ``decode``. Raises Unusable."""
        return decode(self.picture(shard, member), self.max_pixels, wanted)

    def picture(self, shard: int, member: int) -> bytes:
        """The picture file of one sample. Raises Unusable."""
        return self._read(shard, lambda opened: opened.picture(member))

    def values(self, shard: int, member: int) -> dict[str, Any]:
        """The JSON object, or the other columns, of one sample; empty where there is none. Raises Unusable."""
        return self._read(shard, lambda opened: opened.values(member))

    def npy(self, shard: int, member: int, name: str) -> bytes | None:
        """The member NAME.npy of one sample, or None. Raises Unusable."""
        return self._read(shard, lambda opened: opened.npy(member, name))

    def _read(self, shard: int, read: Callable[[Opened], T]) -> T:
        try:
            return read(self._open(shard))
        except (OSError, BrokenTar) as error:
            raise Unusable(UNREAD) from error

    def _open(self, shard: int) -> Opened:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            self._files[shard] = self.index.shard(shard).open()
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        return self._files[shard]

    def close(self) -> None:
        """Close all files; they are opened again when needed."""
        while self._files:
            self._files.popitem()[1].close()

    def __del__(self) -> None:
        self.close()


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
