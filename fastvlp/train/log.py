"""What a run writes down: log.jsonl always, TensorBoard and Weights & Biases by name."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fastvlp.config import to_dict
from fastvlp.recipe import Recipe


class Writer(Protocol):
    """Takes one line of numbers; ``close`` flushes."""

    def write(self, step: int, values: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line; what is not finite is written as null.

    Lines of steps after ``start`` are dropped first: a resumed run writes them again.
    """

    def __init__(self, path: Path, start: int) -> None:
        # Steps that are trained again are written again: what a run wrote after its checkpoint is cut off.
        kept = [line for line in lines(path) if line["step"] <= start] if start else []
        temporary = path.with_suffix(".partial")
        try:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        # Flushed at every line: a killed run leaves all but the last one whole.
        self.file = path.open("a", buffering=1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Scalars for ``tensorboard --logdir runs``, which hides those of steps after ``start`` that were written before."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run on Weights & Biases of the run's name. One that goes on keeps its id, which lies in its folder; one that starts over gets
    another, since there no step is taken twice.
    """

    def __init__(self, folder: Path, recipe: Recipe, start: int) -> None:
        import wandb

        place = folder / "wandb" / "id"
        known = place.read_text(encoding="utf-8") if start and place.exists() else None
        self.run = wandb.init(project="fastvlp", name=recipe.run.name, id=known, resume="allow", dir=str(folder), config=to_dict(recipe))
        place.parent.mkdir(exist_ok=True)
        place.write_text(self.run.id, encoding="utf-8")

    def write(self, step: int, values: dict[str, Any]) -> None:
        self.run.log({name: value for name, value in values.items() if isinstance(value, int | float)}, step=step)

    def close(self) -> None:
        self.run.finish()


class Log:
    """All writers of a run as one; ``enabled=False`` (every rank but the first) writes nothing.

    Args:
        start: the step after which the run goes on; what was written of later ones is of another past.
    """

    def __init__(self, folder: Path, recipe: Recipe, start: int, enabled: bool) -> None:
        self.writers: list[Writer] = []
        if enabled:
            self.writers.append(JsonLines(folder / "log.jsonl", start))
            self.writers += [TensorBoard(folder, start) if name == "tensorboard" else WandB(folder, recipe, start)
                             for name in recipe.run.log]

    def write(self, step: int, **values: Any) -> None:
        """One line about the state after ``step`` steps."""
        for writer in self.writers:
            writer.write(step, values)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; the last one may have been cut by a kill and is then left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity, where it was written."""
    found = [(record["step"], record[name]) for record in records if isinstance(record.get(name), int | float)]
    return [step for step, _ in found], [value for _, value in found]
