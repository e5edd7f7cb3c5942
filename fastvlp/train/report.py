"""What a run leaves behind: scores, pictures, the exported model, results.json."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastvlp import __version__, evaluate
from fastvlp.config import Config
from fastvlp.models import TwoTower
from fastvlp.train import plots
from fastvlp.train.log import Log
from fastvlp.train.progress import Progress, clock
from fastvlp.train.trainer import Trainer

RESULTS = "results.json"
QUERIES, COLUMNS = 8, 6


def measure(config: Config, model: TwoTower) -> dict[str, dict[str, float]]:
    """The scores that ``config.eval`` asks for, by measure: "zero_shot" (top1, top5, n) and "retrieval" (i2t_r1 ... t2i_r10, n)."""
    scores: dict[str, dict[str, float]] = {}
    was_training = model.training
    model.eval()
    if config.eval.zero_shot:
        classes = evaluate.load_classes(config.eval.classes or "")
        scores["zero_shot"] = evaluate.zero_shot(model, config.eval.zero_shot, classes, config.eval.templates, config.eval.batch_size)
    if config.eval.retrieval:
        scores["retrieval"] = evaluate.retrieval(model, config.eval.retrieval, config.eval.batch_size)
    model.train(was_training)
    return scores


def log_scores(config: Config, model: TwoTower, step: int, log: Log, progress: Progress) -> dict[str, dict[str, float]]:
    """Measure, log and show the scores after ``step`` steps."""
    scores = measure(config, model)
    if not scores:
        return scores
    log.write(step, **{f"{measure}_{name}": value for measure, values in scores.items() for name, value in values.items()
                        if name not in ("n", "skipped")})
    for line in table(scores):
        progress.say(line)
    return scores


def table(scores: dict[str, dict[str, float]]) -> list[str]:
    """Scores as a few lines of text."""
    lines = []
    if "zero_shot" in scores:
        s = scores["zero_shot"]
        lines.append(f"zero-shot ({s['n']} pictures)        top-1 {s['top1']:6.2%}   top-5 {s['top5']:6.2%}")
    if "retrieval" in scores:
        s = scores["retrieval"]
        for way, title in (("i2t", "image to text"), ("t2i", "text to image")):
            lines.append(f"{title} ({s['n']} pairs)     " + "   ".join(f"R@{k} {s[f'{way}_r{k}']:6.2%}" for k in (1, 5, 10)))
    return lines


def exists(folder: Path) -> bool:
    """Whether the run in this folder has been finished."""
    return (folder / RESULTS).is_file()


def show(folder: Path, say: Callable[[str], object]) -> dict[str, Any]:
    """Print and return the results of a finished run."""
    results: dict[str, Any] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    _print(folder, results, say)
    return results


def finish(config: Config, trainer: Trainer, folder: Path, log: Log, progress: Progress, *, skipped: dict[str, int],
           startup_seconds: float) -> dict[str, Any]:
    """Score and export the trained model, draw its pictures and write results.json."""
    counters = trainer.counters
    trainer.export(folder / "model")
    with trainer.evaluation_weights():
        began = time.perf_counter()
        scores = log_scores(config, trainer.model, counters.step, log, Progress(0, 0, enabled=False))
        evaluation_seconds, began = time.perf_counter() - began, time.perf_counter()
        if plots.available():
            plots.curves(folder / "log.jsonl", folder / "curves.png")
            if config.eval.retrieval:
                _sheet(config, trainer.model, folder / "retrieval.png")
        else:
            progress.say("no curves and no sheet of retrievals: matplotlib is not installed (pip install 'fastvlp[train]')")
    seconds = counters.seconds
    results = {
        "name": config.run.name, "steps": counters.step, "samples": counters.samples, "seed": config.run.seed,
        "train_seconds": seconds, "startup_seconds": startup_seconds, "evaluation_seconds": evaluation_seconds,
        "plot_seconds": time.perf_counter() - began, "images_per_second": counters.samples / seconds if seconds else None,
        "tokens_per_second": (counters.image_tokens + counters.text_tokens) / seconds if seconds else None,
        **scores, "nonfinite_steps": counters.nonfinite, "skipped_samples": skipped, "processes": trainer.world.size,
        "device": str(trainer.world.device), "threads": torch.get_num_threads(), "torch": torch.__version__, "fastvlp": __version__,
    }
    temporary = folder / f".{RESULTS}.partial"
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.rename(folder / RESULTS)
    _print(folder, results, progress.say)
    return results


def _print(folder: Path, results: dict[str, Any], say: Callable[[str], object]) -> None:
    for line in table(results):
        say(line)
    say(f"trained {results['steps']} steps in {clock(results['train_seconds'])}" + (
        f", {results['images_per_second']:.0f} images/s" if results["images_per_second"] else "") + f"; everything is in {folder}")
    for reason, count in results["skipped_samples"].items():
        say(f"skipped {count} samples: {reason} (named in {folder / 'log.jsonl'})")


def _sheet(config: Config, model: TwoTower, target: Path) -> None:
    """For some captions spread over the retrieval set: the pictures nearest to each."""
    model.eval()
    features = evaluate.features(model, config.eval.retrieval, config.eval.batch_size)
    chosen = torch.linspace(0, len(features.captions) - 1, min(QUERIES, len(features.captions))).long().unique()
    best = (features.texts[chosen] @ features.images.T).topk(min(COLUMNS, len(features.images))).indices
    hits = [row.index(own) if own in row else None for row, own in zip(best.tolist(), features.owner[chosen].tolist(), strict=True)]
    pictures = features.pictures(sorted(set(best.flatten().tolist())))
    queries, ranked = [features.captions[i] for i in chosen.tolist()], [[pictures[i] for i in row] for row in best.tolist()]
    plots.retrieval_sheet(queries, ranked, hits, target)
