"""Opening shards: plain files as they are, compressed ones as an unpacked copy, since samples are read in any order."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import os
import stat
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import cast

from fastvlp.data.tar import BrokenTar

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
UNREAD = (b"BZh", b"\xfd7zX", b"PK\x03\x04", b"7z\xbc\xaf")
RATIO, FLOOR = 200, 64 << 20  # a shard of pictures hardly shrinks: one that unpacks to more than both is refused
COPIES = 64 << 30  # bytes of unpacked copies that are kept; those not used for longest go first
CHUNK = 1 << 20

Stamp = tuple[int, int]


def open_shard(path: str) -> tuple[int, Stamp]:
    """A file descriptor that reads the tar of a shard, and size and time of change of the shard's file, by which a replaced one is known.

    A compressed shard is unpacked once for all processes of this machine, into ``$FASTVLP_CACHE`` or a folder of this user among the
    temporary files.

    Raises:
        OSError: it cannot be opened, or is no plain file (a FIFO would block for ever).
        BrokenTar: a compression that is not read, or a file that unpacks to far more than pictures could.
        ImportError: for zstd, which is not installed.
    """
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        about = os.fstat(source)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "not a plain file", path)
        stamp = about.st_size, about.st_mtime_ns
        head = os.pread(source, 4, 0)
        if head.startswith(UNREAD):
            raise BrokenTar("shard is packed in a way that is not read (gzip and zstd are)")
        if not head.startswith((GZIP, ZSTD)):
            found, source = source, -1
            return found, stamp
        if head.startswith(ZSTD):
            zstd()
        return _copy(path, source, stamp), stamp
    finally:
        if source >= 0:
            os.close(source)


def zstd() -> ModuleType:
    """The module that unpacks zstd: Python's own from 3.14 on. Raises ImportError."""
    try:
        from compression import zstd as module  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        try:
            from backports import zstd as module  # type: ignore[import-not-found, no-redef, unused-ignore]
        except ImportError as error:
            raise ImportError("shards packed with zstd need backports.zstd: pip install 'fastvlp[zstd]', or unpack them") from error
    return cast(ModuleType, module)


def _copy(path: str, source: int, stamp: Stamp) -> int:
    folder = cache_folder()
    name = hashlib.blake2b(repr((os.path.realpath(path), os.fstat(source).st_ino, stamp)).encode("utf-8", "replace"), digest_size=16)
    copy = folder / f"{name.hexdigest()}.tar"
    with _one_at_a_time(folder / f"{name.hexdigest()}.lock"):
        with contextlib.suppress(FileNotFoundError):
            found = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
            os.utime(copy)  # used just now
            return found
        partial = copy.with_suffix(".partial")
        try:
            _unpack(source, partial, max(FLOOR, RATIO * stamp[0]))
            os.replace(partial, copy)
        finally:
            partial.unlink(missing_ok=True)
        found = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
    _forget(folder, copy)
    return found


def _unpack(source: int, target: Path, limit: int) -> None:
    packed = os.fdopen(os.dup(source), "rb")
    packed.seek(0)
    damage: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if packed.read(len(GZIP)) != GZIP:
        damage = (EOFError, zstd().ZstdError)
    packed.seek(0)
    with packed, open(target, "wb") as out, (gzip.open if zlib.error in damage else zstd().open)(packed) as plain:
        while True:
            try:
                part = plain.read1(CHUNK)
            except damage:
                out.write(b"\xff")  # less than a block: the rest of the shard is found to be cut short, what came before is used
                return
            if not part:
                return
            out.write(part)
            if out.tell() > limit:
                raise BrokenTar("shard unpacks to far more than pictures could")


def cache_folder() -> Path:
    """``$FASTVLP_CACHE``, or a folder of this user among the temporary files. Raises OSError: others can write to it."""
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    folder = Path(os.environ.get("FASTVLP_CACHE") or Path(tempfile.gettempdir()) / f"fastvlp{user}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.lstat()
    if hasattr(os, "getuid") and (not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022):
        raise OSError(errno.EPERM, "others can write to the folder of unpacked shards; set FASTVLP_CACHE to one of your own", str(folder))
    return folder


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Others who want the same copy wait for it; the lock dies with its process."""
    try:
        import fcntl
    except ImportError:  # Windows: whoever comes second unpacks too
        yield
        return
    with open(lock, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _forget(folder: Path, used: Path) -> None:
    copies = []
    for copy in folder.glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            about = copy.stat()
            copies.append((about.st_mtime_ns, about.st_size, copy))
    total = sum(size for _, size, _ in copies)
    for _, size, copy in sorted(copies):
        if total <= COPIES:
            return
        if copy != used:
            copy.unlink(missing_ok=True)  # who has it open reads on
            total -= size
