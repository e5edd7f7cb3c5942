"""``fastvlp check``: what data holds, what of it cannot be used, and what it asks of a model, before anything is trained on it."""

from __future__ import annotations

import argparse
import hashlib
import html
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from fastvlp.commands.page import page, picture
from fastvlp.data.headers import inspect
from fastvlp.data.images import Unusable, decode, fit, fitted_size
from fastvlp.data.samples import Reader
from fastvlp.data.shards import Index, Shards, expand, printable
from fastvlp.data.tokenizer import Tokenizer, load_tokenizer

SHOWN, THUMB = 48, 160  # pictures on the page, and their longest side
NAMED = 3  # samples that are named for each reason
SHARES = (0, 5, 50, 95, 99, 100)  # percentiles
CUT = 0.01  # share of captions that may be cut for a length to be proposed
MICRO = 256  # samples of the micro-batch that budgets are proposed for


@dataclass
class Found:
    """What was seen of the samples that were looked at.

    Attributes:
        pieces, held: pieces of the data, and samples in them by their headers. looked: samples read.
        broken, names: by reason, how many there are, by headers and by what was read, and some of them.
        formats: of pictures. sizes: (width, height) of each. nbytes: of each.
        captions: of each usable sample. tokens: of each caption, uncut. classes: samples by class.
        pictures, texts: how often each picture and each first caption came.
        cards: of the page.
    """

    pieces: int = 0
    held: int = 0
    looked: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)
    pictures: Counter[bytes] = field(default_factory=Counter)
    texts: Counter[bytes] = field(default_factory=Counter)
    cards: list[str] = field(default_factory=list)

    def skip(self, reason: str, name: str) -> None:
        self.broken[reason] += 1
        if self.broken[reason] <= NAMED:
            self.names.setdefault(reason, []).append(name)

    @property
    def usable(self) -> int:
        return len(self.captions)


def command(options: argparse.Namespace) -> int:
    """Print what the data holds and write the page; 1 where nothing of it can be used."""
    if options.limit < 0 or options.length < 1 or options.size < 1 or options.patch < 1:
        raise ValueError(f"--limit is {options.limit}, --length {options.length}, --size {options.size}, --patch {options.patch}; the "
                         "first is at least 0, the others at least 1")
    found = look(options.data, load_tokenizer(options.tokenizer), options.limit)
    lines = report(found, options.length, options.size, options.patch)
    print("\n".join(lines))
    said = f"<pre>{html.escape(chr(10).join(lines))}</pre>"
    with open(options.out, "w", encoding="utf-8") as file:
        file.write(page(f"{' '.join(options.data)}: {found.usable:,} samples", said, found.cards))
    print(f"some of the pictures are in {options.out}")
    return 0 if found.usable else 1


def look(data: Shards, tokenizer: Tokenizer, limit: int = 0) -> Found:
    """Read samples, spread evenly over the data; 0: all of them.

    Raises:
        FileNotFoundError, ValueError: there is no such data.
    """
    found, paths = Found(), expand(data)
    index = Index(paths, found.skip)
    counts = [index.count(number) for number in range(len(paths))]
    found.pieces, found.held = len(paths), sum(counts)
    found.looked = min(limit or found.held, found.held)
    ends, reader = np.cumsum(counts), Reader(index)
    # Evenly and not the first ones, since data often lies sorted by where it came from.
    places = np.linspace(0, found.held - 1, found.looked).round().astype(int).tolist()
    shown = set(places[::max(1, len(places) // SHOWN)][:SHOWN])
    for place in places:
        shard = int(np.searchsorted(ends, place, side="right"))
        member = place - int(ends[shard]) + counts[shard]
        try:
            _look(found, reader, shard, member, tokenizer, place in shown)
        except Unusable as reason:
            found.skip(str(reason), reader.name(shard, member))
    return found


def _look(found: Found, reader: Reader, shard: int, member: int, tokenizer: Tokenizer, shown: bool) -> None:
    labels, data = reader.labels(shard, member), reader.picture(shard, member)
    # Decoded before anything is counted, so that what cannot be used counts as that alone.
    image, form = decode(data, reader.max_pixels), inspect(data).format
    ends = len(tokenizer.start) + len(tokenizer.end)
    found.formats[form] += 1
    found.sizes.append(image.size)
    found.nbytes.append(len(data))
    found.captions.append(len(labels.captions))
    found.tokens += [len(tokenizer.words(caption)) + ends for caption in labels.captions]
    if labels.name is not None:
        found.classes[labels.name] += 1
    # Eight bytes stand for a picture: a counter of whole ones would hold the data set in memory.
    found.pictures[hashlib.blake2b(data, digest_size=8).digest()] += 1
    found.texts[hashlib.blake2b(labels.captions[0].encode(), digest_size=8).digest()] += 1
    if shown:
        name = "" if labels.name is None else f" <small>{html.escape(printable(labels.name)[:100])}</small>"
        found.cards.append(f"{picture(fit(image, THUMB, 1))}<p>{html.escape(labels.captions[0][:300])}{name}</p>"
                           f"<small>{html.escape(reader.index.shard(shard).keys[member])}, {image.width} x {image.height}</small>")


def report(found: Found, length: int, size: int, patch: int) -> list[str]:
    """What was found, in lines.

    Args:
        length: tokens of a caption that a model would see. size, patch: pixels of a picture's longest side, and of a patch.
    """
    read = "all were read" if found.looked == found.held else f"{found.looked:,} were read, spread evenly"
    lines = [f"{found.held:,} samples in {found.pieces:,} pieces; {read}, {found.usable:,} of these can be used"]
    for reason, count in found.broken.most_common():
        some = ", ".join(found.names[reason]) + (", ..." if count > NAMED else "")
        lines.append(f"  {count:,} cannot: {reason} ({some})")
    if not found.usable:
        return lines
    widths, heights = np.array(found.sizes).T
    patches = np.array([math.prod(fitted_size(w, h, size, patch)) // patch**2 for w, h in found.sizes])
    tokens = np.array(found.tokens)
    formats = ", ".join(f"{name} {count / found.usable:.0%}" for name, count in found.formats.most_common())
    small = np.mean(np.maximum(widths, heights) < size)
    twice, again = (sum(count - 1 for count in counter.values()) for counter in (found.pictures, found.texts))
    lines += [
        f"pictures: {formats}; {np.sum(found.nbytes) / 1e6:,.1f} MB, {np.mean(found.nbytes) / 1e3:,.1f} kB each",
        f"  longest side in pixels: {_percentiles(np.maximum(widths, heights))}; {small:.1%} are smaller than {size}",
        f"  width / height: {_percentiles(widths / heights, '.2f')}",
        f"  patches of {patch} at {size} pixels: {_percentiles(patches)}; {patches.mean():.1f} on average",
        f"captions: {np.mean(found.captions):.2f} a sample; tokens: {_percentiles(tokens)}; {tokens.mean():.1f} on average",
        f"  {np.mean(tokens > length):.1%} are cut at {length} tokens; {_length(tokens)} tokens cut at most {CUT:.0%}",
        f"duplicates: {twice:,} pictures whose bytes came before, {again:,} first captions that came before",
    ]
    if found.classes:
        (name, most), *_ = found.classes.most_common(1)
        lines.append(f"classes: {len(found.classes):,} in {found.classes.total():,} samples, most often {printable(name)[:80]} ({most:,})")
    budget = ", ".join(f"{stream}: {_budget(each)}" for stream, each in (("image", patches), ("text", np.minimum(tokens, length))))
    lines.append(f"budgets of micro-batches of about {MICRO} samples: train.tokens={{{budget}}}")
    return lines


def _percentiles(values: np.ndarray, form: str = ".0f") -> str:
    found = np.percentile(values, SHARES)
    return ", ".join(f"{'least' if share == 0 else 'most' if share == 100 else f'{share}%'} {value:{form}}"
                     for share, value in zip(SHARES, found, strict=True))


def _length(tokens: np.ndarray) -> int:
    """The smallest length that no more than ``CUT`` of the captions exceed."""
    # A length that occurs; interpolation would give one between two.
    return int(np.quantile(tokens, 1 - CUT, method="higher"))


def _budget(each: np.ndarray) -> int:
    """Tokens for ``MICRO`` samples, in steps of 256; never less than the longest."""
    return max(-(-round(MICRO * float(each.mean())) // 256) * 256, int(each.max()))
