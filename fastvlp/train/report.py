"""What a run leaves behind: scores, pictures, the exported model, results.json."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from fastvlp import __version__, evaluate
from fastvlp.data.shards import Shards
from fastvlp.recipe import Eval, Recipe
from fastvlp.systems import files
from fastvlp.systems.system import System
from fastvlp.train import plots
from fastvlp.train.log import Log
from fastvlp.train.progress import Progress, clock
from fastvlp.train.step import Trainer

RESULTS = "results.json"
QUERIES, COLUMNS = 8, 6
Scores = dict[str, dict[str, float]]


def shards(config: Eval) -> list[Shards]:
    """Everything that evaluation reads."""
    return [config.zero_shot, config.retrieval, config.captions, config.pairs, config.knn, config.probe, config.probe_train]


def score(recipe: Recipe, trainer: Trainer, step: int, log: Log, progress: Progress, beat: Callable[[], object] = lambda: None) -> Scores:
    """Measure (all processes together), log and show the scores after ``step`` steps, with the averaged weights where there are any."""
    system = trainer.system
    training = system.training
    system.eval()
    with trainer.evaluation_weights():
        scores = evaluate.measure(system, recipe.eval, trainer.world, beat, recipe.run.timeout)
    system.train(training)
    if scores:
        log.write(step, **{f"{measure}_{name}": value for measure, values in scores.items() for name, value in values.items()
                           if name not in ("n", "skipped")})
        for line in evaluate.table(scores):
            progress.say(line)
    return scores


def episode(recipe: Recipe, trainer: Trainer, beat: Callable[[], object] = lambda: None) -> None:
    """Give the system what ``encode`` makes of the whole training set, in its order, without augmentation."""
    system = trainer.system
    training = system.training
    system.eval()
    features = evaluate.encode_all(system, recipe.data.sources[0].shards, recipe.eval.batch_size, trainer.world, beat,
                                   workers=recipe.data.workers, timeout=recipe.run.timeout)
    system.train(training)
    with torch.no_grad():
        system.before_episode(features)


def exists(folder: Path) -> bool:
    """Whether the run in this folder has been finished."""
    return (folder / RESULTS).is_file()


def show(folder: Path, say: Callable[[str], object]) -> dict[str, Any]:
    """Print and return the results of a finished run."""
    results: dict[str, Any] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    _print(folder, results, say)
    return results


def set_run_aside(folder: Path, but: Sequence[str] = (".lock",)) -> Path:
    """Move what a run left into a folder beside it, ``but`` some; its lock stays, held by who asks."""
    target = next(place for i in range(1, 10_000) if not (place := folder.with_name(f"{folder.name}.before-{i}")).exists())
    target.mkdir()
    for path in folder.iterdir():
        if path.name not in but:
            path.rename(target / path.name)
    return target


def finish(recipe: Recipe, trainer: Trainer, folder: Path, log: Log, progress: Progress, *, skipped: dict[str, int],
           startup_seconds: float, beat: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Score and export the trained system, draw its pictures and write results.json; ``beat`` is called at every batch."""
    counters, world, system = trainer.counters, trainer.world, trainer.system
    began = time.perf_counter()
    with trainer.evaluation_weights():
        # Gathered by all processes, also where only the first one writes.
        state = get_model_state_dict(system, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if world.rank == 0:
            files.save(folder / "model", system, recipe, state)  # type: ignore[arg-type]  # torch types any value
        del state
    scores = score(recipe, trainer, counters.step, log, Progress(0, 0, enabled=False), beat)
    evaluation_seconds, began = time.perf_counter() - began, time.perf_counter()
    summary = {"steps": counters.step, "samples": counters.samples, "train_seconds": counters.seconds}
    if world.rank > 0:
        return summary
    if plots.available():
        plots.curves(folder / "log.jsonl", folder / "curves.png")
        # The sheet reads pictures again, one process's work that the others would have to wait for.
        if recipe.eval.retrieval and world.size == 1 and evaluate.embeds_both(system):
            with trainer.evaluation_weights():
                _sheet(recipe, system, folder / "retrieval.png")
    else:
        progress.say("no curves and no sheet of retrievals: matplotlib is not installed (pip install 'fastvlp[train]')")
    seconds = counters.seconds
    results = {
        "name": recipe.run.name, "system": type(system).__name__.removeprefix("FSDP"), **summary, "seed": recipe.run.seed,
        "startup_seconds": startup_seconds, "evaluation_seconds": evaluation_seconds, "plot_seconds": time.perf_counter() - began,
        "images_per_second": counters.samples / seconds if seconds else None,
        "tokens_per_second": sum(counters.tokens.values()) / seconds if seconds else None, "tokens": counters.tokens,
        **scores, "nonfinite_steps": counters.nonfinite, "skipped_samples": skipped, "processes": world.size,
        "device": str(world.device), "threads": torch.get_num_threads(), "torch": torch.__version__, "fastvlp": __version__,
    }
    # results.json says that a run is finished, so that it appears whole or not at all.
    temporary = folder / f".{RESULTS}.partial"
    try:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        temporary.rename(folder / RESULTS)
    finally:
        temporary.unlink(missing_ok=True)
    _print(folder, results, progress.say)
    return results


def _print(folder: Path, results: dict[str, Any], say: Callable[[str], object]) -> None:
    for line in evaluate.table(results):
        say(line)
    say(f"trained {results['steps']} steps in {clock(results['train_seconds'])}" + (
        f", {results['images_per_second']:.0f} samples/s" if results["images_per_second"] else "") + f"; everything is in {folder}")
    for reason, count in results["skipped_samples"].items():
        say(f"skipped {count} samples: {reason} (named in {folder / 'log.jsonl'})")


def _sheet(recipe: Recipe, system: System, target: Path) -> None:
    """For some captions spread over the retrieval set: the pictures nearest to each."""
    system.eval()
    features = evaluate.features(system, recipe.eval.retrieval, recipe.eval.batch_size)
    chosen = torch.linspace(0, len(features.captions) - 1, min(QUERIES, len(features.captions))).long().unique()
    best = (features.texts[chosen] @ features.images.T).topk(min(COLUMNS, len(features.images))).indices
    hits = [row.index(own) if own in row else None for row, own in zip(best.tolist(), features.owner[chosen].tolist(), strict=True)]
    pictures = features.pictures(sorted(set(best.flatten().tolist())))
    queries, ranked = [features.captions[i] for i in chosen.tolist()], [[pictures[i] for i in row] for row in best.tolist()]
    plots.retrieval_sheet(queries, ranked, hits, target)
