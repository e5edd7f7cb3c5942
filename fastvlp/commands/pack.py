"""``fastvlp pack``: shards from any source."""

from __future__ import annotations

import argparse

from fastvlp.data.pack import pack
from fastvlp.data.shards import printable


def command(options: argparse.Namespace) -> int:
    """Write the shards, and say what was left out."""
    total, named = 0, 0

    def done(path: str, count: int) -> None:
        nonlocal total
        total += count
        print(f"{printable(path)}: {count:,} samples", flush=True)

    def skip(reason: str, name: str) -> None:
        nonlocal named
        named += 1
        if named <= options.named:
            print(f"left out, {reason}: {name}", flush=True)

    skipped = pack(options.data, options.out, options.samples, size=options.size, seed=options.seed, on_skip=skip, say=done)
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in skipped.most_common())
    print(f"{total:,} samples are in {options.out}" + (f"; left out: {reasons}" if reasons else ""))
    return 0 if total else 1
