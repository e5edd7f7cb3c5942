"""Checkpoints that are whole or absent: written beside, flushed to the disk, then renamed.

A checkpoint is the folder ``checkpoints/step-00000200`` with ``trainer.pt`` (everything that training needs) and the model directory that
``fastvlp.load`` reads (the averaged weights where there are any).
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

TRAINER_FILE = "trainer.pt"


class CheckpointError(ValueError):
    """A checkpoint that was asked for cannot be used."""


def save(folder: Path, step: int, state: dict[str, Any], save_model: Callable[[Path], object], keep: int) -> Path:
    """Write ``folder/step-<step>`` atomically, unless it is there already, and delete all but the last ``keep`` checkpoints.

    Args:
        state: tensors and plain Python values only. save_model: writes the model directory into the folder it is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    if final in checkpoints(folder):
        return final
    temporary = folder / f".{final.name}.partial"
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover)
    temporary.mkdir()
    save_model(temporary)
    torch.save(state, temporary / TRAINER_FILE)
    for path in [*temporary.rglob("*"), temporary]:
        _flush(path)
    temporary.rename(final)
    _flush(folder)
    for old in checkpoints(folder)[:-keep]:
        remove(old)
    return final


def remove(path: Path) -> None:
    """Delete a checkpoint; killed on the way, it leaves nothing that looks like one."""
    doomed = path.with_name(f".{path.name}.partial")
    path.rename(doomed)
    shutil.rmtree(doomed)


def forget_after(folder: Path, step: int) -> None:
    """Delete the checkpoints later than ``step``: training goes on from there, and they would be of another past."""
    for path in checkpoints(folder):
        if int(path.name.removeprefix("step-")) > step:
            remove(path)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / TRAINER_FILE).is_file())


def load(path: Path) -> dict[str, Any]:
    """The training state of one checkpoint, on the CPU.

    Raises:
        CheckpointError: it does not exist, is damaged, or is none of ours.
    """
    file = path / TRAINER_FILE if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path} holds no {TRAINER_FILE}; name a folder such as runs/NAME/checkpoints/step-00000200")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} is damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if not isinstance(state, dict) or "step" not in state or "config" not in state:
        raise CheckpointError(f"{file} is no training state of fastvlp")
    return state


def latest(folder: Path, warn: Callable[[str], object]) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None; damaged ones are named through ``warn`` and passed over."""
    for path in reversed(checkpoints(folder)):
        try:
            return load(path)
        except CheckpointError as error:
            warn(f"{error}; trying the one before")
    return None


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
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
