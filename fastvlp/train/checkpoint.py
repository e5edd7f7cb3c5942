"""Checkpoints that are whole or absent: written beside, summed, flushed to the disk, then renamed.

A checkpoint is the folder ``checkpoints/step-00000200``: ``state/`` (``torch.distributed.checkpoint``: weights, averages, optimizer, from
any number of processes for any other), ``trainer.json`` (recipe, counters, scaler), ``random.pt`` (generators by process) and, last,
``manifest.json`` with the SHA-256 of each file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FORMAT = 2
MANIFEST, STATE, TRAINER, RANDOM = "manifest.json", "state", "trainer.json", "random.pt"


class CheckpointError(ValueError):
    """A checkpoint that was asked for cannot be used."""


class Damaged(CheckpointError):
    """A checkpoint whose files are not those that were written."""


def begin(folder: Path, step: int) -> Path:
    """An empty folder beside the checkpoints for one that is being written; what a killed process left is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in _entries(folder):
        if leftover.name.startswith(".") and leftover.name.endswith(".partial"):
            shutil.rmtree(leftover)
    temporary = folder / f".step-{step:08d}.partial"
    temporary.mkdir()
    return temporary


def finish(temporary: Path, trainer: dict[str, Any], random: list[Any], keep: int) -> Path:
    """Complete a checkpoint whose ``state`` is written, and delete all but the last ``keep``."""
    with (temporary / RANDOM).open("wb") as file:
        torch.save(random, file)
    (temporary / TRAINER).write_text(json.dumps(trainer), encoding="utf-8")
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    sums = {str(path.relative_to(temporary)): [path.stat().st_size, _sha256(path)] for path in files}
    (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": sums}), encoding="utf-8")
    # To the disk before the rename: else a crash of the machine may leave the new name on files that were never written.
    for path in [*temporary.rglob("*"), temporary]:
        _flush(path)
    final = temporary.with_name(temporary.name.removeprefix(".").removesuffix(".partial"))
    # A folder of the same step is of another past, which resuming has left.
    if final.exists():
        set_aside(final)
    temporary.rename(final)
    _flush(final.parent)
    for old in checkpoints(final.parent)[:-keep]:
        _remove(old)
    return final


def discard(temporary: Path) -> None:
    """Remove what could not be completed."""
    shutil.rmtree(temporary, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint; killed on the way, it leaves nothing that looks like one."""
    doomed = path.with_name(f".{path.name}.partial")
    path.rename(doomed)
    shutil.rmtree(doomed)


def set_aside(path: Path) -> Path:
    """Move a checkpoint to ``checkpoints/aside``, where nothing looks for it and nothing deletes it."""
    aside = path.parent / "aside"
    aside.mkdir(exist_ok=True)
    names = [path.name, *(f"{path.name}.{i}" for i in range(1, 10_000))]
    target = next(aside / name for name in names if not (aside / name).exists())
    path.rename(target)
    return target


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Set the checkpoints later than ``step`` aside: training goes on from there, and they are of another past."""
    return [set_aside(path) for path in _named(folder) if int(path.name.removeprefix("step-")) > step]


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below a folder, oldest first; none where there is no folder.

    Raises:
        OSError: the folder, or one in it, cannot be read, which does not mean that there is nothing.
    """
    return [path for path in _named(folder) if _exists(path / MANIFEST)]


def _named(folder: Path) -> list[Path]:
    return sorted(path for path in _entries(folder) if path.name.startswith("step-") and path.name.removeprefix("step-").isdigit())


def _entries(folder: Path) -> list[Path]:
    """What a folder holds. ``Path.glob`` would take one that cannot be read for an empty one."""
    try:
        return [folder / name for name in os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _exists(path: Path) -> bool:
    """Unlike ``Path.exists``, which takes any error for absence in newer versions of Python, raises what is neither yes nor no."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def verify(path: Path) -> dict[str, Any]:
    """Check every file against the manifest; returns ``trainer.json``.

    Raises:
        Damaged: a file is missing or is not the one that was written.
        CheckpointError: it does not exist, cannot be read just now, or was written by a newer fastvlp. Such a checkpoint may be whole.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
            raise Damaged(f"{path / MANIFEST} is damaged: it lists no files")
        if manifest.get("format") != FORMAT:
            raise CheckpointError(f"{path} has format {manifest.get('format')} and this fastvlp reads format {FORMAT}; use the version "
                                  "that wrote it")
        for name, (size, digest) in manifest["files"].items():
            file = path / name
            # A manifest is a stranger's file, too: it must not make us read outside of its folder.
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise Damaged(f"{path / MANIFEST} is damaged: it names {name}")
            if not _exists(file):
                raise Damaged(f"{path} is damaged: {name} is missing")
            # The size first, which finds most damage without reading the file.
            if file.stat().st_size != size or _sha256(file) != digest:
                raise Damaged(f"{path} is damaged: {name} is not what was written")
        trainer = json.loads((path / TRAINER).read_text(encoding="utf-8"))
        if not _describes_a_run(trainer):
            raise CheckpointError(f"{path / TRAINER} does not describe a training run")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} holds no {MANIFEST}; name a folder such as runs/NAME/checkpoints/step-00000200") from error
    except (OSError, MemoryError) as error:
        raise _unreadable(path, error) from error
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise Damaged(f"{path / MANIFEST} is damaged: {error}") from error
    return dict(trainer)


def latest(folder: Path, warn: Callable[[str], object], *, mine: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is what was written, and its ``trainer.json``, or None; damaged ones are named through ``warn`` and
    passed over, and set aside where the folder is ``mine``.

    Raises:
        CheckpointError: one cannot be read just now, or only by a newer version: it is not passed over, since it may be whole.
    """
    try:
        for path in reversed(_named(folder)):
            try:
                if not _exists(path / MANIFEST):
                    raise Damaged(f"{path} holds no {MANIFEST}: it is not whole, or of a version of fastvlp that wrote none")
                return path, verify(path)
            except Damaged as error:
                warn(f"{error}; {f'it is kept in {set_aside(path).parent}, ' if mine else ''}trying the one before")
    except OSError as error:
        raise _unreadable(folder, error) from error
    return None


def _unreadable(path: Path, error: OSError | MemoryError) -> CheckpointError:
    name = getattr(error, "filename", None) or path
    return CheckpointError(f"{name} cannot be read: {getattr(error, 'strerror', None) or 'out of memory'}; nothing was changed")


def random_states(path: Path) -> list[Any]:
    """The generators' states, by process.

    Raises:
        CheckpointError: the file holds something else, or cannot be read.
    """
    try:
        states = torch.load(path / RANDOM, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # a pickle may fail in any way
        raise CheckpointError(f"{path / RANDOM} holds no states of random generators") from error
    if not isinstance(states, list):
        raise CheckpointError(f"{path / RANDOM} holds no states of random generators")
    return states


def _describes_a_run(trainer: Any) -> bool:
    counters = trainer.get("counters") if isinstance(trainer, dict) and isinstance(trainer.get("recipe"), dict) else None
    counts = [counters.get(name) for name in ("step", "samples")] if isinstance(counters, dict) else [None]
    return all(isinstance(count, int) and 0 <= count < 1 << 63 for count in counts)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        # In pieces, since a file of weights may be larger than the memory that is left.
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)
