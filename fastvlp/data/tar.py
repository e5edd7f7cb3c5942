"""Where the members of a tar file lie, from its headers alone; every number in them is taken for hostile."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
EXTENDED = 1 << 20  # bytes of an extended header; names and times take hundreds
CHUNK = 1 << 20
PLAIN, FOLDER = b"0\x007", b"5"
SPARSE = "GNU.sparse.name"
OTHERS = {"1": "hard link", "2": "symbolic link", "3": "device", "4": "device", "6": "FIFO", "S": "sparse file"}


class BrokenTar(Exception):
    """The rest of a shard cannot be read; the message is the reason."""


class Member(NamedTuple):
    """A file in a tar: ``size`` bytes at ``offset``, or, if ``refused`` says why, nothing that can be read."""

    name: str
    offset: int
    size: int
    refused: str = ""


def tar_members(file: BinaryIO) -> Iterator[Member]:
    """Members of a tar (V7, ustar, GNU, pax) but for folders, by hopping from header to header.

    Raises:
        BrokenTar: a header is damaged or the file ends too early; what came before is good.
    """
    end, at = file.seek(0, os.SEEK_END), 0
    longer: str | None = None
    common: dict[str, str] = {}
    override: dict[str, str] = {}
    while at + BLOCK <= end:
        file.seek(at)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise BrokenTar("shard is cut short")
        if not header.strip(b"\0"):
            _only_zeros(file)
            return
        size, kind = _size(header), header[156:157]
        begin = at + BLOCK
        if kind in b"123456":
            size = 0
        elif kind == b"S":
            begin += _sparse_headers(file, header)
        said = override.get("size") or common.get("size")
        if said is not None and kind in PLAIN:
            size = _decimal(said)
        at = begin + -(-size // BLOCK) * BLOCK
        if begin + size > end:
            raise BrokenTar("shard is cut short")
        if kind in b"LKxg":
            if size > EXTENDED:
                raise BrokenTar("broken tar header")
            contents = file.read(size)
            if kind == b"L":
                longer = contents.split(b"\0", 1)[0].decode("utf-8", "replace")
            elif kind == b"x":
                override = _pax(contents)
            elif kind == b"g":
                common = {**common, **_pax(contents)}
            continue
        if kind != FOLDER:
            records = {**common, **override} if common else override
            name = records.get("path") or longer or _name(header)
            if kind in PLAIN and SPARSE in records:
                yield Member(records[SPARSE] or name, begin, -1, "sparse file in the shard")
            elif kind in PLAIN:
                yield Member(name, begin, size)
            else:
                yield Member(name, begin, -1, f"{OTHERS.get(kind.decode('latin-1'), 'unknown kind of member')} in the shard")
        longer, override = None, {}
    raise BrokenTar("shard is cut short" if end else "shard is empty")  # whole ones end with zeros


def _only_zeros(file: BinaryIO) -> None:
    """An archive ends with zeros: something behind them would be lost in silence (two tars in one file)."""
    for part in iter(lambda: file.read(CHUNK), b""):
        if part.count(0) < len(part):
            raise BrokenTar("shard goes on behind its end")


def _sparse_headers(file: BinaryIO, header: bytes) -> int:
    """Bytes of the maps that follow the header of a sparse file in GNU's old form."""
    more, found = header[482], 0
    while more:
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise BrokenTar("shard is cut short")
        more, found = block[504], found + BLOCK
        if found > EXTENDED:
            raise BrokenTar("broken tar header")
    return found


def _size(header: bytes) -> int:
    """Size of a member, after a check of the header's checksum."""
    # the sum of a header's bytes, by Adler's running sum: it starts at 1 and, up to 256 bytes, does not wrap
    total = sum((zlib.adler32(part) & 0xFFFF) - 1 for part in (header[:256], header[256:]))
    if total - sum(header[148:156]) + 8 * ord(" ") != _octal(header[148:156]):
        raise BrokenTar("broken tar header")
    field = header[124:136]
    if field[0] == 0x80:  # base 256, for what eleven octal digits do not hold; 0xff would be a negative number
        return int.from_bytes(field[1:], "big")
    return _octal(field)


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):  # int() would take signs and underscores
        raise BrokenTar("broken tar header")
    return int(digits or b"0", 8)


def _decimal(digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise BrokenTar("broken tar header")
    return int(digits)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")


def _pax(data: bytes) -> dict[str, str]:
    """What is used of the records "length key=value\\n" of an extended header: path, size, and whether the file is sparse."""
    records: dict[str, str] = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        length = _decimal(data[at:space].decode("latin-1")) if space > at else 0
        if not max(0, space - at) < length <= len(data) - at:  # a record without a length would be read for ever
            raise BrokenTar("broken tar header")
        key, _, value = data[space + 1:at + length - 1].partition(b"=")
        if key in (b"path", b"size", SPARSE.encode()):
            records[key.decode()] = value.decode("utf-8", "replace")
        elif key.startswith(b"GNU.sparse."):
            records.setdefault(SPARSE, "")
        at += length
    return records
