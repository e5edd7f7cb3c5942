"""``fastvlp profile --steps``: what the training thread waits for, over some steps of the loop that trains."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from torch.profiler import ProfilerActivity

from fastvlp.recipe import Eval, Recipe
from fastvlp.train import agreement, spans
from fastvlp.train.interrupt import StopRequest, Watchdog
from fastvlp.train.log import Log
from fastvlp.train.loop import Fit
from fastvlp.train.memory import keep_freed_memory
from fastvlp.train.parallel import World, join
from fastvlp.train.progress import Progress
from fastvlp.train.start import prepare
from fastvlp.train.step import Trainer

WARM, TRACED = 5, 3  # steps before those that count, and after them for a trace, which makes steps slower
ORDER = (spans.DATA, spans.COPY, spans.FORWARD, spans.BACKWARD, spans.UPDATE, spans.PROCESSES, spans.DEVICE, spans.LOGGING, "")


@dataclass(frozen=True)
class Times:
    """What some steps took on one process.

    Attributes:
        steps: of each, the seconds by name (``fastvlp.train.spans``; "": what has no name), without checkpoints. checkpoints: the seconds
            of each one. waits: of every process, the seconds a step that it waited for others. where: device and number of processes.
    """

    steps: list[dict[str, float]]
    checkpoints: list[float]
    waits: list[float]
    where: str


def measure(recipe: Recipe, steps: int, trace: str | None = None) -> Times | None:
    """The first steps of a run whose folder is removed afterwards; under torchrun a collective call.

    Args:
        steps: that count, behind ``WARM`` others. trace: where a Chrome trace (chrome://tracing, Perfetto) of ``TRACED`` more steps goes.

    Returns:
        The times of the first process, and None on the others.

    Raises:
        ConfigError, FileNotFoundError, TrainingError, Interrupted: as training does. ValueError: the recipe is shorter than that.
    """
    until = WARM + steps + (TRACED if trace else 0)
    if not 0 < steps <= recipe.steps - (until - steps):
        raise ValueError(f"--steps is {steps}; it is at least 1, and with {until - steps} others at most the {recipe.steps} of the recipe")
    if trace is not None and not Path(trace).parent.is_dir():
        raise ValueError(f"--trace is {trace}, and there is no folder {Path(trace).parent}")
    recipe = replace(recipe, eval=Eval(), run=replace(recipe.run, resume="none", log=()))
    with StopRequest() as stop, Watchdog(recipe.run.timeout, stop) as watchdog, join(recipe.run.device, recipe.run.timeout) as world, \
            _folder(recipe, world) as folder:
        # As training does, so that a step costs here what it costs there.
        if world.device.type == "cpu":
            keep_freed_memory()
        # A process that failed here alone would leave the others waiting in the first collective.
        system, stream = agreement.all_or_none(world, lambda: prepare(recipe, world))
        trainer, first = Trainer(recipe, system.to(world.device), world, len(stream.sources)), world.rank == 0
        log = Log(folder, recipe, 0, enabled=first)
        progress = Progress(until, recipe.train.print_every, sys.stderr, enabled=first)
        fit = Fit(recipe, trainer, stream, folder, "", log, progress, stop, watchdog, until)
        with contextlib.closing(log), contextlib.closing(progress), spans.recording() as recorder, \
                _traced(recorder, trace if first else None, WARM + steps):
            fit.run(perf_counter())
        checkpoints = [step.pop(spans.CHECKPOINT) for step in recorder.steps if spans.CHECKPOINT in step]
        counted = recorder.steps[WARM:WARM + steps]
        # On all processes, as it is a collective, although only the first reports.
        waits = world.gather(sum(step.get(spans.PROCESSES, 0.0) for step in counted) / steps)
        return Times(counted, checkpoints, waits, f"{world.size} x {world.device.type}") if first else None


@contextlib.contextmanager
def _folder(recipe: Recipe, world: World) -> Iterator[Path]:
    """Where the checkpoints of training would lie, so that they take as long."""
    # Told by the first process, since each has an id of its own.
    folder = world.told(Path(recipe.run.dir) / f".profile-{os.getpid()}")
    # Asked before it is made, so that a folder that was there stays.
    fresh = not folder.parent.exists()
    if world.rank == 0:
        folder.mkdir(parents=True)
    # Nobody writes before it is there.
    world.wait()
    try:
        yield folder
    finally:
        if world.rank == 0:
            shutil.rmtree(folder.parent if fresh else folder)


@contextlib.contextmanager
def _traced(recorder: spans.Recorder, path: str | None, first: int) -> Iterator[None]:
    """Trace from step ``first`` to the end, if there is a ``path``."""
    if path is None:
        yield
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    profiler = torch.profiler.profile(activities=activities)
    recorder.on_step = lambda number: profiler.start() if number == first else None
    yield
    profiler.stop()
    profiler.export_chrome_trace(path)


def table(found: Times, recipe: Recipe) -> str:
    """The times as text: milliseconds a step, their share, and those of the slowest step of each kind."""
    count = len(found.steps)
    wall = [sum(step.values()) for step in found.steps]
    every, mean = recipe.train.checkpoint_every, sum(found.checkpoints) / max(1, len(found.checkpoints))
    whole = sum(wall) / count + (mean / every if every else 0.0)

    def row(name: str, seconds: float, most: float) -> str:
        return f"{name:<32}{1e3 * seconds:>10.2f}{seconds / whole:>9.1%}{1e3 * most:>10.2f}"

    lines = [f"{recipe.run.name}: {count} steps of {recipe.data.batch_size} samples after {WARM} others, {found.where}, "
             f"{torch.get_num_threads()} threads, {recipe.data.workers} workers",
             f"{'the training thread':<32}{'ms a step':>10}{'share':>9}{'slowest':>10}"]
    for name in ORDER:
        each = [step.get(name, 0.0) for step in found.steps]
        lines.append(row(name or "the rest", sum(each) / count, max(each)))
    if every:
        lines.append(row(f"checkpoint, one in {every} steps", mean / every, max(found.checkpoints)))
    lines.append(row("a step", whole, max(wall)))
    if len(found.waits) > 1:
        lines.append(f"{spans.PROCESSES}, each process: {', '.join(f'{1e3 * seconds:.2f}' for seconds in found.waits)} ms a step")
    return "\n".join(lines)
