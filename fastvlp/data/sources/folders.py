"""Folders of pictures: a .txt or .json beside each (img2dataset's files), or in a folder for each class (torchvision's ImageFolder)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from fastvlp.data.headers import Unusable
from fastvlp.data.labels import MAX_TEXT, Labels, json_object, labels, parse
from fastvlp.data.sources.piece import IMAGES, UNOPENED, Opened, class_names, printable, read_picture
from fastvlp.data.unpack import Stamp

TABLES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv", "captions.tsv", "captions.txt")  # of all pictures of a folder
MOST_FILES = 1 << 23
TEXT, JSON = 1, 2


class Names(Sequence[str]):
    """Paths within a folder, as they may be shown."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> Names: ...
    def __getitem__(self, number: int | slice) -> str | Names:
        return Names(self.names[number]) if isinstance(number, slice) else printable(self.names[number])


@dataclass(frozen=True)
class Folder:
    """The pictures beneath a folder.

    Attributes:
        names: of the pictures, from the folder on, sorted. texts: uint8 [n], which of .txt (1) and .json (2) lie beside.
        classes: of the folders in it by their names, where nothing lies beside any picture.
    """

    root: str
    names: list[str]
    texts: np.ndarray
    classes: dict[str, str]
    problems: list[tuple[str, str]]
    stamp: Stamp

    @property
    def keys(self) -> Names:
        return Names(self.names)

    @property
    def nbytes(self) -> int:
        return sum(120 + len(name) for name in self.names) + self.texts.nbytes

    def open(self) -> Opened:
        return _Open(self)


class _Open(Opened):
    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def labels(self, member: int) -> Labels:
        if self.folder.classes:
            return labels([], self.folder.classes[self.folder.names[member].split("/", 1)[0]])
        return parse(self._beside(member, TEXT, ".txt"), self._beside(member, JSON, ".json"))

    def picture(self, member: int) -> bytes:
        try:
            return read_picture(os.path.join(self.folder.root, self.folder.names[member]))
        except OSError as error:
            raise Unusable("picture file cannot be read") from error

    def values(self, member: int) -> dict[str, Any]:
        return json_object(self._beside(member, JSON, ".json"))

    def _beside(self, member: int, which: int, ending: str) -> bytes | None:
        if not self.folder.texts[member] & which:
            return None
        stem = os.path.splitext(self.folder.names[member])[0]
        data = read_picture(os.path.join(self.folder.root, stem + ending))
        if len(data) > MAX_TEXT:
            raise Unusable("caption file is too large")
        return data


def table_in(folder: str) -> str | None:
    """The table of captions that lies in a folder of pictures, if one does."""
    return next((path for name in TABLES if os.path.isfile(path := os.path.join(folder, name))), None)


def holds_pictures(folder: str) -> bool:
    """Whether there is a picture anywhere beneath a folder."""
    return any(_is_picture(name) for _, name in _walk(folder))


def scan(path: str) -> Folder:
    """List the pictures beneath a folder; links to folders are not followed."""
    names: list[str] = []
    beside: dict[str, int] = {}
    problems: list[tuple[str, str]] = []
    for inside, name in _walk(path):
        whole = f"{inside}{name}"
        stem, ending = os.path.splitext(whole)
        if _is_picture(name):
            names.append(whole)
        elif ending in (".txt", ".json"):
            beside[stem] = beside.get(stem, 0) | (TEXT if ending == ".txt" else JSON)
        if len(names) + len(beside) > MOST_FILES:
            problems.append(("folder has too many files", printable(path)))
            break
    if not os.path.isdir(path):
        problems.append((UNOPENED, f"{printable(path)}: not a folder"))
    texts = np.array([beside.get(os.path.splitext(name)[0], 0) for name in names], np.uint8)
    classes: dict[str, str] = {}
    if not texts.any():
        inside_one = [name for name in names if "/" in name]
        folders = sorted({name.split("/", 1)[0] for name in inside_one})
        titles = class_names(path)
        classes = dict(zip(folders, titles if len(titles) == len(folders) else folders, strict=True))
        problems += [("no caption", f"{printable(path)}: {printable(name)}") for name in names if "/" not in name]
        names, texts = inside_one, np.zeros(len(inside_one), np.uint8)
    # A folder has no size of its own that tells it from a changed one; the names in it stand for that.
    known = hashlib.blake2b("\0".join(names).encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return Folder(path, names, texts, classes, problems, (int.from_bytes(known, "big"), 0))


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGES and not name.startswith(".")


def _walk(root: str) -> Iterator[tuple[str, str]]:
    """(folder from the root on, "" or ending in /, and name) of all files, folders and names sorted."""
    for folder, folders, files in os.walk(root):
        # In place, since os.walk goes on into what is left in this very list.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in sorted(files):
            yield "" if inside == "." else f"{inside}/", name
