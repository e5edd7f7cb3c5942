"""What all sources of samples have in common: some samples that are listed together (a tar, a table, a folder), and how they are read."""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from fastvlp.data import remote
from fastvlp.data.headers import Unusable
from fastvlp.data.images import MAX_IMAGE
from fastvlp.data.labels import Labels
from fastvlp.data.unpack import Stamp

IMAGES = ("jpg", "png", "jpeg", "webp", "gif", "avif", "tif", "tiff", "bmp", "jfif")
UNOPENED, UNREAD, REPLACED = "shard cannot be opened", "shard cannot be read", "shard was replaced while it was read"
CLASS_NAMES = "classnames.txt"
MOST_NAMES = 1 << 24  # bytes of class names


class Opened(ABC):
    """A piece that is open for reading; samples by their number in it. What cannot be used raises Unusable, what cannot be read OSError."""

    @abstractmethod
    def labels(self, member: int) -> Labels:
        """Captions and class."""

    @abstractmethod
    def picture(self, member: int) -> bytes:
        """The picture file."""

    @abstractmethod
    def values(self, member: int) -> dict[str, Any]:
        """What else is known of the sample, by name."""

    def npy(self, member: int, name: str) -> bytes | None:
        """The array NAME.npy, or None."""
        return None

    def close(self) -> None:  # noqa: B027  # most have nothing to give back
        """Give files back."""


class Piece(Protocol):
    """Some samples of a source that are listed together, and what of it could not be used.

    Attributes:
        keys: names of the samples in order, fit to be shown. problems: (reason, name). nbytes: that the listing takes.
        stamp: size and time of change, by which a replaced one is known; (-1, 0): it could not be opened.
    """

    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def problems(self) -> list[tuple[str, str]]: ...
    @property
    def stamp(self) -> Stamp: ...
    @property
    def nbytes(self) -> int: ...

    def open(self) -> Opened:
        """Raises OSError, BrokenTar, Unusable: it is not the one that was listed."""


def printable(text: str) -> str:
    """A name out of a file as it may be shown: what could clear a screen, set a window's title or turn the line around is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_picture(path: str) -> bytes:
    """The contents of a picture file; links are followed, devices and FIFOs are not waited for. Raises Unusable, OSError."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        # Asked of the open file and not of its path, which could be another one by now.
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise Unusable("picture is not a plain file")
        if about.st_size > MAX_IMAGE:
            raise Unusable("image file is too large")
        with os.fdopen(file, "rb", closefd=False) as opened:
            return opened.read(MAX_IMAGE)
    finally:
        os.close(file)


def stamp_of(path: str) -> Stamp:
    """Size and time of change of a plain file. Raises OSError."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "not a plain file", path)
    return about.st_size, about.st_mtime_ns


def class_names(folder: str) -> tuple[str, ...]:
    """The lines of classnames.txt in a folder or the one above, as clip_benchmark's data sets have it; () where there is none."""
    for place in (folder, folder.rpartition("/")[0] if remote.is_address(folder) else os.path.join(folder, os.pardir)):
        try:
            text = _start(f"{place}/{CLASS_NAMES}") if place else None
        except OSError:
            continue
        if text is not None:
            return tuple(line.strip() for line in text.decode("utf-8", "replace").splitlines() if line.strip())
    return ()


def _start(path: str) -> bytes | None:
    if remote.is_address(path):
        return remote.read_whole(path, MOST_NAMES)
    with open(path, "rb") as file:
        return file.read(MOST_NAMES)
