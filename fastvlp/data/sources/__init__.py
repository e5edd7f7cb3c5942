"""Data where it lies: one file for each kind of source, and which of them a path belongs to."""

from __future__ import annotations

import os
from collections.abc import Callable

from fastvlp.data import remote
from fastvlp.data.sources import arrow, columns, folders, tars, text_tables
from fastvlp.data.sources.piece import Opened as Opened
from fastvlp.data.sources.piece import Piece as Piece
from fastvlp.data.sources.piece import printable as printable

SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")
ARROW = (".parquet", ".arrow")


def scan(path: str) -> Piece:
    """List the samples of a piece without decoding any; what cannot be used is left out and named.

    Raises:
        ImportError: it needs a package that is not installed.
    """
    return _kind(path)(path)


def _kind(path: str) -> Callable[[str], Piece]:
    if remote.is_address(path):
        return tars.scan
    name = columns.split(path)[0].lower()
    if name.endswith(ARROW):
        return arrow.scan
    if name.endswith(text_tables.ENDINGS):
        return text_tables.scan
    return folders.scan if os.path.isdir(path) else tars.scan


def is_shard(path: str) -> bool:
    """Whether a piece is read as a tar."""
    return _kind(path) is tars.scan


def file_of(path: str) -> str:
    """The file or folder of a piece, without what is asked of its columns."""
    return columns.split(path)[0]


def check(path: str) -> None:
    """Refuse a table that names no pictures or no captions, before anything else is read. Raises ValueError, ImportError."""
    name = file_of(path).lower()
    if os.path.isfile(file_of(path)) and name.endswith(ARROW):
        arrow.head(path)
    elif os.path.isfile(file_of(path)) and name.endswith(text_tables.ENDINGS):
        text_tables.head(path)


def inside(folder: str) -> list[str]:
    """The pieces that a folder holds: its shards; or the arrow files of a data set; its table of captions; its parquet files; or itself,
    where there are pictures in it. [] where there is nothing of these.

    Raises:
        ValueError: a data set of several splits.
    """
    entries = sorted((entry for entry in os.scandir(folder) if not entry.name.startswith(".")), key=lambda entry: entry.name)
    shards = [entry.path for entry in entries if entry.name.lower().endswith(SHARDS)]
    if shards:
        return shards
    found = arrow.files_of(folder)
    if found:
        return found
    table = folders.table_in(folder)
    if table is not None:
        return [table]
    names = {entry.name for entry in entries if entry.is_dir()}
    # img2dataset writes a parquet file of what it fetched beside each folder of files
    parquet = [entry.path for entry in entries if entry.name.lower().endswith(".parquet") and entry.name[:-8] not in names]
    return parquet or ([folder] if folders.holds_pictures(folder) else [])
