"""Files that name the classes of zero-shot classification."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from fastvlp.data.shards import MINI

LARGEST = 1 << 26  # bytes; a million names have 20 MB
NAMED = {"mini:emoji": MINI / "emoji_classes.json"}


def load_classes(path: str | os.PathLike[str]) -> list[str]:
    """Class names from a JSON list, the keys of a JSON object, or the lines of a text file (empty lines left out).

    ``mini:emoji`` names the 1,903 classes of the shipped emoji.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no names, a name twice, or JSON of another form.
    """
    file = NAMED.get(str(path), Path(path))
    if not file.is_file():
        raise FileNotFoundError(f"no file of classes {str(path)!r}; give a JSON list, a JSON object or a text file, or {', '.join(NAMED)}")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; a list of classes has at most {LARGEST:,}")
    try:
        text = file.read_text(encoding="utf-8-sig")
        names = list(json.loads(text)) if text.lstrip()[:1] in ("[", "{") else [line.strip() for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is neither JSON nor lines of UTF-8 text: {error}") from error
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{file} must name its classes by strings that are not empty: a JSON list, the keys of a JSON object, or lines")
    names = [name.strip() for name in names]  # as the classes of samples are
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{file} names {len(twice)} classes more than once, for example {twice[0]!r}")
    return names
