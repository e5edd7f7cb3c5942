"""Which files a shard list names, and where the samples lie inside each of them."""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
import os
import re
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastvlp.data.tar import BrokenTar, Member, tar_members
from fastvlp.data.unpack import Stamp, open_shard, zstd

IMAGES = ("jpg", "png", "jpeg", "webp", "gif", "avif", "tif", "tiff", "bmp", "jfif")
TEXTS = ("txt", "json")
SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")
MINI = Path(__file__).parent / "mini"
NAMED = {
    "mini:train": ("train-emoji-*.tar", "train-openclipart-*.tar"),
    "mini:val-emoji": ("val-emoji-*.tar",),
    "mini:val-openclipart": ("val-openclipart-*.tar",),
}
INDEXED = 1 << 26  # bytes of names and places that are held in memory
UNOPENED = "shard cannot be opened"
MOST_SHARDS = 1 << 20  # that one pattern may stand for
MOST_NAMES = 1 << 8  # of arrays beside the pictures
MOST_SAMPLES, MOST_PROBLEMS, LONGEST_NAME = 1 << 19, 1 << 14, 1 << 10  # of one shard; usual ones hold 10,000 samples

Shards = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def printable(text: str) -> str:
    """A name out of a file as it may be shown: what could clear a screen, set a window's title or turn the line around is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def expand(shards: Shards) -> list[str]:
    """Shard files of a path, a folder, a glob, a brace range, a name of the shipped data, or a list of these, sorted per entry.

    ``data/{0000..0003}.tar`` counts from 0000 to 0003, ``data/{a,b}.tar`` lists. A member of a brace range that does not exist is kept
    (``Index.missing`` and reading report it), so that one lost shard does not stop a run. Shards may be packed: .tar.gz, .tar.zst.

    Raises:
        FileNotFoundError: an entry names no existing file; says what lies nearby.
        ValueError: braces that do not match, or that stand for more than a million files.
        ImportError: a shard is packed with zstd, which is not installed.
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
                matches += sorted(file.path for file in os.scandir(pattern) if _is_shard(file.name))
            else:
                matches += sorted(glob.glob(pattern)) if glob.has_magic(pattern) and not os.path.exists(pattern) else [pattern]
        if not any(os.path.exists(path) for path in matches):
            raise FileNotFoundError(f"no shard matches {entry!r}; {_nearby(entry)}")
        found += matches
    if any(path.lower().endswith("zst") for path in found):
        zstd()
    return found


def _is_shard(name: str) -> bool:
    return name.lower().endswith(SHARDS) and not name.startswith(".")


def _braces(pattern: str) -> Iterator[str]:
    """The strings that a pattern with {a..b} ranges and {a,b} lists stands for."""
    if not re.fullmatch(r"([^{}]|\{[^{}]*\})*", pattern):
        raise ValueError(f"the braces of {pattern!r} do not match; ranges are written {{0000..0003}} and lists {{a,b}}, none in another")
    parts: list[Sequence[str]] = []
    for literal, group in re.findall(r"([^{}]+)|\{([^{}]*)\}", pattern):
        ends = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", group)
        if literal:
            parts.append([literal])
        elif ends:
            low, high, width = int(ends[1]), int(ends[2]), len(ends[1])
            if high < low or high - low >= MOST_SHARDS:
                raise ValueError(f"the range {{{group}}} of {pattern!r} stands for {max(0, high - low + 1):,} files; it must count "
                                 f"upwards, to at most {MOST_SHARDS:,}")
            parts.append([f"{number:0{width}d}" for number in range(low, high + 1)])
        else:
            parts.append(group.split(","))
    if math.prod(map(len, parts)) > MOST_SHARDS:
        raise ValueError(f"{pattern!r} stands for {math.prod(map(len, parts)):,} files; at most {MOST_SHARDS:,} are read")
    return ("".join(choice) for choice in itertools.product(*parts))


def _nearby(pattern: str) -> str:
    folder = Path(os.path.expanduser(re.split(r"[*?\[{]", pattern, maxsplit=1)[0]) or ".")
    if pattern != str(folder) or not folder.is_dir():
        folder = folder.parent
    while not folder.is_dir():
        folder = folder.parent
    others = sorted(path.name for path in folder.iterdir())
    tars = [name for name in others if _is_shard(name)]
    names = tars or others
    what = f"{len(names)} .tar files" if tars else f"no .tar file but {len(names)} other entries"
    some = ", ".join(printable(name) for name in names[:5])
    return f"{printable(str(folder.resolve()))} holds {what}" + (f": {some}{', ...' if len(names) > 5 else ''}" if names else "")


@dataclass(frozen=True)
class Shard:
    """Where the samples of one shard lie.

    Attributes:
        keys: names of the n samples, in the order of the file, fit to be shown (see ``printable``).
        members: int64 [n, 3, 2], for (image, txt, json) the offset and the size in bytes; size -1: not there.
        problems: (reason, name) of what could not be used.
        arrays: for each NAME of members NAME.npy, int64 [m, 3], number of the sample, offset and size, samples rising.
        stamp: size and time of change of the file, (-1, 0) where it could not be opened.
    """

    keys: list[str]
    members: np.ndarray
    problems: list[tuple[str, str]]
    stamp: Stamp = (-1, 0)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

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
        captions = [parts.get(extension) for extension in TEXTS]
        refused = next((part.refused for part in (image, *captions) if part is not None and part.refused), None)
        if refused is not None:
            self.problem(refused, key)
        elif image is None:
            self.problem("no image", key)
        elif captions == [None, None]:
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


def scan(path: str) -> Shard:
    """Find the samples of a shard from its headers alone, without reading pictures; what is broken is left out and named.

    Raises:
        ImportError: it is packed with zstd, which is not installed.
    """
    found, stamp = _Samples(path), (-1, 0)
    try:
        descriptor, stamp = open_shard(path)
        with open(descriptor, "rb") as file:
            try:
                for member in tar_members(file):
                    found.add(member)
                found.close()
            except BrokenTar as error:
                found.problems.append((str(error), f"{found.path}: after {printable(found.stem)}" if found.stem else found.path))
                found.close()
    except OSError as error:
        found.problems.append((UNOPENED, f"{found.path}: {error.strerror or error}"))
    except BrokenTar as error:
        found.problems.append((str(error), found.path))
    arrays = {name: np.array(rows, dtype=np.int64).reshape(-1, 3) for name, rows in found.arrays.items()}
    return Shard(found.keys, np.array(found.places, dtype=np.int64).reshape(-1, 3, 2), found.problems, stamp, arrays)


class Index:
    """The samples of many shards, each shard scanned when it is first needed.

    Attributes:
        paths: shard files; elsewhere a shard is its number in this list.
    """

    def __init__(self, paths: Sequence[str], report: Callable[[str, str], None]) -> None:
        self.paths = list(paths)
        self._report = report
        self._counts: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._problems = 0
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._held = 0

    def shard(self, number: int) -> Shard:
        """Scan of one shard, out of memory where it was used lately; problems are reported at its first scan."""
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        shard = self._shards[number] = scan(self.paths[number])
        if number not in self._counts:
            self._problems += len(shard.problems)
            for reason, name in shard.problems:
                self._report(reason, name)
        self._counts[number], self._sizes[number] = len(shard.keys), shard.stamp[0]
        self._held += shard.nbytes
        while self._held > INDEXED and len(self._shards) > 1:
            self._held -= self._shards.popitem(last=False)[1].nbytes
        return shard

    def count(self, number: int) -> int:
        """Number of usable samples of one shard."""
        if number not in self._counts:
            self.shard(number)
        return self._counts[number]

    @property
    def scanned(self) -> int:
        """Number of samples, usable or not, in the headers that were read so far."""
        return sum(self._counts.values()) + self._problems

    def estimate(self) -> tuple[float, bool]:
        """Number of usable samples, if all shards were like those whose headers were read so far; and whether all were."""
        read = len(self._counts)
        return sum(self._counts.values()) * len(self.paths) / max(1, read), read == len(self.paths)

    def missing(self) -> list[str]:
        """The shards that are not there, fit to be shown. Asks the file system for each; reads nothing."""
        return [printable(path) for path in self.paths if not os.path.exists(path)]

    def digest(self, most: int | None = None) -> str:
        """32 hexadecimal digits that name the data: file names (without folders), sizes in bytes and usable samples of all shards in order.

        Equal digests on two machines, or at two starts, mean that the same samples are read in the same order. All headers are read for
        it (about half a minute for a million samples), or those of the first ``most`` samples; a shard that is not there counts as empty.
        """
        facts, counted = hashlib.blake2b(digest_size=16), 0
        for number, path in enumerate(self.paths):
            if most is None or counted < most:
                count = self.count(number)
                counted += count
                facts.update(f"{os.path.basename(path)}\0{self._sizes[number]}\0{count}\n".encode("utf-8", "surrogateescape"))
            else:
                facts.update(f"{os.path.basename(path)}\0{_size(path)}\n".encode("utf-8", "surrogateescape"))
        return facts.hexdigest()


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
