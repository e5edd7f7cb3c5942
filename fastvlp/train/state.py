"""The state of a trainer on any number of processes: what a checkpoint takes from it and gives back."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import random
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from fastvlp import __version__
from fastvlp.config import to_dict
from fastvlp.systems.state_folder import read_state
from fastvlp.train import checkpoint
from fastvlp.train.checkpoint import CheckpointError
from fastvlp.train.step import Counters, Trainer

T = TypeVar("T")


class Saver:
    """Writes the checkpoints of a run, of all processes together.

    A sharded run writes from every process, into a folder that all of them see; a replicated one from the first alone.

    Args:
        data: what names the shards that are trained on (``agreement.data_digest``).
    """

    def __init__(self, trainer: Trainer, folder: Path, data: str) -> None:
        self.trainer, self.folder, self.data = trainer, folder, data
        self._writing: Future | None = None
        self._finish: Callable[[], object] | None = None
        self._temporary: Path | None = None

    def save(self, wait: bool = True) -> None:
        """Write a checkpoint of the present step (a collective call); with ``wait=False`` training may go on meanwhile.

        Raises:
            OSError: the disk is full or refuses; what was half written is removed, and earlier checkpoints stay.
        """
        self.complete()
        with self._cleared():
            self._save(wait)
        if wait:
            self.complete()

    def _save(self, wait: bool) -> None:
        world, step = self.trainer.world, self.trainer.counters.step
        present = self._together(lambda: f"step-{step:08d}" in [path.name for path in checkpoint.checkpoints(self.folder)])
        if present:
            return
        temporary = self._temporary = self._together(lambda: checkpoint.begin(self.folder, step))
        # Taken now: an asynchronous save must not see the numbers of a later step.
        trainer, generators = {**describe(self.trainer), "data": self.data}, world.gather(random_state(world.device))
        target, planner = str(temporary / checkpoint.STATE), DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        values = _values(self.trainer)
        how: dict[str, Any] = {"checkpoint_id": target, "planner": planner, "no_dist": world.size == 1}
        if world.size == 1:  # as it should be; for good, since the thread of an asynchronous save outlives this call
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        if wait:
            dcp.save(values, **how)
        else:
            self._writing = dcp.async_save(values, **how)  # type: ignore[assignment]
        self._finish = lambda: self._together(lambda: checkpoint.finish(temporary, trainer, generators, self.trainer.recipe.train.keep))

    @property
    def done(self) -> bool:
        """Whether nothing is being written here any more."""
        return self._writing is None or self._writing.done()

    def complete(self) -> None:
        """Give the checkpoint that is being written its name (a collective call); waits for it. Raises as ``save`` does."""
        finish, self._finish = self._finish, None
        writing, self._writing = self._writing, None
        if finish is None:
            return
        with self._cleared():
            if writing is not None:
                writing.result()
            self.trainer.world.wait()
            finish()

    @contextlib.contextmanager
    def _cleared(self) -> Iterator[None]:
        """Where writing fails, nothing half-written is left, and the error is one of the disk, in whatever torch wrapped it."""
        try:
            yield
        except (Exception, CheckpointException) as error:
            if self._temporary is not None and self.trainer.world.rank == 0:
                checkpoint.discard(self._temporary)
            raise _as_os_error(error, self._temporary or self.folder) from error

    def _together(self, act: Callable[[], T]) -> T:
        """What the first process does, with its error on all."""
        world = self.trainer.world
        found: Any = None
        failed: Exception | None = None
        if world.rank == 0:
            try:
                found = act()
            except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
                failed = _as_os_error(error, self._temporary or self.folder)
        # Its error, too: who waits for the first process's result would wait for ever.
        found, failed = world.told((found, failed))
        if failed is not None:
            raise failed
        return cast(T, found)


def describe(trainer: Trainer) -> dict[str, Any]:
    """What of a trainer is no tensor."""
    return {"fastvlp": __version__, "recipe": to_dict(trainer.recipe), "counters": dataclasses.asdict(trainer.counters),
            "ema_updates": trainer.ema.updates if trainer.ema else None, "scaler": trainer.scaler.state_dict(),
            "world": trainer.world.size}


def restore(trainer: Trainer, path: Path, described: dict[str, Any]) -> None:
    """Continue from a checkpoint (a collective call), written by any number of processes; random generators only by the same number.

    Raises:
        CheckpointError: the model is another one.
    """
    values = _values(trainer)
    try:
        read_state(values, path / checkpoint.STATE, alone=trainer.world.size == 1)
    except CheckpointException as error:  # what happened on every process, in one bundle that is no Exception
        cause = _as_os_error(error, path)
        if isinstance(cause, OSError):
            raise CheckpointError(f"{path} cannot be read: {cause.strerror or cause}; nothing was changed") from error
        raise CheckpointError(f"{path} does not fit this model: {_first_line(error)}; run.start takes weights as far as they "
                              "fit") from error
    # Read before anything is changed, so that a broken file leaves the trainer as it was.
    generators = checkpoint.random_states(path)
    try:
        set_state_dict(trainer.system, trainer.optimizer, model_state_dict=values["model"], optim_state_dict=values["optim"])
        if trainer.ema is not None:
            trainer.ema.updates = int(described["ema_updates"] or 0)
        trainer.scaler.load_state_dict(described["scaler"])
        trainer.counters = Counters(**described["counters"])
        if len(generators) == trainer.world.size:
            set_random_state(generators[trainer.world.rank], trainer.world.device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # whole, as its sums say, and no work of ours
        raise CheckpointError(f"{path} does not describe a training run of this fastvlp: {_first_line(error)}") from error


def _values(trainer: Trainer) -> dict[str, Any]:
    model, optim = get_state_dict(trainer.system, trainer.optimizer, options=StateDictOptions(cpu_offload=False))
    values = {"model": model, "optim": optim}
    return values if trainer.ema is None else {**values, "ema": trainer.ema.averages}


def _first_line(error: BaseException) -> str:
    causes = [cause for cause in getattr(error, "failures", {}).values()]
    said = str(causes[0][0] if causes and isinstance(causes[0], tuple) else error)
    return next((line for line in reversed(said.splitlines()) if line.strip()), type(error).__name__).strip()


def _as_os_error(error: BaseException, place: Path) -> Exception:
    """The disk's error, whatever torch wrapped it in; its C++ writer says no more than that a write failed."""
    cause: BaseException | None = error
    for failure in getattr(error, "failures", {}).values():
        cause = failure[0] if isinstance(failure, tuple) else failure
    first = cause
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError):
        return cause
    if isinstance(first, RuntimeError) and "PytorchStreamWriter" in str(first):
        return OSError(errno.EIO, "a write failed (is the disk full?)", str(place))
    return first if isinstance(first, Exception) else RuntimeError(_first_line(error))


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the random generators of Python, NumPy and torch in this process."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    return {"python": [version, list(words), gauss], "torch": torch.get_rng_state(),
            "numpy": {**numpy, "state": {**numpy["state"], "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64))}},
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators back where ``random_state`` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy = state["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].numpy().astype(np.uint32)}})
    torch.set_rng_state(state["torch"])
    cuda: Tensor | None = state["cuda"]
    if device.type == "cuda" and cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
