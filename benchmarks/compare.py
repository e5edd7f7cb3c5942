"""What got slower or faster between two result files: ``python -m benchmarks compare A.csv B.csv``.

Rows match by operator, provider, size, mode and dtype. B is slower where its median grew by more than the stated share and its 20th
percentile lies above A's 80th, so that two runs whose middle samples overlap are never called different; faster likewise.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

KEY = ("op", "provider", "shape", "mode", "dtype")
TIMES = ("p20_ms", "p50_ms", "p80_ms")
MINIMAL = 0.05

Key = tuple[str, ...]


class UnreadableError(ValueError):
    """A file is not the CSV of a run; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Timing:
    """One row's milliseconds: median, 20th and 80th percentile, and who was measured where."""

    p20: float
    p50: float
    p80: float
    kind: str
    device: str


@dataclass(frozen=True)
class Change:
    """One matched row."""

    key: Key
    before: Timing
    after: Timing

    @property
    def ratio(self) -> float:
        """How many times as long it takes now."""
        return self.after.p50 / self.before.p50

    def verdict(self, minimal: float) -> str:
        """slower, faster or unchanged."""
        if self.ratio > 1 + minimal and self.after.p20 > self.before.p80:
            return "slower"
        if 1 / self.ratio > 1 + minimal and self.after.p80 < self.before.p20:
            return "faster"
        return "unchanged"


def read(path: Path) -> dict[Key, Timing]:
    """The timings of a result file by their key.

    Raises:
        UnreadableError: there is no such file, or it is not the CSV of a run.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in (*KEY, *TIMES) if name not in (reader.fieldnames or ())]
            if missing:
                raise UnreadableError(f"{path} has no column {', '.join(missing)}; compare reads the <op>.csv that "
                                      "python -m benchmarks run writes below benchmarks/results/<device>/")  # fmt: skip
            return _timings(path, enumerate(reader, 2))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file" if isinstance(error, UnicodeDecodeError) else error
        raise UnreadableError(f"cannot read {path}: {reason}; python -m benchmarks run --op OP --out FOLDER writes a new one") from error


def _timings(path: Path, lines: Iterable[tuple[int, dict[str, str]]]) -> dict[Key, Timing]:
    found: dict[Key, Timing] = {}
    for number, line in lines:
        key = tuple(line[name] or "" for name in KEY)
        if key in found:
            raise UnreadableError(f"{path}, line {number}: {' / '.join(key)} is there twice; keep the rows of one run")
        try:
            p20, p50, p80 = (float(line[name]) for name in TIMES)
        except (TypeError, ValueError):
            p20 = p50 = p80 = math.nan
        if not 0 < p20 <= p50 <= p80 < math.inf:
            raise UnreadableError(f"{path}, line {number}: p20_ms, p50_ms and p80_ms must be positive numbers that do not fall, and are "
                                  f"{', '.join(repr(line[name]) for name in TIMES)}; measure again")  # fmt: skip
        found[key] = Timing(p20, p50, p80, line.get("kind") or "", line.get("device") or "")
    if not found:
        raise UnreadableError(f"{path} has no rows; measure again")
    return found


def _table(changes: Sequence[Change], minimal: float) -> list[str]:
    header = (*KEY, "A ms (p20-p80)", "B ms (p20-p80)", "B / A", "")
    times = "{0.p50:.4g} ({0.p20:.4g}-{0.p80:.4g})"
    cells = [[*c.key, times.format(c.before), times.format(c.after), f"{c.ratio:.2f}x", c.verdict(minimal)] for c in changes]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in (header, *cells)]


def main(a: Path, b: Path, minimal: float = MINIMAL) -> int:
    """Print what changed from ``a`` to ``b``; 1 where something got slower, 2 where a file cannot be read or nothing matches."""
    try:
        if not 0 <= minimal < math.inf:
            raise UnreadableError(f"--minimal {minimal} is no share; give 0.05 for 5 %")
        before, after = read(a), read(b)
        if not before.keys() & after.keys():
            raise UnreadableError(f"{a} and {b} share no row ({', '.join(KEY)}); compare two runs of the same operator")
    except UnreadableError as error:
        print(error, file=sys.stderr)
        return 2
    changes = sorted((Change(key, before[key], after[key]) for key in before if key in after), key=lambda change: -change.ratio)
    print("\n".join(_table(changes, minimal)))
    for path, only in ((a, before.keys() - after.keys()), (b, after.keys() - before.keys())):
        for key in sorted(only):
            print(f"only in {path}: {' / '.join(key)}")
    devices = [sorted({timing.device for timing in rows.values()}) for rows in (before, after)]
    if devices[0] != devices[1]:
        print(f"measured on different devices: {', '.join(devices[0])} and {', '.join(devices[1])}")
    others = [change.ratio for change in changes if change.after.kind != "ours"]
    if others:
        print(f"rows that are not ours: {median(others):.2f}x as long (median of {len(others)}); a busy machine slows all alike")
    verdicts = [change.verdict(minimal) for change in changes]
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in ("slower", "faster", "unchanged"))
    print(f"{counts} (a change is more than {minimal:.0%} of the median, with the 20th to 80th percentiles apart)")
    return int("slower" in verdicts)
