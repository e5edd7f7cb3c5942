"""``fastvlp index``: where the samples of shards lie, written once beside them."""

from __future__ import annotations

import argparse

from fastvlp.data import sources
from fastvlp.data.shards import expand, printable
from fastvlp.data.sources.tars import write_index
from fastvlp.data.tar import BrokenTar


def command(options: argparse.Namespace) -> int:
    """Write the indices that are missing or of another shard, and say what the shards hold."""
    samples = problems = written = refused = 0
    paths = expand(options.data)
    other = next((path for path in paths if not sources.is_shard(path)), None)
    if other is not None:
        raise ValueError(f"{printable(other)} is no shard, and shards alone have an index; fastvlp pack makes shards of it")
    for path in paths:
        try:
            shard, new = write_index(path)
        except (BrokenTar, OSError) as error:
            refused += 1
            print(f"{printable(path)}: {getattr(error, 'strerror', None) or error}")
            continue
        samples, problems, written = samples + len(shard.keys), problems + len(shard.problems), written + new
        for reason, name in shard.problems[:3]:
            print(f"{reason}: {name}")
    print(f"{samples:,} samples in {len(paths) - refused:,} shards, {problems:,} that cannot be used; {written:,} indices written")
    return 1 if refused else 0
