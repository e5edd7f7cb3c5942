"""Shards with damage of every kind among healthy samples: what is broken is counted and named, and nothing else is lost."""

from __future__ import annotations

import functools
import io
import itertools
import json
import random
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

Members = dict[str, bytes]  # extension -> contents of one sample
Damage = Callable[[Members, random.Random], None]
SAMPLES, SHARDS = (5, 40), (1, 4)
LIMIT = 1 << 22  # pixels; the shipped pictures have far fewer, the bomb has more


@functools.cache
def sound() -> list[Members]:
    """The samples of one shipped shard."""
    from fastvlp.data import expand

    found: list[Members] = []
    with tarfile.open(expand("mini:val-openclipart")[0]) as tar:
        for member in itertools.islice(tar, 3 * SAMPLES[1]):
            extension = member.name.rpartition(".")[2]
            if not found or extension in found[-1]:
                found.append({})
            file = tar.extractfile(member)
            assert file is not None
            found[-1][extension] = file.read()
    return [members for members in found if {"webp", "json"} <= members.keys()]


def _bomb() -> bytes:
    """A PNG of a few bytes that announces more pixels than are allowed."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _set(extension: str, make: Callable[[bytes, random.Random], bytes]) -> Damage:
    def damage(members: Members, draw: random.Random) -> None:
        if extension == "json":
            members.pop("txt", None)
        members[extension] = make(members[extension], draw)

    return damage


def _drop(*extensions: str) -> Damage:
    def damage(members: Members, draw: random.Random) -> None:
        for extension in extensions:
            members.pop(extension, None)

    return damage


BROKEN: dict[str, Damage] = {  # what can never be used
    "image cut short": _set("webp", lambda data, draw: data[: draw.randrange(int(0.8 * len(data)))]),
    "a page instead of the image": _set("webp", lambda data, draw: b"<html><body>404</body></html>"),
    "image empty": _set("webp", lambda data, draw: b""),
    "noise instead of the image": _set("webp", lambda data, draw: draw.randbytes(len(data))),
    "too many pixels": _set("webp", lambda data, draw: _bomb()),
    "json cut short": _set("json", lambda data, draw: data[: draw.randrange(len(data) - 1)]),
    "json is a list": _set("json", lambda data, draw: b"[1, 2]"),
    "no captions": _set("json", lambda data, draw: json.dumps({"captions": draw.choice(([], [""], [" \n"], [3], None))}).encode()),
    "json is not UTF-8": _set("json", lambda data, draw: b'{"captions": ["\xff\xfe"]}'),
    "no image": _drop("webp"),
    "no caption": _drop("json", "txt"),
}
DOUBTFUL: Damage = _set("webp", lambda data, draw: bytes(  # a decoder may or may not notice
    byte ^ (1 << draw.randrange(8)) if draw.random() < 3 / len(data) else byte for byte in data))  # fmt: skip


class Shards:
    """Shards written from one seed. ``healthy`` must come out, ``broken`` (name -> what was done) must be named, ``doubtful`` either;
    ``cut`` are shards whose rest is lost and has to be reported."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.draw, self.paths = random.Random(seed), [folder / f"{number}.tar" for number in range(random.Random(seed).randint(*SHARDS))]
        self.healthy: set[str] = set()
        self.doubtful: set[str] = set()
        self.broken: dict[str, str] = {}
        self.cut: dict[str, str] = {}
        for path in self.paths:
            self._write(path)

    @property
    def faults(self) -> int:
        return len(self.broken) + len(self.doubtful) + len(self.cut)

    def _write(self, path: Path) -> None:
        draw, buffer = self.draw, io.BytesIO()
        names = [f"{path.stem}-{number:03d}" for number in range(draw.randint(*SAMPLES))]
        first_cut = draw.randrange(1, len(names)) if draw.random() < 0.3 else None
        place, form = 0, draw.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for number, key in enumerate(names):
                place = buffer.tell() if number == first_cut else place
                lost = first_cut is not None and number >= first_cut
                members = dict(draw.choice(sound()))
                if not lost:
                    self._damage(f"{path}: {key}", members)
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        whole = bytearray(buffer.getvalue())
        if first_cut is not None:
            if draw.random() < 0.5:
                del whole[place + draw.randrange(1, 512):]
                self.cut[str(path)] = "cut short"
            else:
                whole[place : place + 512] = draw.randbytes(512)
                self.cut[str(path)] = "a broken header"
        path.write_bytes(whole)

    def _damage(self, name: str, members: Members) -> None:
        luck = self.draw.random()
        if luck < 0.45:
            what = self.draw.choice(list(BROKEN))
            BROKEN[what](members, self.draw)
            self.broken[name] = what
        elif luck < 0.5:
            DOUBTFUL(members, self.draw)
            self.doubtful.add(name)
        else:
            self.healthy.add(name)


def case(seed: int, folder: Path, device: torch.device) -> int:
    """A few damaged shards, read one after the other and as a stream for one epoch; returns the number of faults.

    Raises:
        AssertionError: a healthy sample did not come out, a broken one did, or one was not counted and named exactly once.
    """
    from fastvlp.data.samples import samples

    shards, named = Shards(seed, folder), list[tuple[str, str]]()
    if not shards.healthy:
        return 0  # a stream of nothing but broken samples ends with an error, as it should
    keys = {name.rpartition(" ")[2]: name for name in (*shards.healthy, *shards.doubtful, *shards.broken)}
    read = [sample.key for sample in samples([str(path) for path in shards.paths], LIMIT, lambda *skip: named.append(skip))]
    _check("one by one", shards, [keys.get(key, key) for key in read], named)
    assert len(read) == len(set(read)), f"one by one: {[key for key, count in Counter(read).items() if count > 1]} came out twice"

    skipped: list[tuple[str, str]] = []
    delivered, counted = _epoch(shards.paths, seed, skipped)
    _check("as a stream", shards, [keys.get(key, key) for key in delivered], skipped)
    reasons = Counter(reason for reason, _ in skipped)
    assert counted == reasons, f"as a stream: counted {sorted(counted.items())}, named {sorted(reasons.items())}"
    assert sorted(named) == sorted(skipped), f"one by one and as a stream differ: {sorted(set(named) ^ set(skipped))}"
    return shards.faults


def _epoch(paths: list[Path], seed: int, skipped: list[tuple[str, str]]) -> tuple[list[str], Counter[str]]:
    """The keys of one epoch of the stream, and what it counted."""
    from fastvlp.data import Caption, Image, Stage, Stream, load_tokenizer
    from fastvlp.data.fields import bind

    fields = bind({"image": Image(32, 16), "text": Caption(24)}, None, load_tokenizer("mini"))
    stream = Stream([str(path) for path in paths], fields, batch_size=1, seed=seed, stage_at=Stage(), max_pixels=LIMIT,
                    on_skip=lambda *skip: skipped.append(skip))  # fmt: skip
    batches = itertools.islice(stream, stream.sizes()[0])
    return [key for batch in batches for key in batch.keys], Counter(stream.skipped)


def _check(how: str, shards: Shards, delivered: list[str], named: list[tuple[str, str]]) -> None:
    out, names = set(delivered), Counter(name for _, name in named)
    lost = sorted(shards.healthy - out)
    assert not lost, f"{how}: {len(lost)} healthy samples did not come out, the first is {lost[0]}"
    blamed = sorted(shards.healthy & names.keys())
    assert not blamed, f"{how}: {blamed[0]} is healthy and was named: {[skip for skip in named if skip[1] == blamed[0]]}"
    for name, what in shards.broken.items():
        assert name not in out and names[name] == 1, f"{how}: {name} ({what}) was {'used' if name in out else f'named {names[name]} times'}"
    for name in shards.doubtful:
        assert (name in out) != (names[name] == 1), f"{how}: {name} was used {name in out} and named {names[name]} times"
    for path, what in shards.cut.items():
        reports = [skip for skip in named if skip[1].startswith(path) and skip[0] in ("shard is cut short", "broken tar header")]
        assert reports, f"{how}: nobody was told that {path} has {what}"
