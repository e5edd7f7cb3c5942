"""What a system's ``encode`` gives for a whole set, for episodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastvlp.data.batch import Stage
from fastvlp.data.images import MAX_PIXELS
from fastvlp.data.loader import Loader, Request
from fastvlp.data.order import Picks
from fastvlp.data.patches import mix
from fastvlp.data.shards import Shards, expand
from fastvlp.evaluate.reading import Alone, How, Ranks
from fastvlp.systems.system import Outputs, System
from fastvlp_kernels.packed import Packed

PLAIN = Stage(keep=1.0, augment=0.0)


@torch.no_grad()
def encode_all(system: System, shards: Shards, batch_size: int = 256, world: Ranks | None = None,
               beat: Callable[[], object] = lambda: None, workers: int = 0, timeout: float = 0) -> Outputs:
    """The outputs of ``encode`` for all samples in the order of the files, on the CPU; with several processes a collective call.

    Fields are called without augmentation and with all patches, as far as they leave that open, and with the same random words every
    time. A sample that cannot be used is replaced by another, as in training, so that there is a row for each. Losses (``*_loss``) are
    left out.

    Args:
        timeout: seconds to wait for a worker, 0 for ever.

    Raises:
        FileNotFoundError: the shard list matches nothing. ValueError: it holds no sample. RuntimeError: hardly any can be used, a worker
        died, or did not answer within ``timeout``.
    """
    how = How(batch_size, world or Alone(), workers, beat, timeout)
    loader = Loader([(expand(shards), system.fields)], MAX_PIXELS, cache_bytes=0)
    index = loader.readers[0].index
    places = np.array([(shard, member) for shard in range(len(index.paths)) for member in range(index.count(shard))], dtype=np.int64)
    if not len(places):
        raise ValueError(f"no shard of {shards!r} holds a sample with a picture and a caption")
    # Random words are a function of the sample's place alone, so that an episode gives the same on any number of processes.
    words = mix(np.zeros(len(places), dtype=np.uint64), np.arange(len(places)))
    # Another sample, never the sample itself.
    others = (np.arange(len(places)) + 1 + (words % np.uint64(max(1, len(places) - 1))).astype(np.int64)) % len(places)
    device = next(system.parameters()).device
    mine = {}
    requests = []
    for number, rows in how.share(np.array_split(np.arange(len(places)), range(batch_size, len(places), batch_size))):
        picks = Picks(places[rows, 0], places[rows, 1], words[rows], places[others[rows]])
        requests.append((number, Request(max(0, number), PLAIN, 0, picks, ())))
    for number, flat in how.loaded(loader, requests, loader.guard):
        batch = flat.batch((), 0)
        # encode may divide by them, though its losses are not asked for here.
        batch = dataclasses.replace(batch, counts=system.counts(batch)).to(device)
        # On the CPU, as those of a whole training set may not fit on the device.
        mine[number] = {name: value.to("cpu") for name, value in system.encode(batch).items() if not name.endswith("_loss")}
    parts = how.together(mine)
    return {name: _joined([part[name] for part in parts]) for name in parts[0]}


def _joined(values: list[Tensor | Packed]) -> Tensor | Packed:
    return Packed.cat(values) if isinstance(values[0], Packed) else torch.cat(values)  # type: ignore[arg-type]
