"""``fastvlp profile``: how many tokens a recipe's data has, and what every part of its system computes for them.

With ``--steps`` it trains instead, and says what the training thread waits for (``fastvlp.commands.times``).
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastvlp.commands import times
from fastvlp.commands.train import from_arguments
from fastvlp.data.batch import Batch, Stage
from fastvlp.recipe import Recipe
from fastvlp.systems.flops import FlopCount
from fastvlp.systems.system import System
from fastvlp.train import Interrupted
from fastvlp.train.parallel import World
from fastvlp.train.start import counted, prepare
from fastvlp.train.step import named_part
from fastvlp_kernels.packed import Packed

SAMPLES = 64  # of the first batch: enough for a mean


@dataclass(frozen=True)
class Part:
    """One part of a system in one stage, per sample.

    Attributes:
        tokens: that come into it. forward, backward: operations, a multiply-add being 2; none backward where nothing below trains.
    """

    stage: int
    name: str
    tokens: float
    forward: float
    backward: float


@dataclass(frozen=True)
class Stream:
    """Tokens of one packed stream in one stage: per sample, and of the shortest and longest segment."""

    stage: int
    name: str
    tokens: float
    shortest: int
    longest: int


def command(options: argparse.Namespace) -> int:
    """Print the table of a recipe: what its parts compute, or with ``--steps`` what the training thread waits for."""
    recipe = counted(from_arguments(options.arguments), World(0, 1, torch.device("cpu")))
    if options.steps is None and options.trace is not None:
        raise ValueError("--trace is for steps; give --steps N too")
    if options.steps is None:
        print(table(*profile(recipe), recipe))
        return 0
    try:
        found = times.measure(recipe, options.steps, options.trace)
    except Interrupted as stopped:
        # As shells report what a signal ended.
        return 128 + stopped.signum
    if found is not None:
        print(times.table(found, recipe))
    return 0


def profile(recipe: Recipe) -> tuple[list[Stream], list[Part]]:
    """What the first samples of the recipe's data, prepared as in each of its stages, are and cost.

    Raises:
        ConfigError, FileNotFoundError: as training would.
    """
    # Without workers: a process more would take longer than the samples.
    few = min(SAMPLES, recipe.data.batch_size)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, batch_size=few, workers=0))
    system, data = prepare(recipe, World(0, 1, torch.device("cpu")))
    streams: list[Stream] = []
    parts: list[Part] = []
    for number, stage in enumerate(recipe.schedule.stages):
        data.stage_at = stage
        batch = next(iter(data))
        for name, stream in batch.streams.items():
            if isinstance(stream, Packed):
                streams.append(Stream(number, name, stream.total / few, int(stream.lengths.min()), int(stream.lengths.max())))
        parts += _parts(number, count(system, batch, stage), few)
    return streams, parts


def count(system: System, batch: Batch, stage: Stage) -> FlopCount:
    """The operations of one whole batch on one process; ``stage.frozen`` parts do not train."""
    batch = dataclasses.replace(batch, sizes=(len(batch),), counts=system.counts(batch))
    # Only those that this stage freezes, so that the recipe's own frozen parts stay so afterwards.
    frozen = [p for name in stage.frozen for p in named_part(system, name).parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    # Backward is told from what hangs on parameters, so that no graph has to be kept.
    with torch.no_grad(), FlopCount(system) as counted:
        system.objective(system.encode(batch), batch)
    for parameter in frozen:
        parameter.requires_grad_(True)
    return counted


def _parts(stage: int, counted: FlopCount, samples: int) -> list[Part]:
    rows: dict[str, Part] = {}
    for name, forward in counted.forward.items():
        own = _shortened(name)
        old = rows.get(own, Part(stage, own, counted.tokens.get(own, samples) / samples, 0.0, 0.0))
        backward = old.backward + counted.backward[name] / samples
        rows[own] = dataclasses.replace(old, forward=old.forward + forward / samples, backward=backward)
    return list(rows.values())


def _shortened(name: str) -> str:
    """``image.blocks.3.qkv`` as ``image.blocks.3``, ``image.patch`` as it is; the objective and what no module computes as ``itself``."""
    inside = re.match(r"(.*?\.\d+)(?:\.|$)", name)
    return inside[1] if inside else name or "itself"


def table(streams: Sequence[Stream], parts: Sequence[Part], recipe: Recipe) -> str:
    """Streams and parts as text, with the sum of each stage; equal neighbours of a list of blocks share a line."""
    width = max([len(row[0]) for number in range(len(recipe.schedule.stages)) for row in _together(parts, number)] + [len("part")]) + 2
    lines = [f"{'stage':<6}{'part':<{width}}{'tokens':>8}{'forward':>12}{'backward':>12}{'share':>8}    MFLOP a sample"]
    for number, stage in enumerate(recipe.schedule.stages):
        whole = sum(part.forward + part.backward for part in parts if part.stage == number)
        for name, many, part in _together(parts, number):
            each = f"{many} x" if many > 1 else ""
            lines.append(f"{number:<6}{name:<{width}}{part.tokens:>8.1f}{part.forward / 1e6:>12.2f}{part.backward / 1e6:>12.2f}"
                         f"{many * (part.forward + part.backward) / whole:>8.1%}    {each}".rstrip())
        forward = sum(part.forward for part in parts if part.stage == number)
        said = ", ".join(f"{one.name} {one.tokens:.1f} tokens a sample ({one.shortest} to {one.longest} a segment)"
                         for one in streams if one.stage == number)
        lines.append(f"stage {number}, up to {stage.until:.0%} of the steps: {said}: {forward / 1e6:.1f} MFLOP forward per sample, "
                     f"{whole / 1e6:.1f} in training")
    return "\n".join(lines)


def _together(parts: Sequence[Part], stage: int) -> list[tuple[str, int, Part]]:
    """Names, how many they are, and one of them: neighbours that cost the same are one row."""
    rows: list[tuple[str, int, Part]] = []
    for part in parts:
        if part.stage != stage:
            continue
        stem, _, last = part.name.rpartition(".")
        if rows and last.isdigit():
            name, many, before = rows[-1]
            # All numbers alike: where a block merges tokens, the later ones cost less and get rows of their own.
            same = dataclasses.replace(before, name=part.name) == part
            if same and before.name == f"{stem}.{int(last) - many}":
                rows[-1] = (f"{before.name}-{last}", many + 1, before)
                continue
        rows.append((part.name, 1, part))
    return rows
