"""WebDataset shards: where the samples lie inside a tar, by its headers alone."""

from __future__ import annotations

import itertools
import os
import sys
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from fastvlp.data import remote
from fastvlp.data.headers import Unusable
from fastvlp.data.images import MAX_IMAGE
from fastvlp.data.labels import MAX_TEXT, Labels, json_object, parse
from fastvlp.data.sources import index_files
from fastvlp.data.sources.piece import IMAGES, REPLACED, UNOPENED, UNREAD, Opened, class_names, printable
from fastvlp.data.tar import BrokenTar, Member, tar_members
from fastvlp.data.unpack import GZIP, ZSTD, Stamp, open_shard

TEXTS = ("txt", "json", "cls")
PACKED = GZIP, ZSTD
MAX_ARRAY = 1 << 24  # bytes
MOST_NAMES = 1 << 8  # of arrays beside the pictures
MOST_SAMPLES, MOST_PROBLEMS, LONGEST_NAME = 1 << 19, 1 << 14, 1 << 10  # of one shard; usual ones hold 10,000 samples


@dataclass(frozen=True)
class Shard:
    """Where the samples of one shard lie.

    Attributes:
        path: of the shard. keys: names of the n samples, in the order of the file, fit to be shown (see ``printable``).
        members: int64 [n, 4, 2], for (image, txt, json, cls) the offset and the size in bytes; size -1: not there.
        problems: (reason, name) of what could not be used.
        arrays: for each NAME of members NAME.npy, int64 [m, 3], number of the sample, offset and size, samples rising.
        stamp: size and time of change of the file, (-1, 0) where it could not be opened.
        classes: names of the classes that .cls members number (clip_benchmark's classnames.txt beside the shard, or a folder higher).
    """

    path: str
    keys: list[str]
    members: np.ndarray
    problems: list[tuple[str, str]]
    stamp: Stamp = (-1, 0)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    classes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        tables = self.members.nbytes + sum(sys.getsizeof(name) + 200 + rows.nbytes for name, rows in self.arrays.items())
        return sum(map(sys.getsizeof, self.keys)) + tables + sum(sys.getsizeof(name) + 100 for _, name in self.problems)

    def array(self, member: int, name: str) -> np.ndarray | None:
        """Offset and size of a sample's member NAME.npy (in any case), or None."""
        rows = self.arrays.get(name.lower())
        if rows is None:
            return None
        at = int(np.searchsorted(rows[:, 0], member))
        return rows[at, 1:] if at < len(rows) and rows[at, 0] == member else None


    def open(self) -> Opened:
        """Raises OSError, BrokenTar, Unusable: it is not the file that was scanned."""
        file, stamp = _open(self.path)
        if stamp != self.stamp:
            file.close()
            raise Unusable(REPLACED)
        return _Tar(self, file)


def _open(path: str) -> tuple[BinaryIO, Stamp]:
    if remote.is_address(path):
        there = remote.File(path)
        if there.start.startswith(PACKED):
            raise BrokenTar("shard is packed, which is read from local files alone")
        return cast(BinaryIO, there), there.stamp
    descriptor, stamp = open_shard(path)
    return open(descriptor, "rb"), stamp


class _Tar(Opened):
    def __init__(self, shard: Shard, file: BinaryIO) -> None:
        self.shard, self.file = shard, file

    def labels(self, member: int) -> Labels:
        places = self.shard.members[member][1:]
        text, metadata, number = (self._read(place) if place[1] <= MAX_TEXT else None for place in places)
        try:
            return parse(text, metadata, number, self.shard.classes)
        except Unusable as error:
            if places[:, 1].max() > MAX_TEXT:
                raise Unusable("caption file is too large") from error
            raise

    def picture(self, member: int) -> bytes:
        place = self.shard.members[member][0]
        if place[1] > MAX_IMAGE:  # before it is read
            raise Unusable("image file is too large")
        return self._read(place) or b""

    def values(self, member: int) -> dict[str, Any]:
        place = self.shard.members[member][2]
        if place[1] > MAX_TEXT:
            raise Unusable("json file is too large")
        return json_object(self._read(place))

    def npy(self, member: int, name: str) -> bytes | None:
        place = self.shard.array(member, name)
        if place is None:
            return None
        if place[1] > MAX_ARRAY:
            raise Unusable(f"{name}.npy is too large")
        return self._read(place)

    def _read(self, place: np.ndarray) -> bytes | None:
        offset, size = int(place[0]), int(place[1])
        if size < 0:
            return None
        if isinstance(self.file, remote.File):
            data = self.file.pread(size, offset)
        else:
            # pread moves no position, which processes that inherit this file would share.
            data = os.pread(self.file.fileno(), size, offset)
        if len(data) < size:
            raise Unusable(UNREAD)
        return data

    def close(self) -> None:
        self.file.close()


class _Samples:
    """Collects the members of a shard, in the order of the file, into samples."""

    def __init__(self, path: str) -> None:
        self.path, self.keys, self.places = printable(path), list[str](), array("q")
        self.problems: list[tuple[str, str]] = []
        self.stem: str | None = None  # name up to the first dot
        self._plain: dict[str, Member] = {}  # members of this stem with one extension
        self._dotted: list[tuple[str, str, Member]] = []  # (key, extension, member) of those with several
        self.arrays: dict[str, array[int]] = {}  # by name, (number of the sample, offset, size) of each
        self._arrays = 0
        self._npy: dict[str, Member] = {}  # those of this stem

    def add(self, member: Member) -> None:
        folder, _, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot:
            return
        this = f"{folder}/{stem}" if folder else stem
        extension = extension.lower()
        if len(this) + len(extension) > LONGEST_NAME:
            self.problem("name is too long", this[:80])
            return
        if this != self.stem or extension in self._plain:  # a key may come twice, as in the shipped data
            self.close()
            self.stem = this
        if "." in extension:
            middle, _, last = extension.rpartition(".")
            if last in IMAGES or last in TEXTS:
                self._dotted.append((f"{this}.{base[len(stem) + 1:len(stem) + 1 + len(middle)]}", last, member))
            elif last == "npy" and not member.refused:
                self._npy[middle] = member
        elif extension in IMAGES or extension in TEXTS:
            self._plain[extension] = member
        if len(self.keys) + len(self._dotted) + len(self._npy) > MOST_SAMPLES:
            raise BrokenTar("shard has too many samples")

    def close(self) -> None:
        """Finish the samples of this stem: one of all extensions ("a.jpg", "a.seg.png", "a.txt"), as WebDataset has it, or, where none
        is a picture or a caption ("a.b.jpg", "a.b.txt"), one for each name up to the last dot."""
        plain, dotted, stem = self._plain, self._dotted, self.stem
        self._plain, self._dotted, self.stem = {}, [], None
        npy, self._npy = self._npy, {}
        if stem is not None and (plain or not dotted):
            self._sample(stem, plain, npy)
            return
        parts: dict[str, Member] = {}
        arrays: dict[str, dict[str, Member]] = {}  # of "b", which is the sample a.b, those that are called a.b.NAME.npy
        for name, member in npy.items():
            of, _, short = name.rpartition(".")
            arrays.setdefault(of, {})[short] = member
        for (key, extension, member), after in itertools.zip_longest(dotted, dotted[1:]):
            parts[extension] = member
            if after is None or after[0] != key or after[1] in parts:
                self._sample(key, parts, arrays.get(key[len(stem or "") + 1:].lower(), {}))
                parts = {}

    def _sample(self, key: str, parts: dict[str, Member], arrays: dict[str, Member]) -> None:
        image = next((parts[extension] for extension in IMAGES if extension in parts), None)
        captions = [parts.get(extension) for extension in TEXTS]  # or a class, which is one
        refused = next((part.refused for part in (image, *captions) if part is not None and part.refused), None)
        if refused is not None:
            self.problem(refused, key)
        elif image is None:
            self.problem("no image", key)
        elif not any(captions):
            self.problem("no caption", key)
        else:
            self.keys.append(printable(key))
            for part in (image, *captions):
                self.places.extend((0, -1) if part is None else (part.offset, part.size))
            for name, part in arrays.items():
                self.arrays.setdefault(name, array("q")).extend((len(self.keys) - 1, part.offset, part.size))
            self._arrays += len(arrays)
            if self._arrays > MOST_SAMPLES or len(self.arrays) > MOST_NAMES:
                raise BrokenTar("shard has too many arrays")

    def problem(self, reason: str, key: str) -> None:
        self.problems.append((reason, f"{self.path}: {printable(key)}"))
        if len(self.problems) == MOST_PROBLEMS:
            raise BrokenTar("shard has too many broken samples")


def scan(path: str, index: bool = True) -> Shard:
    """Find the samples of a shard from its headers alone, without reading pictures; what is broken is left out and named.

    Args:
        index: take what an index beside it says, where there is one.

    Raises:
        ImportError: it is packed with zstd, or at an address, and what reads it is not installed.
    """
    found, stamp, problem = _Samples(path), (-1, 0), None
    try:
        file, stamp = _open(path)
        with file:
            known = index_files.find(path, stamp[0], lambda: _head(file)) if index else None
            if known is not None:
                return Shard(path, stamp=stamp, classes=_classes(path, known["members"]), **known)
            try:
                file.seek(0)
                for member in tar_members(file):
                    found.add(member)
                found.close()
            except BrokenTar as error:
                found.problems.append((str(error), f"{found.path}: after {printable(found.stem)}" if found.stem else found.path))
                # What came before the break is still good.
                found.close()
            shard = _listed(path, found, stamp)
            if index and remote.is_address(path):
                index_files.keep(path, stamp[0], index_files.dump(shard, index_files.head_of(_head(file))))
            return shard
    except OSError as error:
        problem = UNOPENED, f"{found.path}: {error.strerror or error}"
    except BrokenTar as error:
        problem = str(error), found.path
    found.problems.append(problem)
    return _listed(path, found, stamp)


def _listed(path: str, found: _Samples, stamp: Stamp) -> Shard:
    arrays = {name: np.array(rows, dtype=np.int64).reshape(-1, 3) for name, rows in found.arrays.items()}
    members = np.array(found.places, dtype=np.int64).reshape(-1, 1 + len(TEXTS), 2)
    return Shard(path, found.keys, members, found.problems, stamp, arrays, _classes(path, members))


def _classes(path: str, members: np.ndarray) -> tuple[str, ...]:
    return class_names(os.path.dirname(path) or os.curdir) if (members[:, 3, 1] >= 0).any() else ()


def _head(file: BinaryIO) -> bytes:
    if isinstance(file, remote.File):
        return file.start
    file.seek(0)
    return file.read(remote.START)


def write_index(path: str) -> tuple[Shard, bool]:
    """Write the index beside a shard, unless one that fits lies there; returns the shard, and whether it was written.

    Raises:
        OSError: it cannot be written, or the shard cannot be opened. BrokenTar: the shard is packed.
    """
    file, stamp = _open(path)
    with file:
        head = _head(file)
        if not remote.is_address(path) and os.fstat(file.fileno()).st_size != stamp[0]:
            raise BrokenTar("shard is packed, and its unpacked copy needs no index")
    # By the headers, never by an index that lies there: it may be the wrong one, which this replaces.
    shard = scan(path, index=False)
    data = index_files.dump(shard, index_files.head_of(head))
    target = path + index_files.ENDING
    if index_files.read(target) == data:
        return shard, False
    if remote.is_address(path):
        remote.write(target, data)
    else:
        partial = Path(f"{target}.partial")
        try:
            partial.write_bytes(data)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return shard, True
