"""Which columns of a table hold the picture, the caption and the class."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from fastvlp.data.headers import Unusable
from fastvlp.data.labels import Labels, class_of, labels
from fastvlp.data.sources.piece import printable, read_picture

KNOWN = {  # as open_clip, img2dataset and Hugging Face's data sets call them; the first that there is counts
    "image": ("filepath", "file_path", "file_name", "filename", "image_path", "image", "img", "jpg", "jpeg", "png", "webp", "path",
              "picture", "image_bytes"),
    "caption": ("captions", "caption", "title", "text", "txt", "sentences", "sentence", "description", "alt_text"),
    "class": ("class", "label", "cls", "category"),
}
ASKED = re.compile(r"(.+?)\?((?:image|caption|class|sep)=[^&]*(?:&(?:image|caption|class|sep)=[^&]*)*)")


@dataclass(frozen=True)
class Columns:
    """Names of columns; a table has a caption or a class."""

    image: str
    caption: str | None
    label: str | None


def split(path: str) -> tuple[str, dict[str, str]]:
    """The file of ``pairs.csv?image=photo&caption=name&sep=;`` and what is asked of it."""
    # A file may itself be called so, and then it is meant.
    found = None if os.path.exists(path) else ASKED.fullmatch(path)
    return (path, {}) if found is None else (found[1], dict(part.split("=", 1) for part in found[2].split("&")))


def choose(names: Sequence[str], asked: Mapping[str, str], where: str) -> Columns:
    """Columns by the names that are asked for, else by those that are usual, in any case.

    Raises:
        ValueError: there is no picture, or neither caption nor class; says which columns there are.
    """
    # reversed, so that of two columns that differ in case alone the first one wins.
    folded = {name.strip().lower(): name for name in reversed(names)}
    found: dict[str, str | None] = {}
    for what, known in KNOWN.items():
        wanted = (asked[what].strip().lower(),) if what in asked else known
        found[what] = next((folded[name] for name in wanted if name in folded), None)
    image = found["image"]
    missing = "picture" if image is None else "caption and no class" if found["caption"] is None and found["class"] is None else None
    missing = missing or next((f"column {asked[what]!r}" for what, name in found.items() if what in asked and name is None), None)
    if missing or image is None:
        shown = ", ".join(printable(str(name)[:80]) for name in names[:40])
        raise ValueError(f"{printable(where)} has no {missing} among its columns {shown or '(none)'}; name them as in "
                         f"{os.path.basename(printable(where))}?image=COLUMN&caption=COLUMN (or &class=COLUMN)")
    return Columns(image, found["caption"], found["class"])


def labels_of(row: Mapping[str, Any], columns: Columns, classes: Sequence[str] = ()) -> Labels:
    """Captions and class of a row: a caption is a text, a list of texts, or JSON of one. Raises Unusable."""
    caption, name = row.get(columns.caption or ""), row.get(columns.label or "")
    if isinstance(caption, str) and caption[:1] == "[" and columns.caption and columns.caption.lower().endswith("s"):
        try:
            caption = json.loads(caption)
        except (ValueError, RecursionError):
            pass  # a caption that begins with a bracket
    if isinstance(name, int | float) and not isinstance(name, bool):  # below zero: none is known, as in test sets
        name = class_of(f"{name:g}" if isinstance(name, float) else str(name), classes) if name >= 0 else None
    return labels([caption if isinstance(caption, list | tuple) else [caption]], name)


def followed(path: Any, folder: str) -> bytes:
    """The picture that a table names by a path, from the table's folder or else from the working directory. Raises Unusable."""
    if not isinstance(path, str) or not path or "\0" in path:
        raise Unusable("no image")
    # Else a stranger's table could make this machine ask any address that it can reach.
    if "://" in path:
        raise Unusable("picture is an address, which is not fetched")
    for place in (os.path.join(folder, path), path):
        try:
            return read_picture(place)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise Unusable("picture file cannot be read") from error
    raise Unusable("picture file is missing")


class Rows(Sequence[str]):
    """The names of rows: their numbers, counted from 1."""

    def __init__(self, numbers: range | Sequence[int]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> Rows: ...
    def __getitem__(self, row: int | slice) -> str | Rows:
        return Rows(self.numbers[row]) if isinstance(row, slice) else f"row {self.numbers[row] + 1}"
