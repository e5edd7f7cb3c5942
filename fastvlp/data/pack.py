"""Shards from any source: pictures as they are or smaller, captions, class and what else is known of a sample, with an index."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastvlp.data.headers import inspect
from fastvlp.data.images import Unusable, decode
from fastvlp.data.order import Order
from fastvlp.data.samples import Reader
from fastvlp.data.shards import Index, Shards, expand
from fastvlp.data.sources.tars import write_index

ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "AVIF": "avif", "TIFF": "tif", "BMP": "bmp"}
QUALITY = 92  # of a JPEG that is written

Member = tuple[str, bytes]


def pack(source: Shards, folder: str | os.PathLike[str], samples: int = 10_000, *, size: int | None = None, seed: int | None = None,
         on_skip: Callable[[str, str], None] = lambda reason, name: None, say: Callable[[str, int], None] = lambda path, count: None,
         ) -> Counter[str]:
    """Write shard-00000.tar, ... of so many samples each, and an index beside each.

    The same source and arguments give the same bytes. Pictures are copied, and are not decoded: ``fastvlp check`` does that.

    Args:
        size: pictures whose longest side is longer are scaled down to it and written as JPEG; what cannot be decoded is left out.
        seed: samples come in a random order of the whole source, else in its own.
        on_skip: hears (reason, name) of each sample that is left out. say: hears of each shard that is done, and of its samples.

    Returns:
        Samples left out by reason.

    Raises:
        FileExistsError: the folder holds shards. FileNotFoundError, ValueError: the source.
    """
    if samples < 1 or (size is not None and size < 1):
        raise ValueError(f"samples is {samples} and size is {size}; both are at least 1")
    skipped: Counter[str] = Counter()

    def skip(reason: str, name: str) -> None:
        skipped[reason] += 1
        on_skip(reason, name)

    index = Index(expand(source), skip)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise FileExistsError(f"{folder} holds shards already; name a new folder")
    found = _samples(index, seed, size, skip)
    for number in range(1 << 20):
        target = folder / f"shard-{number:05d}.tar"
        partial = target.with_suffix(".tar.partial")
        try:
            count = _write(partial, found, samples, number * samples)
            if count:
                os.replace(partial, target)
                write_index(str(target))
                say(str(target), count)
        finally:
            partial.unlink(missing_ok=True)
        if count < samples:
            break
    return skipped


def _write(path: Path, found: Iterator[list[Member]], most: int, first: int) -> int:
    """Up to ``most`` samples into one tar; returns how many there were."""
    count = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        while count < most and (members := next(found, None)) is not None:
            for ending, data in members:
                member = tarfile.TarInfo(f"{first + count:09d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            count += 1
    return count


def _samples(index: Index, seed: int | None, size: int | None, skip: Callable[[str, str], None]) -> Iterator[list[Member]]:
    reader = Reader(index)
    for shard, member in _places(index, seed):
        try:
            yield list(_members(reader, shard, member, size))
        except Unusable as reason:
            skip(str(reason), reader.name(shard, member))


def _places(index: Index, seed: int | None) -> Iterator[tuple[int, int]]:
    if seed is None:
        return ((shard, member) for shard in range(len(index.paths)) for member in range(index.count(shard)))
    total = sum(index.count(number) for number in range(len(index.paths)))
    if not total:
        return iter(())
    picks = Order(index, seed, total).take(0, total)
    return zip(picks.shard.tolist(), picks.member.tolist(), strict=True)


def _members(reader: Reader, shard: int, member: int, size: int | None) -> Iterator[Member]:
    """(ending, contents) of the members of one sample, the picture first. Raises Unusable."""
    data, labels = reader.picture(shard, member), reader.labels(shard, member)
    form = inspect(data).format
    if size is not None:
        image = decode(data, wanted=size)
        scale = size / max(image.size)
        if scale < 1:
            image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        written = io.BytesIO()
        image.save(written, "JPEG", quality=QUALITY)
        data, form = written.getvalue(), "JPEG"
    yield ENDINGS[form], data
    fields = {str(name): value for name, value in _values(reader, shard, member).items() if _is_json(value)}
    fields |= {"captions": list(labels.captions)} | ({"class": labels.name} if labels.name is not None else {})
    yield "json", json.dumps(fields, sort_keys=True).encode()
    arrays: dict[str, np.ndarray] = getattr(reader.index.shard(shard), "arrays", {})  # tars alone have some
    for name in sorted(arrays):
        array = reader.npy(shard, member, name)
        if array is not None:
            yield f"{name}.npy", array


def _is_json(value: Any) -> bool:
    """Not so are dates, and pictures of other columns."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _values(reader: Reader, shard: int, member: int) -> dict[str, Any]:
    try:
        return reader.values(shard, member)
    except Unusable:  # a broken .json beside a good caption
        return {}
