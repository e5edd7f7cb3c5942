"""The state of a trainer on any number of processes: what a checkpoint takes from it and gives back."""

from __future__ import annotations

import dataclasses
import random
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from fastvlp import __version__
from fastvlp.config import to_dict
from fastvlp.systems.files import read_state
from fastvlp.train import checkpoint
from fastvlp.train.checkpoint import CheckpointError
from fastvlp.train.step import Counters, Trainer


class Saver:
    """Writes the checkpoints of a run, of all processes together.

    A sharded run writes from every process, into a folder that all of them see; a replicated one from the first alone.
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self._writing: Future | None = None
        self._finish: Any = None

    def save(self, wait: bool = True) -> None:
        """Write a checkpoint of the present step (a collective call); with ``wait=False`` training may go on meanwhile.

        Raises:
            OSError: the disk is full or refuses; what was half written is removed, and earlier checkpoints stay.
        """
        self.complete()
        world, step = self.trainer.world, self.trainer.counters.step
        names = [path.name for path in checkpoint.checkpoints(self.folder)] if world.rank == 0 else []
        if f"step-{step:08d}" in world.told(names):
            return
        temporary = self._together(lambda: checkpoint.begin(self.folder, step))
        trainer, generators = describe(self.trainer), world.gather(random_state(world.device))
        target, planner = str(temporary / checkpoint.STATE), DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        values = _values(self.trainer)
        self._finish = lambda: self._together(lambda: checkpoint.finish(temporary, trainer, generators, self.trainer.recipe.train.keep))
        how: dict[str, Any] = {"checkpoint_id": target, "planner": planner, "no_dist": world.size == 1}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # alone, that is as it should be
                if wait:
                    dcp.save(values, **how)
                else:
                    self._writing = dcp.async_save(values, **how)  # type: ignore[assignment]
            if wait:
                self.complete()
        except (Exception, CheckpointException) as error:
            self._finish = None
            if world.rank == 0:
                checkpoint.discard(temporary)
            raise _as_os_error(error) from error

    @property
    def done(self) -> bool:
        """Whether nothing is being written here any more."""
        return self._writing is None or self._writing.done()

    def complete(self) -> None:
        """Give the checkpoint that is being written its name (a collective call); waits for it."""
        finish, self._finish = self._finish, None
        if finish is None:
            return
        if self._writing is not None:
            self._writing.result()
            self._writing = None
        self.trainer.world.wait()
        finish()

    def _together(self, act: Any) -> Any:
        """What the first process does, with its error on all."""
        world, found = self.trainer.world, None
        if world.rank == 0:
            try:
                found = act()
            except OSError as error:
                found = error
        found = world.told(found)
        if isinstance(found, OSError):
            raise found
        return found


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
        raise CheckpointError(f"{path} does not fit this model: {_first_line(error)}; run.start takes weights as far as they "
                              "fit") from error
    set_state_dict(trainer.system, trainer.optimizer, model_state_dict=values["model"], optim_state_dict=values["optim"])
    if trainer.ema is not None:
        trainer.ema.updates = described["ema_updates"] or 0
    trainer.scaler.load_state_dict(described["scaler"])
    trainer.counters = Counters(**described["counters"])
    generators = checkpoint.random_states(path)
    if len(generators) == trainer.world.size:
        set_random_state(generators[trainer.world.rank], trainer.world.device)


def _values(trainer: Trainer) -> dict[str, Any]:
    model, optim = get_state_dict(trainer.system, trainer.optimizer, options=StateDictOptions(cpu_offload=False))
    values = {"model": model, "optim": optim}
    return values if trainer.ema is None else {**values, "ema": trainer.ema.averages}


def _first_line(error: BaseException) -> str:
    causes = [cause for cause in getattr(error, "failures", {}).values()]
    said = str(causes[0][0] if causes and isinstance(causes[0], tuple) else error)
    return next((line for line in reversed(said.splitlines()) if line.strip()), type(error).__name__).strip()


def _as_os_error(error: BaseException) -> BaseException:
    """A full disk, whatever torch wrapped it in."""
    cause: BaseException | None = error
    for failure in getattr(error, "failures", {}).values():
        cause = failure[0] if isinstance(failure, tuple) else failure
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause if isinstance(cause, OSError) else error


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
