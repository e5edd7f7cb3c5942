"""Columns of pictures: parquet (img2dataset, Hugging Face) and the arrow files of a Hugging Face ``datasets`` folder."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from fastvlp.data.headers import Unusable
from fastvlp.data.images import MAX_IMAGE
from fastvlp.data.labels import Labels
from fastvlp.data.sources.columns import Columns, Rows, choose, followed, labels_of, split
from fastvlp.data.sources.piece import REPLACED, UNOPENED, Opened, printable, stamp_of
from fastvlp.data.unpack import Stamp

GROUP = 1 << 30  # bytes of a row group, unpacked; usual ones hold 100 to 1,000 pictures
HELD = 1 << 28  # bytes of row groups that a process keeps
_groups: OrderedDict[tuple[str, Stamp, int, bool], Any] = OrderedDict()


@dataclass(frozen=True)
class Table:
    """Attributes:
        starts: int64 [groups + 1], the first row of each group of rows. classes: names, where the class is a number.
    """

    file: str
    columns: Columns
    classes: tuple[str, ...]
    starts: np.ndarray
    problems: list[tuple[str, str]]
    stamp: Stamp

    @property
    def keys(self) -> Rows:
        return Rows(range(int(self.starts[-1])))

    @property
    def nbytes(self) -> int:
        return self.starts.nbytes + 1000

    def open(self) -> Opened:
        # Rows are known by their number, which would be another sample in another file of this name.
        if stamp_of(self.file) != self.stamp:
            raise Unusable(REPLACED)
        return _Open(self, (_parquet if self.file.lower().endswith(".parquet") else _arrow)(self))


Groups = Callable[[int, bool], Any]  # the pictures of a group of rows, or its other columns


class _Open(Opened):
    def __init__(self, table: Table, groups: Groups) -> None:
        self.table, self.groups = table, groups

    def labels(self, member: int) -> Labels:
        return labels_of(self.values(member), self.table.columns, self.table.classes)

    def picture(self, member: int) -> bytes:
        picture = self._cells(member, True).get(self.table.columns.image)
        if isinstance(picture, Mapping):  # as datasets stores pictures: the bytes, or where they are
            picture = picture.get("bytes") if picture.get("bytes") is not None else picture.get("path")
        if not isinstance(picture, bytes):
            return followed(picture, os.path.dirname(self.table.file))
        if len(picture) > MAX_IMAGE:
            raise Unusable("image file is too large")
        return picture

    def values(self, member: int) -> dict[str, Any]:
        return self._cells(member, False)

    def _cells(self, member: int, pictures: bool) -> dict[str, Any]:
        group = int(np.searchsorted(self.table.starts, member, side="right")) - 1
        try:
            row = self.groups(group, pictures).slice(member - int(self.table.starts[group]), 1).to_pylist()
        except (OSError, ValueError, TypeError, NotImplementedError, MemoryError) as error:  # pyarrow's own are of these kinds
            raise Unusable("group of rows is broken") from error
        if len(row) != 1:
            raise Unusable("group of rows is broken")
        return dict(row[0])


def _parquet(table: Table) -> Groups:
    opened = pyarrow("parquet").ParquetFile(table.file)

    def read(group: int, pictures: bool) -> Any:
        key = table.file, table.stamp, group, pictures
        # Rows of a group are asked for soon after one another, and parquet unpacks a group as a whole.
        if key in _groups:
            _groups.move_to_end(key)
        else:
            if opened.metadata.row_group(group).total_byte_size > GROUP:
                raise Unusable("group of rows is too large")
            # Captions are often read alone, and the pictures beside them are nearly all of the bytes.
            names = [name for name in opened.schema_arrow.names if (name == table.columns.image) == pictures]
            # Workers are processes already; threads in each would fight for the same cores.
            _groups[key] = opened.read_row_group(group, columns=names, use_threads=False)
            # The group that was just read stays, even where it is above the bound by itself.
            while sum(one.nbytes for one in _groups.values()) > HELD and len(_groups) > 1:
                _groups.popitem(last=False)
        return _groups[key]

    return read


def _arrow(table: Table) -> Groups:
    """Batches lie in mapped memory; each is checked before it is first read, since its offsets are a stranger's."""
    batches, checked = list(_batches(table.file)), set[int]()

    def read(group: int, pictures: bool) -> Any:
        batch = batches[group]
        if group not in checked:
            batch.validate(full=True)
            checked.add(group)
        return batch.select([name for name in batch.schema.names if (name == table.columns.image) == pictures])

    return read


def _batches(file: str) -> Iterator[Any]:
    arrow, ipc = pyarrow(), pyarrow("ipc")
    mapped = arrow.memory_map(file)
    try:
        yield from ipc.open_stream(mapped)
    except arrow.ArrowInvalid:
        # datasets writes streams; others write files, which a reader of streams refuses at once.
        mapped.seek(0)
        opened = ipc.open_file(mapped)
        yield from (opened.get_batch(number) for number in range(opened.num_record_batches))


def head(path: str) -> tuple[str, Columns, tuple[str, ...]]:
    """File, columns and names of classes, by the schema.

    Raises:
        ValueError: no picture, no caption, or no such file at all. OSError. ImportError: pyarrow is not installed.
    """
    file, asked = split(path)
    stamp_of(file)
    if file.lower().endswith(".parquet"):
        schema = pyarrow("parquet").read_schema(file)
    else:
        with pyarrow().memory_map(file) as mapped:
            try:
                schema = pyarrow("ipc").open_stream(mapped).schema
            except pyarrow().ArrowInvalid:
                mapped.seek(0)
                schema = pyarrow("ipc").open_file(mapped).schema
    features = _features(schema.metadata or {})
    typed = {name: one.get("_type") for name, one in features.items() if isinstance(one, dict)}
    wanted = {what: next((name for name in schema.names if typed.get(name) == kind), None)
              for what, kind in (("image", "Image"), ("class", "ClassLabel"))}
    columns = choose(schema.names, {**{what: name for what, name in wanted.items() if name}, **asked}, file)
    names = features.get(columns.label or "", {})
    names = names.get("names") if isinstance(names, dict) else None
    return file, columns, tuple(map(str, names)) if isinstance(names, list) else ()


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """What ``datasets`` says of its columns."""
    try:
        found = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def scan(path: str) -> Table:
    """Count the rows of a file by its metadata. Raises ImportError: pyarrow is not installed."""
    file, columns, stamp, counts = path, Columns("", None, None), (-1, 0), list[int]()
    classes: tuple[str, ...] = ()
    problems: list[tuple[str, str]] = []
    pyarrow()
    try:
        file, columns, classes = head(path)
        stamp = stamp_of(file)
        if file.lower().endswith(".parquet"):
            metadata = pyarrow("parquet").ParquetFile(file).metadata
            counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        else:
            counts = [batch.num_rows for batch in _batches(file)]
        # The metadata is a stranger's: with a negative count the starts would fall, and the search in them go wrong.
        if any(count < 0 for count in counts):
            raise ValueError("a negative number of rows")
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        said = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        problems.append((UNOPENED, f"{printable(file)}: {printable(said)}"))
        counts = []
    return Table(file, columns, classes, np.cumsum([0, *counts], dtype=np.int64), problems, stamp)


def files_of(folder: str) -> list[str]:
    """The arrow files of a ``datasets`` folder, in order; none where it is no such folder.

    Raises:
        ValueError: a folder of several splits, or one whose rows are chosen by a separate file.
    """
    splits = _json(os.path.join(folder, "dataset_dict.json")).get("splits")
    if isinstance(splits, list):
        shown = ", ".join(printable(os.path.join(folder, str(name))) for name in splits[:8])
        raise ValueError(f"{printable(folder)} holds the splits of a data set; name one of them: {shown}")
    state = _json(os.path.join(folder, "state.json"))
    listed = state.get("_data_files")
    if state.get("_indices_data_files"):
        raise ValueError(f"the rows of {printable(folder)} are chosen by a file of indices; write it by flatten_indices().save_to_disk() "
                         "again")
    if isinstance(listed, list):
        names = [str(one.get("filename")) for one in listed if isinstance(one, dict)]
        # Only the last part of a name, which could otherwise lead out of the folder.
        return [os.path.join(folder, os.path.basename(name)) for name in names]
    return sorted(entry.path for entry in os.scandir(folder) if entry.name.endswith(".arrow") and not entry.name.startswith("cache-"))


def _json(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(1 << 24))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def pyarrow(part: str | None = None) -> ModuleType:
    """pyarrow, or one of its modules. Raises ImportError."""
    try:
        import pyarrow as module
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("parquet and arrow files need pyarrow: pip install 'fastvlp[arrow]'") from error
    return getattr(module, part) if part else module
