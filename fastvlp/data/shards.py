"""Which files a shard list names, and where the samples lie inside each of them."""

from __future__ import annotations

import glob
import itertools
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

IMAGES = ("jpg", "png", "jpeg", "webp")
MINI = Path(__file__).parent / "mini"
NAMED = {
    "mini:train": ("train-emoji-*.tar", "train-openclipart-*.tar"),
    "mini:val-emoji": ("val-emoji-*.tar",),
    "mini:val-openclipart": ("val-openclipart-*.tar",),
}
INDEXED = 1 << 18  # samples whose places in their shards are held in memory, about 40 MB
BLOCK = 512

Shards = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def expand(shards: Shards) -> list[str]:
    """Shard files of a path, a folder, a glob, a brace range, a name of the shipped data, or a list of these, sorted per entry.

    ``data/{0000..0003}.tar`` counts from 0000 to 0003, ``data/{a,b}.tar`` lists. A member of a brace range that does not exist is kept
    (reading reports it), so that one lost shard does not stop a run.

    Raises:
        FileNotFoundError: an entry names no existing file; says what lies nearby.
    """
    entries = [os.fspath(shard) for shard in ([shards] if isinstance(shards, (str, os.PathLike)) else shards)]
    if not entries:
        raise FileNotFoundError("the list of shards is empty; give paths, globs, brace ranges {0000..0003} or mini:train")
    found: list[str] = []
    for entry in entries:
        if entry.startswith("mini:"):
            if entry not in NAMED:
                raise FileNotFoundError(f"no shipped data {entry!r}; there are {', '.join(NAMED)}")
            found += [path for pattern in NAMED[entry] for path in sorted(glob.glob(str(MINI / pattern)))]
            continue
        matches: list[str] = []
        if "://" in entry or entry.startswith("pipe:"):
            raise FileNotFoundError(f"shards are read from local or mounted files, not from {entry!r}; copy or mount them first")
        path = os.path.expanduser(entry)
        for pattern in [path] if os.path.exists(path) else _braces(path):
            if os.path.isdir(pattern):
                pattern = os.path.join(pattern, "*.tar")
            matches += sorted(glob.glob(pattern)) if glob.has_magic(pattern) and not os.path.exists(pattern) else [pattern]
        if not any(os.path.exists(path) for path in matches):
            raise FileNotFoundError(f"no shard matches {entry!r}; {_nearby(entry)}")
        found += matches
    return found


def _braces(pattern: str) -> Iterator[str]:
    """The strings that a pattern with {a..b} ranges and {a,b} lists stands for."""
    parts: list[list[str]] = []
    for literal, group in re.findall(r"([^{}]+)|\{([^{}]*)\}", pattern):
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", group)
        if literal:
            parts.append([literal])
        elif ends:
            low, high, width = int(ends[1]), int(ends[2]), len(ends[1])
            parts.append([f"{number:0{width}d}" for number in range(low, high + 1)])
        else:
            parts.append(group.split(","))
    return ("".join(choice) for choice in itertools.product(*parts))


def _nearby(pattern: str) -> str:
    folder = Path(os.path.expanduser(re.split(r"[*?\[{]", pattern, maxsplit=1)[0]) or ".")
    if pattern != str(folder) or not folder.is_dir():
        folder = folder.parent
    while not folder.is_dir():
        folder = folder.parent
    tars = sorted(path.name for path in folder.glob("*.tar"))
    others = sorted(path.name for path in folder.iterdir()) if not tars else []
    names = tars or others
    what = f"{len(names)} .tar files" if tars else f"no .tar file but {len(names)} other entries"
    return f"{folder.resolve()} holds {what}" + (f": {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "")


@dataclass(frozen=True)
class Shard:
    """Where the samples of one shard lie.

    Attributes:
        keys: names of the n samples, in the order of the file.
        members: int64 [n, 3, 2], for (image, txt, json) the offset and the size in bytes; size -1: not there.
        problems: (reason, name) of what could not be used.
    """

    keys: list[str]
    members: np.ndarray
    problems: list[tuple[str, str]]


class BrokenTar(Exception):
    """The rest of a shard cannot be read; the message is the reason."""


def scan(path: str) -> Shard:
    """Find the samples of a shard from its headers alone, without reading pictures; what is broken is left out and named."""
    keys: list[str] = []
    members: list[list[tuple[int, int]]] = []
    problems: list[tuple[str, str]] = []

    def close(key: str | None, parts: dict[str, tuple[int, int]]) -> None:
        image = next((parts[extension] for extension in IMAGES if extension in parts), None)
        if key is None:
            return
        if image is None:
            problems.append(("no image", f"{path}: {key}"))
        elif "txt" not in parts and "json" not in parts:
            problems.append(("no caption", f"{path}: {key}"))
        else:
            keys.append(key)
            members.append([image, parts.get("txt", (0, -1)), parts.get("json", (0, -1))])

    key: str | None = None
    parts: dict[str, tuple[int, int]] = {}
    try:
        with open(path, "rb") as file:
            for name, offset, size in tar_members(file):
                folder, _, base = name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not stem or not dot:
                    continue
                this = f"{folder}/{stem}" if folder else stem
                extension = extension.lower()
                if this != key or extension in parts:  # a key may come twice, as in the shipped data
                    close(key, parts)
                    key, parts = this, {}
                parts[extension] = offset, size
    except OSError as error:
        problems.append(("shard cannot be opened", f"{path}: {error.strerror or error}"))
    except BrokenTar as error:
        problems.append((str(error), f"{path}: after {key}" if key else path))
    close(key, parts)
    return Shard(keys, np.array(members, dtype=np.int64).reshape(-1, 3, 2), problems)


def tar_members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the regular files of a tar (V7, ustar, GNU, pax), by hopping from header to header."""
    end, at = os.fstat(file.fileno()).st_size, 0
    longer: str | None = None
    override: dict[str, str] = {}
    while at + BLOCK <= end:
        file.seek(at)
        header = file.read(BLOCK)
        if not header.strip(b"\0"):
            return
        size, kind = _size(header), header[156:157]
        begin = at + BLOCK
        if kind in b"123456" and kind:
            size = 0
        if "size" in override and kind in (b"0", b"\0", b"7"):
            size = int(override["size"])
        at = begin + -(-size // BLOCK) * BLOCK
        if begin + size > end:
            raise BrokenTar("shard is cut short")
        if kind == b"L":
            longer = file.read(size).rstrip(b"\0").decode("utf-8", "replace")
        elif kind == b"x":
            override = _pax(file.read(size))
        elif kind not in (b"g", b"K"):
            if kind in (b"0", b"\0", b"7"):
                yield override.get("path") or longer or _name(header), begin, size
            longer, override = None, {}
    if at < end or end == 0:
        raise BrokenTar("shard is cut short" if end else "shard is empty")


def _size(header: bytes) -> int:
    """Size of a member, after a check of the header's checksum."""
    try:
        expected = int(header[148:156].strip(b" \0") or b"-1", 8)
        # the sum of a header's bytes, by Adler's running sum: it starts at 1 and, up to 256 bytes, does not wrap
        total = sum((zlib.adler32(part) & 0xFFFF) - 1 for part in (header[:256], header[256:]))
        if total - sum(header[148:156]) + 8 * ord(" ") == expected:
            field = header[124:136]
            return int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        pass
    raise BrokenTar("shard is compressed" if header[:2] == b"\x1f\x8b" else "broken tar header")


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")


def _pax(data: bytes) -> dict[str, str]:
    """Records "length key=value\\n" of an extended header."""
    records: dict[str, str] = {}
    while data:
        digits, _, rest = data.partition(b" ")
        if not digits.isdigit() or not 0 < int(digits) <= len(data):
            raise BrokenTar("broken tar header")
        key, _, value = rest[:int(digits) - len(digits) - 2].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        data = data[int(digits):]
    return records


class Index:
    """The samples of many shards, each shard scanned when it is first needed.

    Attributes:
        paths: shard files; elsewhere a shard is its number in this list.
    """

    def __init__(self, paths: Sequence[str], report: Callable[[str, str], None]) -> None:
        self.paths = list(paths)
        self._report = report
        self._counts: dict[int, int] = {}
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._held = 0

    def shard(self, number: int) -> Shard:
        """Scan of one shard, out of memory where it was used lately; problems are reported at its first scan."""
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        shard = self._shards[number] = scan(self.paths[number])
        if number not in self._counts:
            for reason, name in shard.problems:
                self._report(reason, name)
        self._counts[number] = len(shard.keys)
        self._held += len(shard.keys)
        while self._held > INDEXED and len(self._shards) > 1:
            self._held -= len(self._shards.popitem(last=False)[1].keys)
        return shard

    def count(self, number: int) -> int:
        """Number of usable samples of one shard."""
        if number not in self._counts:
            self.shard(number)
        return self._counts[number]
