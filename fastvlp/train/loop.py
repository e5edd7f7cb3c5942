"""A whole run: from a recipe to a trained system with its scores. It names no system."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from fastvlp.config import dump
from fastvlp.data.batch import Batch
from fastvlp.data.shards import UNOPENED
from fastvlp.data.stream import Stream
from fastvlp.recipe import Recipe
from fastvlp.systems.files import take_weights
from fastvlp.train import agreement, checkpoint, flops, lock, report, resume, state
from fastvlp.train.failures import STAYS, explained
from fastvlp.train.interrupt import Interrupted, StopRequest, Watchdog, standard_descriptors
from fastvlp.train.log import Log
from fastvlp.train.memory import keep_freed_memory
from fastvlp.train.parallel import World, join
from fastvlp.train.progress import Progress, Rates
from fastvlp.train.spans import CHECKPOINT, DATA, DEVICE, LOGGING, span
from fastvlp.train.start import Early, counted, headline, prepare
from fastvlp.train.step import Pending, Trainer, TrainingError

BAD_DATA = 1 << 10  # what a process asks for as it asks for the end on a signal, whose numbers are below
FEW = 10  # bad samples stop no run


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
    with standard_descriptors(), StopRequest() as stop, Watchdog(recipe.run.timeout, stop) as watchdog, \
            join(recipe.run.device, recipe.run.timeout) as world:
        if world.device.type == "cpu":
            keep_freed_memory()
        return _run(recipe, world, stop, watchdog, began)


def _run(recipe: Recipe, world: World, stop: StopRequest, watchdog: Watchdog, began: float) -> dict[str, Any]:
    recipe = counted(recipe, world)
    folder = Path(recipe.run.dir) / recipe.run.name
    progress = Progress(recipe.steps, recipe.train.print_every, enabled=world.rank == 0)
    # Before anything is read or written: processes that were started differently never get to a collective of different sizes.
    agreement.check(world, lambda: agreement.settings(recipe, world.device))
    system, stream = agreement.all_or_none(world, lambda: prepare(recipe, world))
    data = agreement.data_digest(stream.indices)
    with explained(folder), contextlib.ExitStack() as at_end:
        past = agreement.first_decides(world, lambda: _past(recipe, folder, data, progress, at_end))
        if isinstance(past, dict):
            return past
        if past is None and recipe.run.start is not None:
            said = take_weights(system, recipe.run.start)
            progress.say(f"run.start: {said}")
        agreement.check(world, lambda: {"data": data, "weights": agreement.weights_digest(system)})
        # Every process writes its own part of a sharded checkpoint, and so all have to see one folder.
        if recipe.train.shard != 1:
            agreement.same_file(world, folder / lock.NAME, "where a sharded run writes its checkpoints")
        trainer = Trainer(recipe, system.to(world.device), world, len(stream.sources))
        if past is not None:
            watchdog.doing(f"reading {past.path}")
            agreement.same_file(world, past.path / checkpoint.MANIFEST, "from which process 0 continues")
            state.restore(trainer, past.path, past.described)
            trainer.counters.step = resume.steps_done(past.described, recipe)
            progress.say(f"continuing {folder} after step {trainer.counters.step}")
        begins = agreement.first_decides(world, lambda: _open_folder(folder, recipe, past, trainer.counters.step, progress))
        if world.rank == 0:
            at_end.callback(_nothing_began, folder)
        log = Log(folder, recipe, begins, enabled=world.rank == 0)
        at_end.callback(log.close)
        at_end.callback(progress.close)
        if world.rank == 0:
            for line in headline(recipe, trainer, stream):
                progress.say(line)
        fit = Fit(recipe, trainer, stream, folder, data, log, progress, stop, watchdog)
        skipped, startup_seconds = fit.run(began)
        try:
            return report.finish(recipe, trainer, folder, log, progress, skipped=skipped, startup_seconds=startup_seconds,
                                 beat=fit.at_the_end)
        # After the last step everything is saved; what is left may be cut short.
        except RuntimeError:  # another process heard the signal first, and is gone
            fit.at_the_end()
            raise


def _past(recipe: Recipe, folder: Path, data: str, progress: Progress, at_end: contextlib.ExitStack) -> resume.Past | dict[str, Any] | None:
    """On the first process: take the folder, and say what to continue from; or the results of a run that is done."""
    elsewhere = recipe.run.resume not in ("auto", "none")
    past = resume.find(recipe, folder, data, progress.say) if elsewhere else None  # a wrong path leaves no folder behind
    at_end.enter_context(lock.RunLock(folder))
    past = past if elsewhere else resume.find(recipe, folder, data, progress.say)
    if past is not None and recipe.run.resume == "auto" and resume.steps_done(past.described, recipe) >= recipe.steps \
            and report.exists(folder):
        progress.say(f"{folder} is a finished run; --resume none would start it over")
        return report.show(folder, progress.say)
    return past


def _open_folder(folder: Path, recipe: Recipe, past: resume.Past | None, step: int, progress: Progress) -> int:
    """On the first process: what belongs to another past, or to a run that was finished, is set aside, never deleted.

    Returns:
        The last step whose lines in the folder's logs are of this past.
    """
    own = past is not None and folder.resolve() in past.path.resolve().parents
    if not own and (report.exists(folder) or checkpoint.checkpoints(folder / "checkpoints")):
        progress.say(f"the run before is kept in {report.set_run_aside(folder)}")
    elif report.exists(folder):
        aside = report.set_run_aside(folder, (lock.NAME, "checkpoints", "log.jsonl", *recipe.run.log))
        progress.say(f"what the finished run left is kept in {aside}")
    for path in checkpoint.set_aside_after(folder / "checkpoints", step if own else -1):
        progress.say(f"{path.name} is of another past; it is kept in {path.parent}")
    (folder / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    return step if own else 0


def _nothing_began(folder: Path) -> None:
    """A run that was refused at its first step leaves nothing: its folder goes with the lock, when that is all that is in it."""
    log = folder / "log.jsonl"
    if log.exists() and not log.stat().st_size and not checkpoint.checkpoints(folder / "checkpoints"):
        log.unlink()
        (folder / "recipe.yaml").unlink(missing_ok=True)


@dataclasses.dataclass
class Fit:
    """The steps of a run."""

    recipe: Recipe
    trainer: Trainer
    stream: Stream
    folder: Path
    data: str
    log: Log
    progress: Progress
    stop: StopRequest
    watchdog: Watchdog
    until: int | None = None  # the step after which it ends, if that is not the recipe's last

    def run(self, began: float) -> tuple[dict[str, int], float]:
        """Train to the end; returns the samples that were skipped, by reason, and the seconds before the first step."""
        recipe, trainer, counters = self.recipe, self.trainer, self.trainer.counters
        world = trainer.world
        saver = state.Saver(trainer, self.folder / "checkpoints", self.data)
        trainer.rate = flops.MatrixRate(world.device, trainer.amp_dtype or torch.float32)
        # A device computes while the host prepares: its numbers are read a step later. The host's own are there at once.
        late, end = world.device.type != "cpu", self.until or recipe.steps
        waiting: list[tuple[Pending, float]] = []
        startup_seconds, mark = 0.0, time.perf_counter()
        batches = self._batches()
        with contextlib.closing(batches):
            while counters.step < end:
                self.watchdog.doing(f"waiting for batch {counters.step}")
                with span(DATA):
                    batch = self._next(batches)
                if batch is None:  # this process alone was told to stop while it waited
                    while waiting:
                        mark = self._settle(*waiting.pop(0), counters.step - len(waiting), mark)
                    self._stop(saver, self.stop.signum)
                    break
                if not startup_seconds:
                    mark = time.perf_counter()
                    startup_seconds = mark - began
                self._episode()
                waited = time.perf_counter() - mark
                self.watchdog.doing(f"computing step {counters.step}")
                waiting.append((trainer.step(batch, self.stop.signum or (BAD_DATA if self._bad_data() else 0)), waited))
                counters.positions = list(batch.positions)
                stopping, last = waiting[-1][0].stop, counters.step == end
                due = recipe.train.checkpoint_every and counters.step % recipe.train.checkpoint_every == 0
                scoring = recipe.eval.every and counters.step % recipe.eval.every == 0 and not last
                # Loss and norm of a step are read while the next one computes; before a checkpoint, a score or the end everything is read.
                while len(waiting) > (1 if late and not (due or last or stopping or scoring) else 0):
                    mark = self._settle(*waiting.pop(0), counters.step - len(waiting), mark)
                if stopping:
                    self._stop(saver, stopping)
                if due or last:
                    self._save(saver, wait=not recipe.train.asynchronous or last)
                if scoring:
                    self._score(saver)
                # What was just spent on saving and scoring is no time of a step.
                if due or scoring or not late:  # nothing is being computed now
                    trainer.rate.again()
                    mark = time.perf_counter()
        return self._skipped(), startup_seconds

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch; None when a signal came while this process, which is alone, waited for it: that may be for ever."""
        return self.stop.waiting(lambda: next(batches)) if self.trainer.world.size == 1 else next(batches)

    def _stop(self, saver: state.Saver, stopping: int) -> None:
        """Save, and end the run on all processes."""
        self._save(saver, wait=True)
        step = self.trainer.counters.step
        if stopping == BAD_DATA:
            raise TrainingError(next(said for said in self.trainer.world.gather(self._bad_data()) if said))
        raise Interrupted(stopping, f"stopped at step {step}; the same command continues from here")

    def _score(self, saver: state.Saver) -> None:
        """Evaluate on the way. A process that is alone stops in the middle; several could not, since they wait for each other."""
        alone = self.trainer.world.size == 1

        def beat() -> None:
            self.watchdog.doing("evaluating")
            if alone and self.stop.signum:
                raise Interrupted(self.stop.signum, "")

        try:
            report.score(self.recipe, self.trainer, self.trainer.counters.step, self.log, self.progress, beat)
        except Interrupted:
            self._stop(saver, self.stop.signum)

    def at_the_end(self) -> None:
        """Called at every batch of the last evaluation, before which everything was saved."""
        self.watchdog.doing("evaluating")
        if self.stop.signum:
            raise Interrupted(self.stop.signum, f"stopped while evaluating after step {self.trainer.counters.step}; the same command "
                              "evaluates again")

    def _batches(self) -> Generator[Batch, None, None]:
        counters, early = self.trainer.counters, self.stream.on_skip
        self.stream.start, self.stream.positions = counters.step, counters.positions if counters.step else None
        if self.trainer.world.rank == 0:
            self.stream.on_skip = lambda reason, name: self.log.write(counters.step, skipped=reason, sample=name)
            for reason, name in early.heard if isinstance(early, Early) else ():
                self.stream.on_skip(reason, name)
        else:  # what the first process does not read; headers it does
            self.stream.on_skip = lambda reason, name: logging.getLogger(__name__).warning("skipped, %s: %s", reason, name)
        return iter(self.stream)

    def _bad_data(self) -> str | None:
        """More than a few bad samples is bad data: said before days of training on what is left. Missing shards were said at the start."""
        skipped = Counter({reason: count for reason, count in self.stream.skipped.items() if reason != UNOPENED})
        bad, met = skipped.total(), self.stream.met()
        if bad <= max(FEW, self.recipe.data.max_bad * met):
            return None
        reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped.most_common(3))
        return (f"{bad} of {met} samples could not be used: {reasons}; they are named in {self.folder / 'log.jsonl'}. Mend the data, or "
                f"raise data.max_bad (now {self.recipe.data.max_bad:g})")

    def _settle(self, pending: Pending, waited: float, step: int, mark: float) -> float:
        """Read and tell a step's numbers; returns the time."""
        recipe, counters = self.recipe, self.trainer.counters
        with span(DEVICE):
            values = self.trainer.settle(pending)
        now = time.perf_counter()
        seconds = now - mark
        counters.seconds += seconds
        tokens, used = sum(pending.tokens.values()), pending.flops / seconds / pending.rate
        with span(LOGGING):
            if step % recipe.train.log_every == 0 or step == recipe.steps:
                self.log.write(step, **values, samples_per_second=pending.samples / seconds, tokens_per_second=tokens / seconds, mfu=used,
                               waiting_for_data=waited / seconds, seconds=counters.seconds)
            if step == 1 and values["grad_norm"] == 0:
                self.progress.say("note: the first step has no gradient; a loss that is detached, or of frozen parts, trains nothing")
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
        step = self.trainer.counters.step
        self.watchdog.doing(f"saving step {step}")
        try:
            with span(CHECKPOINT):
                saver.save(wait)
        except OSError as error:
            raise TrainingError(f"no checkpoint at step {step}: {error.filename or self.folder}: {error.strerror or error}; "
                                f"{STAYS}") from error

    def _skipped(self) -> dict[str, int]:
        """Bad samples by reason, each once however many processes met it."""
        everyone = set().union(*self.trainer.world.gather(self.stream.skips))
        counts: dict[str, int] = {}
        for reason, _ in sorted(skip for skip in everyone if skip[0] != UNOPENED):
            counts[reason] = counts.get(reason, 0) + 1
        return counts
