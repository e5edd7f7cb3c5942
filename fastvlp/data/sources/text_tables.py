"""Tables of picture paths and captions as text: CSV and TSV as open_clip reads them, and JSON lines."""

from __future__ import annotations

import csv
import io
import json
import os
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from fastvlp.data.headers import Unusable
from fastvlp.data.labels import Labels
from fastvlp.data.sources.columns import Columns, Rows, choose, followed, labels_of, split
from fastvlp.data.sources.piece import REPLACED, UNOPENED, UNREAD, Opened, printable, stamp_of
from fastvlp.data.unpack import Stamp

ENDINGS = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson")
LONGEST = 1 << 20  # bytes of a line
MOST_ROWS, MOST_PROBLEMS = 1 << 25, 1 << 14  # of one table
TOO_LONG = "row is too long"
SEPARATORS = "\t,;|"


@dataclass(frozen=True)
class TextTable:
    """Where the rows of a table lie.

    Attributes:
        places: int64 [n, 2], offset and size in bytes of each row. rows: the number of each in the file.
        header: names of the columns by their place; () in JSON lines, whose rows name them.
    """

    file: str
    columns: Columns
    header: tuple[str, ...]
    separator: str
    places: np.ndarray
    rows: np.ndarray
    problems: list[tuple[str, str]]
    stamp: Stamp

    @property
    def keys(self) -> Rows:
        return Rows(self.rows)  # type: ignore[arg-type]  # an array is indexed as a sequence is

    @property
    def nbytes(self) -> int:
        return self.places.nbytes + self.rows.nbytes + 200 * len(self.problems)

    def open(self) -> Opened:
        if stamp_of(self.file) != self.stamp:
            raise Unusable(REPLACED)
        return _Open(self)


class _Open(Opened):
    def __init__(self, table: TextTable) -> None:
        self.table, self.folder = table, os.path.dirname(table.file)
        self.descriptor = os.open(table.file, os.O_RDONLY | os.O_CLOEXEC)
        self.last: tuple[int, Mapping[str, Any]] = (-1, {})  # labels and picture of a row are asked for one after the other

    def labels(self, member: int) -> Labels:
        return labels_of(self._row(member), self.table.columns)

    def picture(self, member: int) -> bytes:
        return followed(self._row(member).get(self.table.columns.image), self.folder)

    def values(self, member: int) -> dict[str, Any]:
        return dict(self._row(member))

    def _row(self, member: int) -> Mapping[str, Any]:
        if self.last[0] != member:
            offset, size = self.table.places[member].tolist()
            data = os.pread(self.descriptor, size, offset)
            if len(data) < size:
                raise Unusable(UNREAD)
            row = _parsed(data, self.table.header, self.table.separator)
            if row is None:
                raise Unusable("row is broken")
            self.last = member, row
        return self.last[1]

    def close(self) -> None:
        os.close(self.descriptor)


def _parsed(data: bytes, header: tuple[str, ...], separator: str) -> Mapping[str, Any] | None:
    if not header:
        try:
            row = json.loads(data)
        except (ValueError, RecursionError):
            return None
        return row if isinstance(row, dict) else None
    try:
        fields = next(csv.reader(io.StringIO(_text(data), newline=""), delimiter=separator), [])
    except csv.Error:
        return None
    return dict(zip(header, fields, strict=False))


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig", "surrogateescape")  # a caption with what is no UTF-8 is refused as such


def head(path: str) -> tuple[str, Columns, tuple[str, ...], str]:
    """File, columns, header and separator of ``pairs.csv`` or ``pairs.csv?image=...``, by its first line.

    Raises:
        ValueError: it names no picture or no caption. OSError.
    """
    file, asked = split(path)
    stamp_of(file)
    with open(file, "rb") as opened:
        line = opened.readline(LONGEST)
    if file.lower().endswith((".jsonl", ".ndjson")):
        row = _parsed(line, (), "")
        return file, choose([str(name) for name in row or ()], asked, file), (), ""
    text = _text(line).rstrip("\r\n")
    separator = {"tab": "\t", "\\t": "\t"}.get(asked.get("sep", ""), asked.get("sep", "")) or next(
        (one for one in SEPARATORS if one in text), ",")
    if len(separator) != 1:
        raise ValueError(f"the separator {separator!r} of {printable(file)} is no single character; write sep=; or sep=tab")
    names = tuple(name.strip() for name in next(csv.reader([text], delimiter=separator), []))
    return file, choose(names, asked, file), names, separator


def scan(path: str) -> TextTable:
    """Find the rows of a table, reading it once; what is broken is left out and named."""
    places, rows, problems, stamp = array("q"), array("q"), list[tuple[str, str]](), (-1, 0)
    file, columns, separator = path, Columns("", None, None), ""
    header: tuple[str, ...] = ()
    try:
        file, columns, header, separator = head(path)
        stamp = stamp_of(file)
        with open(file, "rb") as opened:
            if header:
                opened.readline(LONGEST)
            found = _csv(opened, separator, header.index(columns.image)) if header else _json_lines(opened)
            for number, (offset, size, problem) in enumerate(found):
                if problem is None:
                    places.extend((offset, size))
                    rows.append(number)
                elif problem:
                    problems.append((problem, f"{printable(file)}: row {number + 1}"))
                if len(rows) == MOST_ROWS or len(problems) == MOST_PROBLEMS:
                    problems.append(("table has too many rows" if len(rows) == MOST_ROWS else "table has too many broken rows",
                                     printable(file)))
                    break
    except OSError as error:
        problems.append((UNOPENED, f"{printable(file)}: {error.strerror or error}"))
    except (ValueError, csv.Error) as error:
        problems.append((UNOPENED, f"{printable(file)}: {error}"))
    return TextTable(file, columns, header, separator, np.array(places, np.int64).reshape(-1, 2), np.array(rows, np.int64), problems, stamp)


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Lines, of the longest only the beginning, and their sizes."""
    for line in iter(lambda: file.readline(LONGEST), b""):
        size, part = len(line), line
        while len(part) == LONGEST and not part.endswith(b"\n"):
            part = file.readline(LONGEST)
            size += len(part)
        yield line, size


def _json_lines(file: BinaryIO) -> Iterator[tuple[int, int, str | None]]:
    """(offset, size, problem) of each row; the problem "" is a line without anything."""
    at = 0
    for line, size in _lines(file):
        yield at, size, TOO_LONG if size > LONGEST else None if line.strip() else ""
        at += size


def _csv(file: BinaryIO, separator: str, image: int) -> Iterator[tuple[int, int, str | None]]:
    """The same, by Python's rules of quotes; a quote that is never closed ends its row after 128 KB, as csv has it."""
    begin = file.tell()
    at = begin

    def texts() -> Iterator[str]:
        nonlocal at
        for line, size in _lines(file):
            at += size
            yield line.decode("utf-8", "surrogateescape")

    # csv takes lines only as a row needs them, so that ``at`` is where the row ends that it just gave.
    reader = csv.reader(texts(), delimiter=separator)
    while True:
        problem = None
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            row, problem = [], "row is broken"
        if at - begin > LONGEST:
            problem = TOO_LONG
        elif problem is None and len(row) <= image:
            problem = "row has too few columns" if row else ""
        yield begin, at - begin, problem
        begin = at
