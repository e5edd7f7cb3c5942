"""A whole run: from a recipe to a trained system with its scores. It names no system."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from fastvlp.config import ConfigError, dump
from fastvlp.data.batch import Batch
from fastvlp.data.shards import expand
from fastvlp.data.stream import Source, Stream
from fastvlp.evaluate import load_classes
from fastvlp.recipe import Recipe
from fastvlp.systems.files import bind, build_system, take_weights
from fastvlp.systems.system import System
from fastvlp.train import agreement, checkpoint, flops, report, resume, schedule, state
from fastvlp.train.interrupt import Interrupted, StopRequest, Watchdog
from fastvlp.train.lock import RunLock
from fastvlp.train.log import Log
from fastvlp.train.memory import keep_freed_memory
from fastvlp.train.parallel import World, join
from fastvlp.train.progress import Progress, Rates
from fastvlp.train.step import Pending, Trainer, TrainingError, named_part


def train(recipe: Recipe) -> dict[str, Any]:
    """Train a system, continuing an interrupted run by default.

    Under torchrun every process calls this with the same recipe. Results go to ``run.dir/run.name``: recipe.yaml, log.jsonl,
    checkpoints/, model/ (for ``fastvlp.load``), curves.png, results.json.

    Returns:
        What results.json holds (on every process but the first: without scores).

    Raises:
        ConfigError: settings that do not fit together, the data, the other processes or the run directory. FileNotFoundError: no shards.
        TrainingError: too many non-finite losses in a row, too many bad samples, or a disk that refuses. Interrupted: a signal, after a
        checkpoint was written.
    """
    began = time.perf_counter()
    with StopRequest() as stop, Watchdog(recipe.run.timeout, stop) as watchdog, join(recipe.run.device, recipe.run.timeout) as world:
        if world.device.type == "cpu":
            keep_freed_memory()
        return _run(recipe, world, stop, watchdog, began)


def _run(recipe: Recipe, world: World, stop: StopRequest, watchdog: Watchdog, began: float) -> dict[str, Any]:
    folder = Path(recipe.run.dir) / recipe.run.name
    progress = Progress(recipe.steps, recipe.train.print_every, enabled=world.rank == 0)
    system, stream = prepare(recipe, world)
    with contextlib.ExitStack() as at_end:
        past = agreement.first_decides(world, lambda: _past(recipe, folder, progress, at_end))
        if isinstance(past, dict):
            return past
        if past is None and recipe.run.start is not None:
            said = take_weights(system, recipe.run.start)
            progress.say(f"run.start: {said}")
        agreement.check(world, recipe, system, stream.indices)
        trainer = Trainer(recipe, system.to(world.device), world, len(stream.sources))
        if past is not None:
            state.restore(trainer, past.path, past.described)
            trainer.counters.step = resume.steps_done(past.described, recipe)
            progress.say(f"continuing {folder} after step {trainer.counters.step}")
        agreement.first_decides(world, lambda: _open_folder(folder, recipe, trainer.counters.step if past else -1, progress))
        log = Log(folder, recipe, trainer.counters.step, enabled=world.rank == 0)
        at_end.callback(log.close)
        at_end.callback(progress.close)
        for line in headline(recipe, trainer):
            progress.say(line)
        skipped, startup_seconds = Fit(recipe, trainer, stream, folder, log, progress, stop, watchdog).run(began)
        watchdog.doing("evaluating")
        return report.finish(recipe, trainer, folder, log, progress, skipped=skipped, startup_seconds=startup_seconds)


def prepare(recipe: Recipe, world: World) -> tuple[System, Stream]:
    """The system with fresh weights, the same on every process, and the stream of its data, from the first batch.

    Raises:
        ConfigError, FileNotFoundError: what would fail later: a batch too small, shards or classes or packages that are not there.
    """
    check(recipe, world)
    torch.manual_seed(recipe.run.seed)
    system = build_system(recipe)
    for name in {name for stage in recipe.schedule.stages for name in stage.frozen}:
        named_part(system, name)
    return system, _stream(recipe, system, world)


def check(recipe: Recipe, world: World) -> None:
    """Refuse now what would fail later."""
    if recipe.data.batch_size < world.size:
        raise ConfigError(f"data.batch_size is {recipe.data.batch_size} for {world.size} processes; each needs at least one sample")
    if not recipe.data.fields:
        raise ConfigError("data.fields is empty; a batch needs streams, such as {'image': Image(), 'text': Caption()}")
    streams = {name for source in recipe.data.sources for name in (source.fields or recipe.data.fields)}
    unknown = [name for name in recipe.train.tokens if name not in streams]
    if unknown:
        raise ConfigError(f"train.tokens names {', '.join(unknown)}; the streams of this recipe are {', '.join(sorted(streams))}")
    for shards in (*(source.shards for source in recipe.data.sources), *report.shards(recipe.eval)):
        if shards:
            expand(shards)
    if recipe.eval.classes is not None:
        try:
            load_classes(recipe.eval.classes)
        except ValueError as error:
            raise ConfigError(f"eval.classes: {error}") from error
    for name in recipe.run.log:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"run.log names {name}, which is not installed: pip install 'fastvlp[log]'")


def _stream(recipe: Recipe, system: System, world: World) -> Stream:
    sources = [Source(s.shards, s.weight, None if s.fields is None else bind(s.fields, system)) for s in recipe.data.sources]
    return Stream(sources, system.fields, recipe.data.batch_size, recipe.run.seed, lambda step: schedule.stage_at(recipe, step),
                  workers=recipe.data.workers, rank=world.rank, world_size=world.size, shuffle=recipe.data.shuffle,
                  pin_memory=world.device.type == "cuda",
                  timeout=recipe.run.timeout if recipe.data.workers else 0)


def _past(recipe: Recipe, folder: Path, progress: Progress, at_end: contextlib.ExitStack) -> resume.Past | dict[str, Any] | None:
    """On the first process: take the folder, and say what to continue from; or the results of a run that is done."""
    elsewhere = recipe.run.resume not in ("auto", "none")
    past = resume.find(recipe, folder, progress.say) if elsewhere else None  # a wrong path leaves no folder behind
    at_end.enter_context(RunLock(folder))
    past = past if elsewhere else resume.find(recipe, folder, progress.say)
    if past is not None and recipe.run.resume == "auto" and resume.steps_done(past.described, recipe) >= recipe.steps \
            and report.exists(folder):
        progress.say(f"{folder} is a finished run; --resume none would start it over")
        return report.show(folder, progress.say)
    return past


def _open_folder(folder: Path, recipe: Recipe, step: int, progress: Progress) -> None:
    """On the first process: what belongs to another past is set aside, never deleted."""
    if step < 0 and (report.exists(folder) or checkpoint.checkpoints(folder / "checkpoints")):
        progress.say(f"the run before is kept in {report.set_run_aside(folder)}")
    for path in checkpoint.set_aside_after(folder / "checkpoints", step):
        progress.say(f"{path.name} is of another past; it is kept in {path.parent}")
    (folder / "results.json").unlink(missing_ok=True)
    (folder / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")


def headline(recipe: Recipe, trainer: Trainer) -> list[str]:
    """What is trained, on what, in which precision; and what somebody might not have meant."""
    world, system, options = trainer.world, trainer.system, recipe.train
    every, trained = (sum(p.numel() for p in system.parameters() if p.requires_grad or not only) for only in (False, True))
    where = f"{world.size} x {world.device.type}" if world.size > 1 else str(world.device)
    precision = str(trainer.amp_dtype or torch.float32).removeprefix("torch.")
    share = "" if every == trained else f" ({trained / every:.1%} of them trained)"
    sharded = "" if options.shard == 1 or world.size == 1 else f", sharded over {world.size if options.shard == 'world' else options.shard}"
    lines = [f"{recipe.run.name}: {type(system).__name__.removeprefix('FSDP')}, {every / 1e6:.1f}M parameters{share}, {recipe.steps} steps "
             f"of {recipe.data.batch_size} samples, {where}{sharded}, {precision}"]
    if recipe.schedule.warmup >= recipe.steps:
        lines.append(f"note: schedule.warmup is {recipe.schedule.warmup} of {recipe.steps} steps: the learning rate never reaches its peak")
    for name, field in system.fields.items():
        last, evaluated = recipe.schedule.stages[-1].image_size, getattr(field, "_size", None)
        if getattr(field, "size", None) is None and last is not None and evaluated is not None and last != evaluated:
            lines.append(f"note: the last stage trains {name} at {last} pixels, evaluation uses {evaluated}")
    return lines


@dataclasses.dataclass
class Fit:
    """The steps of a run."""

    recipe: Recipe
    trainer: Trainer
    stream: Stream
    folder: Path
    log: Log
    progress: Progress
    stop: StopRequest
    watchdog: Watchdog
    rate: float = math.inf  # operations per second of all devices

    def run(self, began: float) -> tuple[dict[str, int], float]:
        """Train to the last step; returns the samples that were skipped, by reason, and the seconds before the first step."""
        recipe, trainer, counters = self.recipe, self.trainer, self.trainer.counters
        world = trainer.world
        saver = state.Saver(trainer, self.folder / "checkpoints")
        if self.progress.enabled:
            self.rate = world.size * flops.matrix_rate(world.device, trainer.amp_dtype or torch.float32)
        # A device computes while the host prepares: its numbers are read a step later. The host's own are there at once.
        late = world.device.type != "cpu"
        waiting: list[tuple[Pending, float]] = []
        startup_seconds, mark = 0.0, time.perf_counter()
        batches = self._batches()
        with contextlib.closing(batches):
            while counters.step < recipe.steps:
                self.watchdog.doing(f"waiting for batch {counters.step}")
                batch = next(batches)
                if not startup_seconds:
                    mark = time.perf_counter()
                    startup_seconds = mark - began
                self._episode()
                waited = time.perf_counter() - mark
                self.watchdog.doing(f"computing step {counters.step}")
                waiting.append((trainer.step(batch, self.stop.signum), waited))
                counters.positions = list(batch.positions)
                stopping, last = waiting[-1][0].stop, counters.step == recipe.steps
                due = recipe.train.checkpoint_every and counters.step % recipe.train.checkpoint_every == 0
                scoring = recipe.eval.every and counters.step % recipe.eval.every == 0 and not last
                while len(waiting) > (1 if late and not (due or last or stopping or scoring) else 0):
                    mark = self._settle(*waiting.pop(0), counters.step - len(waiting), mark)
                if due or last or stopping:
                    self.watchdog.doing(f"saving step {counters.step}")
                    self._save(saver, wait=not recipe.train.asynchronous or bool(last or stopping))
                if stopping:
                    raise Interrupted(stopping, f"stopped at step {counters.step}; the same command continues from here")
                if scoring:
                    self.watchdog.doing("evaluating")
                    report.score(recipe, trainer, counters.step, self.log, self.progress, beat=lambda: self.watchdog.doing("evaluating"))
                if due or scoring:
                    mark = time.perf_counter()
        return self._skipped(), startup_seconds

    def _batches(self) -> Generator[Batch, None, None]:
        world, counters = self.trainer.world, self.trainer.counters

        def on_skip(reason: str, name: str) -> None:  # the other processes name theirs through logging
            self.log.write(counters.step, skipped=reason, sample=name)
            self._bound_bad_samples()

        self.stream.start, self.stream.positions = counters.step, counters.positions if counters.step else None
        if world.rank == 0:
            self.stream.on_skip = on_skip
        return iter(self.stream)

    def _bound_bad_samples(self) -> None:
        """More than a few bad samples is bad data: say so before days of training on what is left."""
        bad, seen = len(self.stream.skips), self.trainer.counters.samples + self.recipe.data.batch_size
        if bad > max(10, self.recipe.data.max_bad * seen):
            reasons = ", ".join(f"{reason} ({count})" for reason, count in self.stream.skipped.most_common(3))
            raise TrainingError(f"{bad} of about {seen} samples could not be used: {reasons}; they are named in "
                                f"{self.folder / 'log.jsonl'}. Mend the data, or raise data.max_bad (now {self.recipe.data.max_bad:g})")

    def _settle(self, pending: Pending, waited: float, step: int, mark: float) -> float:
        """Read and tell a step's numbers; returns the time."""
        recipe, counters = self.recipe, self.trainer.counters
        values = self.trainer.settle(pending)
        now = time.perf_counter()
        seconds = now - mark
        counters.seconds += seconds
        tokens, used = sum(pending.tokens.values()), pending.flops / seconds / self.rate
        if step % recipe.train.log_every == 0 or step == recipe.steps:
            self.log.write(step, **values, samples_per_second=pending.samples / seconds, tokens_per_second=tokens / seconds, mfu=used,
                           waiting_for_data=waited / seconds, seconds=counters.seconds)
        note = f"  {counters.nonfinite} skipped" if counters.nonfinite else ""
        self.progress.update(step, Rates(seconds, pending.samples, tokens, waited, used), values, note)
        return now

    def _episode(self) -> None:
        """Every ``train.episode`` steps, before the step: what the system wants to know of the whole training set."""
        episode = self.recipe.train.episode
        if episode is not None and self.trainer.counters.step % episode == 0:
            self.watchdog.doing("running an episode")
            report.episode(self.recipe, self.trainer, beat=lambda: self.watchdog.doing("running an episode"))

    def _save(self, saver: state.Saver, wait: bool) -> None:
        try:
            saver.save(wait)
            if wait:
                saver.complete()
        except OSError as error:
            raise TrainingError(f"no checkpoint at step {self.trainer.counters.step}: {error.filename or self.folder}: "
                                f"{error.strerror or error}; the last whole one stays, and the same command continues from it") from error

    def _skipped(self) -> dict[str, int]:
        """Bad samples by reason, each once however many processes met it."""
        everyone = set().union(*self.trainer.world.gather(self.stream.skips))
        counts: dict[str, int] = {}
        for reason, _ in sorted(everyone):
            counts[reason] = counts.get(reason, 0) + 1
        return counts
