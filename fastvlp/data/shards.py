"""Which files and folders a list names, and how many samples each of them holds."""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastvlp.data import remote, sources
from fastvlp.data.sources import Piece
from fastvlp.data.sources import printable as printable
from fastvlp.data.sources.piece import UNOPENED as UNOPENED
from fastvlp.data.sources.tars import scan as scan
from fastvlp.data.unpack import zstd

MINI = Path(__file__).parent / "mini"
NAMED = {
    "mini:train": ("train-emoji-*.tar", "train-openclipart-*.tar"),
    "mini:val-emoji": ("val-emoji-*.tar",),
    "mini:val-openclipart": ("val-openclipart-*.tar",),
}
INDEXED = 1 << 26  # bytes of names and places that are held in memory
MOST_SHARDS = 1 << 20  # that one pattern may stand for

Shards = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def expand(shards: Shards) -> list[str]:
    """The pieces of a path, a folder, a glob, a brace range, a name of the shipped data, or a list of these, sorted per entry.

    A piece is a shard (.tar, .tar.gz, .tar.zst), a table (.csv, .tsv, .jsonl with paths of pictures, .parquet, .arrow) or a folder of
    pictures. Shards may lie at addresses that fsspec knows (s3://, gs://, az://, hf://, https://). ``data/{0000..0003}.tar`` counts from
    0000 to 0003, ``data/{a,b}.tar`` lists, ``::`` joins entries. A member of a brace range that does not exist is kept (``Index.missing``
    and reading report it), so that one lost shard does not stop a run. Columns that have unusual names are said behind a table:
    ``pairs.csv?image=photo&caption=name&sep=;``.

    Raises:
        FileNotFoundError: an entry names no existing file; says what lies nearby.
        ValueError: braces that do not match, or that stand for more than a million files; a table without pictures or captions.
        ImportError: a shard is packed with zstd, or a table is parquet, and what reads it is not installed.
    """
    entries = [part for shard in ([shards] if isinstance(shards, (str, os.PathLike)) else shards) for part in _parts(os.fspath(shard))]
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
        if entry.startswith("pipe:"):
            raise ValueError(f"{entry!r} is the output of a command, of which no part can be read again, so that no run could continue "
                             "exactly; name the files themselves: s3://, gs://, az://, hf://, https:// or a mounted path")
        if remote.is_address(entry):
            found += _at_address(entry)
            continue
        path = os.path.expanduser(entry)
        for pattern in [path] if os.path.exists(path) else _braces(path):
            file = sources.file_of(pattern)
            for name in sorted(glob.glob(file)) if glob.has_magic(file) and not os.path.exists(file) else [file]:
                matches += sources.inside(name) if os.path.isdir(name) else [f"{name}{pattern[len(file):]}"]
        there = next((path for path in matches if os.path.exists(sources.file_of(path))), None)
        if there is None:
            raise FileNotFoundError(f"no shard matches {entry!r}; {_nearby(entry)}")
        sources.check(there)
        found += matches
    if any(path.lower().endswith("zst") for path in found):
        zstd()
    return found


def _parts(entry: str) -> list[str]:
    """Lists that open_clip joins by ::, unless it is a chain of fsspec's or the name of a file."""
    parts = entry.split("::")
    return parts if len({"://" in part for part in parts}) == 1 and not os.path.exists(entry) else [entry]


def _at_address(entry: str) -> list[str]:
    """The shards of an address: of braces without asking, of * and of a folder (ending in /) by asking; the first is looked at."""
    found: list[str] = []
    for pattern in _braces(entry):
        listed = remote.list_files(pattern) if "*" in pattern or pattern.endswith("/") else [pattern]
        found += [one for one in listed if one == pattern or _is_shard(one.rpartition("/")[2])]
    try:
        if not found:
            raise FileNotFoundError(entry)
        if not _is_shard(found[0].partition("?")[0].rpartition("/")[2]):
            raise ValueError(f"{found[0]!r} is no .tar; of addresses only shards are read: copy or mount tables and folders")
        with remote.File(found[0]):
            return found
    except FileNotFoundError as error:
        why = f"{found[0]!r} is not there" if found else "nothing there ends in .tar"
        raise FileNotFoundError(f"no shard matches {entry!r}; {why}") from error


def _is_shard(name: str) -> bool:
    return name.lower().endswith(sources.SHARDS) and not name.startswith(".")


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


class Index:
    """The samples of many shards, each shard scanned when it is first needed.

    Attributes:
        paths: pieces (see ``expand``); elsewhere a shard is its number in this list.
    """

    def __init__(self, paths: Sequence[str], report: Callable[[str, str], None]) -> None:
        self.paths = list(paths)
        self._report = report
        self._counts: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._problems = 0
        self._shards: OrderedDict[int, Piece] = OrderedDict()
        self._held = 0

    def shard(self, number: int) -> Piece:
        """Scan of one shard, out of memory where it was used lately; problems are reported at its first scan."""
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        shard = self._shards[number] = sources.scan(self.paths[number])
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
        """The local pieces that are not there, fit to be shown. Asks the file system for each; reads nothing."""
        return [printable(path) for path in self.paths
                if not remote.is_address(path) and not os.path.exists(sources.file_of(path))]

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
        return os.stat(sources.file_of(path)).st_size
    except OSError:
        return -1
