"""Which past a run continues from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvlp.config import Config, ConfigError, differences, from_dict
from fastvlp.train import checkpoint

# What may change from one part of a run to the next without making it another run.
_FREE = ("run.name", "run.dir", "run.device", "run.resume", "run.log", "data.workers", "eval.", "train.checkpoint_every", "train.keep",
         "train.max_nonfinite", "train.log_every", "train.print_every")


def find(config: Config, folder: Path, say: Callable[[str], object]) -> dict[str, Any] | None:
    """The training state that ``config.run.resume`` means, or None for a fresh start.

    "auto" takes the last whole checkpoint in ``folder`` and refuses one of a run with other settings; a path is taken whatever its
    settings were, with a word about what changed.

    Raises:
        ConfigError: the checkpoint belongs to other settings. CheckpointError: the path that was named cannot be used.
    """
    if config.run.resume == "none":
        return None
    if config.run.resume == "auto":
        state = checkpoint.latest(folder / "checkpoints", say)
    else:
        state = checkpoint.load(_newest(Path(config.run.resume)))
    if state is None:
        return None
    changed = _changes(state, config)
    if changed and config.run.resume == "auto":
        raise ConfigError(f"{folder} holds a run with other settings ({_short(changed)}); choose another run.name, start over with "
                          "--resume none, or continue from it with --resume PATH")
    if changed:
        say(f"continuing with other settings than before: {_short(changed)}")
    return state


def _newest(path: Path) -> Path:
    """A run directory stands for its last checkpoint."""
    found = checkpoint.checkpoints(path / "checkpoints") or checkpoint.checkpoints(path)
    return found[-1] if found else path


def _changes(state: dict[str, Any], config: Config) -> list[str]:
    try:
        before = from_dict(state["config"])
    except ConfigError as error:
        return [f"its configuration is of another version of fastvlp: {error}"]
    return [line for line in differences(before, config) if not line.startswith(_FREE)]


def _short(changes: list[str]) -> str:
    return ", ".join(changes[:4]) + (f" and {len(changes) - 4} more" if len(changes) > 4 else "")
