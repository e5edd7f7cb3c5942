"""What is written about a picture: captions and a class; what cannot be used says why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastvlp.data.headers import Unusable

MAX_TEXT = 1 << 20  # bytes
REASONS = NOT_UTF8, EMPTY = "caption is not UTF-8", "caption is empty"  # the nearest first


@dataclass(frozen=True)
class Labels:
    """What is written about a picture: its captions (at least one), its class or None, and a stable non-negative hash of the class,
    or of the first caption where there is no class."""

    captions: tuple[str, ...]
    name: str | None
    id: int


def parse(text: bytes | None, metadata: bytes | None, number: bytes | None = None, classes: Sequence[str] = ()) -> Labels:
    """Labels from the contents of .txt, .json and .cls, the number of one of the ``classes``.

    Captions are the list "captions" of the JSON, or else the text, or else the string "caption" of the JSON: the first of these that
    holds one; where there is none, the class is the caption. Captions in a list that are empty or no text are left out.

    Raises:
        Unusable: none of them holds a caption; says what came nearest (text that is not UTF-8, empty, JSON that is broken).
    """
    fields, problem = _object(metadata)
    listed, name = fields.get("captions"), fields.get("class")
    if number is not None and not isinstance(name, str):
        name = class_of(number.strip().decode("ascii", "replace"), classes)
    return labels([listed if isinstance(listed, list) else [], [text], [fields.get("caption")]], name, problem)


def labels(sources: Sequence[Sequence[Any]], name: Any, problem: str | None = None) -> Labels:
    """Labels from lists of captions (bytes or strings; what is neither is left out), of which the first that holds one counts.

    Args:
        name: of the class; what is no text is none.

    Raises:
        Unusable: there is neither a caption nor a class; says what came nearest, ``problem`` where it was nothing.
    """
    name = name.strip() if isinstance(name, str) and name.strip() and _is_text(name) else None
    reasons = []
    for source in sources:
        kept, reason = _captions(source)
        if kept:
            break
        reasons.append(reason)
    else:
        if name is None or any(reasons):
            raise Unusable(next((reason for reason in REASONS if reason in reasons), problem or "no caption"))
        kept = (name.replace("_", " "),)
    digest = hashlib.blake2b((name or kept[0]).lower().encode(), digest_size=8).digest()
    return Labels(kept, name, int.from_bytes(digest, "big") >> 1)


def class_of(number: str, classes: Sequence[str]) -> str:
    """The name of a class by its number. Raises Unusable."""
    if not classes and number:
        return number
    if not (number.isdecimal() and len(number) < 10 and int(number) < len(classes)):
        raise Unusable("no class has this number")
    return classes[int(number)]


def json_object(metadata: bytes | None) -> dict[str, Any]:
    """The fields of a JSON object, none where there is none. Raises Unusable."""
    fields, problem = _object(metadata)
    if problem is not None:
        raise Unusable(problem)
    return fields


def _object(metadata: bytes | None) -> tuple[dict[str, Any], str | None]:
    """The fields of a JSON object, none if it is another value; and what is wrong if it is no JSON."""
    if metadata is None:
        return {}, None
    try:
        fields = json.loads(metadata)
    except (ValueError, RecursionError):
        return {}, "json is broken"
    return (fields if isinstance(fields, dict) else {}), None


def _captions(source: Sequence[Any]) -> tuple[tuple[str, ...], str | None]:
    """The captions among some values, and why there are none."""
    strings, reason = [], None
    for value in source:
        if isinstance(value, bytes):
            try:
                value = value.decode("utf-8-sig")
            except UnicodeDecodeError:
                return (), NOT_UTF8
        if isinstance(value, str):
            strings.append(value.strip())
            reason = reason or EMPTY
    kept = tuple(string for string in strings if string and _is_text(string))
    return kept, NOT_UTF8 if any(strings) else reason


def _is_text(caption: str) -> bool:
    """Neither NULs (UTF-16 read as UTF-8) nor lone surrogates (broken escapes in JSON)."""
    try:
        return b"\0" not in caption.encode("utf-8")
    except UnicodeEncodeError:
        return False
