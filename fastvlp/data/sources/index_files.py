"""The index beside a shard: where its samples lie, so that a start need not read every header."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlp.data import remote
from fastvlp.data.sources.piece import printable
from fastvlp.data.unpack import cache_folder

if TYPE_CHECKING:
    from fastvlp.data.sources.tars import Shard

ENDING, VERSION = ".index.json", 1
LARGEST = 1 << 26  # bytes; one of 10,000 samples has a million
LONGEST, MOST, MOST_ARRAYS = 1 << 11, 1 << 19, 1 << 8  # of a name; of samples, problems and arrays, and of their names, as in shards

log = logging.getLogger(__name__)


def head_of(data: bytes) -> str:
    """What the first 4 KB of a shard are known by, which tell it from others of its size."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def dump(shard: Shard, head: str) -> bytes:
    """The index of a shard whose beginning is ``head``, as JSON."""
    prefix = f"{printable(shard.path)}: "
    return json.dumps({
        "version": VERSION, "size": shard.stamp[0], "head": head, "keys": shard.keys, "members": shard.members.ravel().tolist(),
        "arrays": {name: rows.ravel().tolist() for name, rows in shard.arrays.items()},
        "problems": [[reason, name.removeprefix(prefix)] for reason, name in shard.problems]}).encode()


def find(path: str, size: int, head: Callable[[], bytes]) -> dict[str, Any] | None:
    """What an index says of a shard of that size: keys, members, arrays and problems; None where there is none that fits it.

    It lies beside the shard, or, of a shard at an address whose headers were read before, in the folder of copies.
    """
    places: list[str | Path] = [path + ENDING]
    if remote.is_address(path):
        places.append(_own(path, size))
    for place in places:
        data = read(place)
        if data is None:
            continue
        found = _checked(data, path, size, head_of(head()))
        if found is not None:
            return found
        log.warning("%s is no index of its shard, whose headers are read instead", printable(str(place)))
    return None


def keep(path: str, size: int, data: bytes) -> None:
    """Keep the index of a shard at an address among the copies of this machine."""
    try:
        place = _own(path, size)
        # Under a name of this process first, so that no reader sees half an index.
        partial = place.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(data)
        os.replace(partial, place)
    except OSError as error:
        log.info("no index of %s is kept: %s", path, error)


def _own(path: str, size: int) -> Path:
    name = hashlib.blake2b(f"{path}\0{size}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return cache_folder() / f"{name}{ENDING}"


def read(place: str | Path) -> bytes | None:
    """An index as it was written; None where there is none."""
    try:
        if isinstance(place, str) and remote.is_address(place):
            return remote.read_whole(place, LARGEST)
        if os.stat(place).st_size > LARGEST:
            return b""  # of no shard
        return Path(place).read_bytes()
    except OSError:
        return None


def _checked(data: bytes, path: str, size: int, head: str) -> dict[str, Any] | None:
    """The index, unless it is of another shard or holds anything that no shard could: it may be a stranger's."""
    try:
        said = json.loads(data)
        if (said["version"], said["size"], said["head"]) != (VERSION, size, head):
            return None
        keys, problems, listed = said["keys"], said["problems"], said["arrays"]
        if max(len(keys), len(problems), sum(map(len, listed.values())) // 3) > MOST or len(listed) > MOST_ARRAYS:
            return None
        members = _numbers(said["members"], 8 * len(keys)).reshape(-1, 4, 2)
        arrays = {str(name): _numbers(rows, len(rows)).reshape(-1, 3) for name, rows in listed.items()}
        texts = (*keys, *arrays, *(part for one in problems for part in one))
        fits = all(isinstance(text, str) and len(text) <= LONGEST for text in texts) and all(len(one) == 2 for one in problems)
        fits &= _inside(members.reshape(-1, 2), size)
        for rows in arrays.values():
            number = rows[:, 0]
            fits &= bool((number >= 0).all() and (number < len(keys)).all() and (np.diff(number) > 0).all()) and _inside(rows[:, 1:], size)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    if not fits:
        return None
    return {"keys": [printable(key) for key in keys], "members": members, "arrays": arrays,
            "problems": [(printable(reason), f"{printable(path)}: {printable(name)}") for reason, name in problems]}


def _numbers(values: Any, count: int) -> np.ndarray:
    numbers = np.array(values)
    # Fractions and numbers beyond int64 are refused, too: NumPy makes other kinds of them.
    if numbers.shape != (count,) or (count and numbers.dtype.kind != "i"):
        raise ValueError("no numbers")
    return numbers.astype(np.int64)


def _inside(places: np.ndarray, size: int) -> bool:
    """Whether offsets and sizes lie within the shard; a size of -1 is a member that is not there."""
    offset, length = places[:, 0], places[:, 1]
    return bool(((offset >= 0) & (offset <= size) & (length >= -1) & (length <= size - offset)).all())
