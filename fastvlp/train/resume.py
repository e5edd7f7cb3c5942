"""Which past a run continues from; the first process decides, and tells all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlp.config import ConfigError, differences, from_dict
from fastvlp.recipe import Recipe
from fastvlp.train import checkpoint

# What may change from one part of a run to the next without making it another run, and without a word.
_SILENT = ("run.name", "run.dir", "run.device", "run.resume", "run.log", "run.timeout", "run.start", "eval.", "train.checkpoint_every",
           "train.keep", "train.asynchronous", "train.max_nonfinite", "train.log_every", "train.print_every")
# What changes how a step is computed, and not what it computes: said in one line.
_HARMLESS = ("data.workers", "train.tokens", "train.shard", "train.compile", "train.checkpointing", "train.offload", "model.strategy",
             "model.node_size", "data.max_bad")


@dataclass(frozen=True)
class Past:
    """A checkpoint to continue from: its folder, and what of it is no tensor (``trainer.json``)."""

    path: Path
    described: dict[str, Any]


def find(recipe: Recipe, folder: Path, data: str, say: Callable[[str], object]) -> Past | None:
    """The checkpoint that ``run.resume`` means, or None for a fresh start.

    Args:
        data: what names the shards now (``agreement.data_digest``); others than those of the checkpoint are said.

    "auto" takes the last whole checkpoint in ``folder`` and refuses one of a run with other settings; a path is taken whatever its
    settings were, with a word about what changed.

    Raises:
        ConfigError: the checkpoint belongs to other settings, or is past the end of this run. CheckpointError: it cannot be used.
    """
    where = recipe.run.resume
    if where == "none":
        return None
    found = checkpoint.latest(folder / "checkpoints", say) if where == "auto" else _at(Path(where), say)
    if found is None:
        return None
    path, described = found
    changed = _changes(described, recipe)
    grave = [line for line in changed if not line.startswith(_HARMLESS)]
    # What a name stands for must not change silently; a checkpoint that was named explicitly is a wish.
    if grave and where == "auto":
        raise ConfigError(f"{folder} holds a run with other settings ({_short(grave)}); choose another run.name, start over with "
                          "--resume none, or continue from it with --resume PATH")
    if changed:
        say(f"continuing with other settings than before: {_short(changed)}")
    if described.get("data") not in (None, data) and not any(line.startswith("data.train") for line in changed):
        say(f"note: the shards are not those that {path} was trained on: some were replaced, lost or added since, so that samples may "
            "come twice or not at all in this epoch")
    if where != "auto" and steps_done(described, recipe) >= recipe.steps:
        raise ConfigError(f"{path} was trained for {described['counters']['step']} steps and this run has {recipe.steps}: nothing is "
                          "left to do; raise schedule.steps, or take its weights alone with run.start")
    return Past(path, described)


def _at(path: Path, say: Callable[[str], object]) -> tuple[Path, dict[str, Any]]:
    """A checkpoint that was named; a run folder, or its ``checkpoints``, stands for its last whole one."""
    for folder in (path / "checkpoints", path):
        found = checkpoint.latest(folder, say, mine=False)
        if found is not None:
            return found
    return path, checkpoint.verify(path)


def steps_done(described: dict[str, Any], recipe: Recipe) -> int:
    """How far a checkpoint is in this recipe's steps: of a run that counts samples, the batches of now that the samples seen make."""
    counters = described["counters"]
    if recipe.schedule.samples is not None:
        return int(counters["samples"]) // recipe.data.batch_size
    return int(counters["step"])


def _changes(described: dict[str, Any], recipe: Recipe) -> list[str]:
    try:
        before = from_dict(described["recipe"])
    except ConfigError as error:
        return [f"its recipe is of another version of fastvlp, or of a file of its own: {error}"]
    return [line for line in differences(before, recipe) if not line.startswith(_SILENT)]


def _short(changes: list[str]) -> str:
    return ", ".join(changes[:4]) + (f" and {len(changes) - 4} more" if len(changes) > 4 else "")
