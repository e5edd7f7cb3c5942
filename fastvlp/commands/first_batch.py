"""``fastvlp train --dry-run``: the recipe, the first batch as the model sees it, and what a step costs, before anything runs."""

from __future__ import annotations

import argparse
import html
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvlp.commands import plan
from fastvlp.commands.page import page, picture
from fastvlp.commands.strategies import Cluster
from fastvlp.commands.train import from_arguments
from fastvlp.config import dump
from fastvlp.data.batch import Batch
from fastvlp.data.tokenizer import Tokenizer
from fastvlp.systems.system import System
from fastvlp.train.parallel import World
from fastvlp.train.start import counted, prepare
from fastvlp_kernels.packed import Packed

SHOWN = 64  # samples on the page
GPU = 80 * plan.GB  # bytes of the device that is priced where this machine has none
DROPPED = 224  # grey of a patch that the model does not see


def command(options: argparse.Namespace) -> int:
    """Print what would be trained and what it costs, and write the page."""
    world = World(0, 1, torch.device("cpu"))
    recipe = counted(from_arguments(options.arguments), world)
    print(dump(recipe))
    # One batch is made here sooner than workers would start.
    system, stream = prepare(replace(recipe, data=replace(recipe.data, workers=0)), world)
    batch = next(iter(stream))
    print(f"first batch: {len(batch)} samples")
    for name, entries in batch.streams.items():
        print(f"  {name}: {_shape(entries)}")
    for reason, count in stream.skipped.items():
        print(f"  {count} samples were replaced: {reason}")
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else GPU
    alone = Cluster(1)
    print(f"\non one GPU of {memory / plan.GB:.0f} GB:\n{plan.table(plan.plan(recipe, alone, memory), recipe, alone, memory)}")
    target = Path(recipe.run.dir) / f"{recipe.run.name}.first-batch.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(shown(recipe.run.name, batch, system), encoding="utf-8")
    print(f"\nnothing was trained; the first batch as the model sees it is in {target}")
    return 0


def _shape(stream: Tensor | Packed) -> str:
    kind = str((stream.x if isinstance(stream, Packed) else stream).dtype).removeprefix("torch.")
    if isinstance(stream, Tensor):
        return f"{kind} {list(stream.shape)}"
    lengths = stream.lengths.float()
    return (f"{kind} {list(stream.x.shape)}, {len(stream)} segments of {int(lengths.min())} to {int(lengths.max())} tokens, "
            f"{lengths.mean():.1f} on average")


def shown(title: str, batch: Batch, system: System) -> str:
    """A page of the first samples of a batch: pictures put together from their patches, captions token by token."""
    cards = [f"<small>{html.escape(batch.keys[number])}</small>{''.join(_card(batch, system, number))}"
             for number in range(min(SHOWN, len(batch)))]
    said = f"<p>{len(cards)} of {len(batch)} samples; grey patches are not shown to the model.</p>"
    return page(f"{title}: the first batch", said, cards)


def _card(batch: Batch, system: System, number: int) -> Iterator[str]:
    one = batch.take([number])
    for name, stream in one.streams.items():
        segments = list(stream.segments()) if isinstance(stream, Packed) else []
        places = stream.pos.split(stream.lengths.tolist()) if isinstance(stream, Packed) and stream.pos is not None else []
        for x, pos in zip(segments, places, strict=bool(places)):
            yield f"<p><b>{html.escape(name)}</b> <small>{len(x)} tokens</small><br>"
            if x.dtype == torch.uint8:
                yield _picture(x.numpy(), pos.numpy())
            elif x.dtype == torch.int64 and system.tokenizer is not None:
                yield _words(x.tolist(), system.tokenizer)
            yield "</p>"


def _picture(patches: np.ndarray, pos: np.ndarray) -> str:
    """uint8 [n, P*P*3] at (frame, row, column), as a picture whose missing patches are grey."""
    side = int((patches.shape[1] // 3) ** 0.5)
    # As large as the last patch that is left: of rows that were dropped below it nothing is known.
    _, rows, columns = (int(most) + 1 for most in pos.max(0))
    canvas = np.full((rows, side, columns, side, 3), DROPPED, np.uint8)
    for patch, (_, row, column) in zip(patches, pos, strict=True):
        canvas[row, :, column] = patch.reshape(side, side, 3)
    return picture(canvas.reshape(rows * side, columns * side, 3))


def _words(ids: list[int], tokenizer: Tokenizer) -> str:
    # Ids behind the vocabulary are the field's (a hidden word, ends), which no tokenizer can name.
    known = [tokenizer.core.decode([number], skip_special_tokens=False) if number < tokenizer.vocab_size else f"[{number}]"
             for number in ids]
    return "".join(f"<i>{html.escape(word)}</i>" for word in known)
