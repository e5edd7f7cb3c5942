"""Files at addresses (s3, gs, az, hf, http) by fsspec: ranges of bytes, asked for again where a network fails, kept on disk in blocks."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fastvlp.data.unpack import Stamp, cache_folder

BLOCK = 4 << 20  # bytes that are asked for at a time: some forty samples, which come soon after one another
START = 4096
TRIES, WAIT = 6, 0.5  # seconds before the second try, then twice as long each time: 15 in all
CACHE_GB = 64.0
SWEEP = 64  # blocks written between two looks at what all of them take
GONE = (401, 403, 404, 410)  # answers of a server that it will repeat
FACTS = ("etag", "mtime", "lastmodified", "last-modified", "last_modified", "md5hash", "created", "generation",
         "blob_id")  # that tell versions of a file apart

T = TypeVar("T")
log = logging.getLogger(__name__)


def is_address(path: str) -> bool:
    """Whether a path is for fsspec: PROTOCOL://..."""
    return "://" in path


def filesystem(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises:
        ImportError: fsspec, or what it needs for this protocol, is not installed. ValueError: no such protocol.
    """
    try:
        files, path = _fsspec().core.url_to_fs(address)
    except ImportError as error:
        raise ImportError(f"{address.partition('://')[0]}:// cannot be read: {error}") from error
    return files, path


def list_files(pattern: str) -> list[str]:
    """The addresses that a pattern with * stands for, or what lies directly in a folder, whose address ends with /. Raises OSError."""
    files, path = filesystem(pattern)
    found = again(lambda: files.ls(path, detail=False) if pattern.endswith("/") else files.glob(path), pattern)
    return sorted(files.unstrip_protocol(name) for name in found)


def write(address: str, data: bytes) -> None:
    """Write a whole file. Raises OSError."""
    files, path = filesystem(address)
    try:
        files.pipe_file(path, data)
    except NotImplementedError as error:
        raise OSError(None, "nothing can be written there", address) from error


def read_whole(address: str, most: int) -> bytes | None:
    """The contents of a file of at most that many bytes; None where there is none. Raises OSError."""
    try:
        file = File(address)
    except FileNotFoundError:
        return None
    return file.pread(file.size, 0) if file.size <= most else None


def again(act: Callable[[], T], address: str) -> T:
    """What ``act`` gives, after as many tries as a network may need. Raises OSError."""
    for number in range(TRIES):
        try:
            return act()
        except (PermissionError, ImportError):
            # Another try would be refused for the same reason.
            raise
        except Exception as error:  # every protocol has errors of its own
            why = error
            if isinstance(error, FileNotFoundError):
                # fsspec says so over HTTP whatever went wrong, and only the cause tells
                why = error.__cause__ if isinstance(error.__cause__, Exception) else error
                if isinstance(why, FileNotFoundError) or getattr(why, "status", 0) in GONE:
                    raise
            if number == TRIES - 1:
                said = getattr(why, "strerror", None) or f"{type(why).__name__}: {why}"
                raise OSError(None, " ".join(said.split())[:200], address) from error
            log.info("%s: %s; trying again", address, error)
            # Random, so that workers whose requests failed together do not come back together.
            time.sleep(WAIT * 2**number * (0.75 + 0.5 * random.random()))
    raise AssertionError("unreachable")


class File(io.RawIOBase):
    """A file at an address, to be read.

    Attributes:
        size: in bytes. stamp: size, and a number that another version of the file does not have, as far as the server tells versions apart.

    Raises:
        OSError: it is not there, or the server neither says its size nor answers ranges.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._files, self._path = filesystem(address)
        about = again(lambda: self._files.info(self._path), address)
        if not isinstance(about.get("size"), int):
            raise OSError(None, "the server does not say how large it is", address)
        self.size: int = about["size"]
        facts = sorted((str(key).lower(), str(value)) for key, value in about.items() if str(key).lower() in FACTS)
        digest = hashlib.blake2b(repr((address, self.size, facts)).encode("utf-8", "surrogateescape"), digest_size=16).digest()
        # Seven bytes stay below 2^63, as the nanoseconds of a local file do.
        self.stamp: Stamp = (self.size, int.from_bytes(digest[:7], "big"))
        self._name, self._at = digest.hex(), 0
        self._last: tuple[int, bytes] = (-1, b"")

    def pread(self, size: int, offset: int) -> bytes:
        """Up to ``size`` bytes from ``offset`` on."""
        end = min(self.size, offset + max(0, size))
        first, last = offset // BLOCK, (end - 1) // BLOCK
        parts = [self._block(number)[max(0, offset - number * BLOCK):end - number * BLOCK] for number in range(first, last + 1)]
        return b"".join(parts)

    def _block(self, number: int) -> bytes:
        # Members of a tar lie side by side, so that the next read is mostly of the same block.
        if self._last[0] != number:
            self._last = number, _cached(f"{self._name}-{number}.block", lambda: self._fetched(number))
        return self._last[1]

    @cached_property
    def start(self) -> bytes:
        """The first 4 KB, without the rest of their block."""
        return self._range(0, START)

    def _fetched(self, number: int) -> bytes:
        return self._range(number * BLOCK, (number + 1) * BLOCK)

    def _range(self, begin: int, end: int) -> bytes:
        end = min(self.size, end)
        if begin >= end:
            return b""

        def ask() -> bytes:
            data: bytes = self._files.cat_file(self._path, start=begin, end=end)
            # A server that ignores ranges sends the whole file, whose beginning would pass for this block.
            if len(data) != end - begin:
                raise OSError(None, f"{len(data)} bytes came for a range of {end - begin}: the server answers no ranges", self.address)
            return data

        return again(ask, self.address)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0 if whence == os.SEEK_SET else self._at if whence == os.SEEK_CUR else self.size)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        data = self.pread(self.size - self._at if size < 0 else size, self._at)
        self._at += len(data)
        return data


_written = 0


def _cached(name: str, fetch: Callable[[], bytes]) -> bytes:
    """A block out of the folder of blocks, or fetched and put there, atomically; a full disk only costs the copy."""
    global _written
    limit = cache_bytes()
    if not limit:
        return fetch()
    folder = cache_folder() / "blocks"
    # Blocks may come from a private bucket: other users of the machine must not read them.
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / name
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        os.utime(path)  # used just now
        return data
    data = fetch()
    with contextlib.suppress(OSError):
        descriptor, temporary = tempfile.mkstemp(dir=folder, suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    # Also after the first block, since short runs would otherwise never look.
    if _written % SWEEP == 0:
        _sweep(folder, limit)
    _written += 1
    return data


def cache_bytes() -> int:
    """Bytes of blocks that are kept, by FASTVLP_CACHE_GB (64 where it is not set; 0 keeps none). Raises ValueError."""
    said = os.environ.get("FASTVLP_CACHE_GB")
    try:
        limit = CACHE_GB if said is None else float(said)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise ValueError(f"FASTVLP_CACHE_GB is {said!r}; it is a number of GB, 0 for no cache of remote shards")
    return int(limit * 1e9)


def _sweep(folder: Path, limit: int) -> None:
    """Blocks that were not used for longest go, until four fifths of the limit are left."""
    blocks = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            about = path.stat()
            blocks.append((about.st_mtime_ns, about.st_size, path))
    total = sum(size for _, size, _ in blocks)
    if total <= limit:
        return
    for _, size, path in sorted(blocks):
        if total <= limit * 4 // 5:
            return
        path.unlink(missing_ok=True)
        total -= size


def _fsspec() -> ModuleType:
    try:
        import fsspec
    except ImportError as error:
        raise ImportError("addresses need fsspec: pip install 'fastvlp[remote]'") from error
    return fsspec
