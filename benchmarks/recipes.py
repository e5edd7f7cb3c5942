"""What a paper's idea is worth on the shipped data: a recipe and its baseline, arm beside arm, three seeds, at equal time or equal samples.

    python -m benchmarks recipes                      every row that is not measured yet
    python -m benchmarks recipes siglip --minutes 1   one row, with arms of a minute
    python -m benchmarks recipes --alone              each recipe by itself (benchmarks/alone.py)

Both arms of a row train at once with a core each, which they swap at the next seed. Items of the test sets are paired: the interval is a
bootstrap over them, of the mean over seeds. Each pair of arms is kept as soon as it ends, so that a stopped table goes on.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import alone
from benchmarks.machine import describe, environment, load
from benchmarks.run import write_text

PAIRS, EMOJI = "mini:val-openclipart", "mini:val-emoji"
COLUMNS = ("id", "row", "claim", "measure", "equal", "ours", "baseline", "difference", "low", "high", "shown", "ours_seconds",
           "baseline_seconds", "ours_samples_per_second", "baseline_samples_per_second", "seeds", "load_before", "command")  # fmt: skip
CALIBRATION = 12  # steps from which the length of an arm of equal time is told


@dataclass(frozen=True)
class Arm:
    """A training: a recipe and changes of it."""

    recipe: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One idea. id: of the paper in the list of systems. equal: "time" or "samples". measure: a key of ``MEASURES``."""

    id: int
    claim: str
    ours: Arm
    baseline: Arm
    equal: str = "time"
    measure: str = "mrr"


SMALL = ("data.batch_size=32", "schedule.warmup=120")
ROWS = {
    "flip": Row(8, "dropping half of the patches trains better in the same time", Arm("clip"),
                Arm("clip", ("schedule.stages.0.keep=1.0",))),
    "filip": Row(36, "token-wise late interaction is more accurate than one feature", Arm("filip"), Arm("clip"), "samples"),
    "slip": Row(37, "self-supervision beside the contrast is more accurate", Arm("slip"), Arm("clip"), "samples"),
    "siglip": Row(109, "at small batches the sigmoid loss is better than the softmax", Arm("siglip", SMALL), Arm("clip", SMALL), "samples"),
    "jina_clip": Row(138, "features cut to 32 of 256 numbers stay useful when every prefix was trained", Arm("jina_clip"), Arm("clip"),
                     "samples", "mrr32"),
    "brivl": Row(192, "a queue of negatives helps a small batch", Arm("brivl", SMALL), Arm("clip", SMALL), "samples"),
    "simvlm": Row(95, "one prefix-LM objective learns captions faster than contrast and captions together", Arm("simvlm"), Arm("coca"),
                  "time", "nats"),
}  # fmt: skip


@torch.no_grad()
def reciprocal_ranks(system: Any, width: int | None = None) -> np.ndarray:
    """1 / rank of the right answer: clip art's pictures and captions both ways, emoji among their names; of the first ``width`` numbers."""
    from fastvlp import evaluate
    from fastvlp.evaluate.features import ranks
    from fastvlp.evaluate.reading import How
    from fastvlp.evaluate.zero_shot import class_features

    def cut(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x[:, :width], dim=-1)

    pairs, emoji = evaluate.features(system, PAIRS), evaluate.features(system, EMOJI, texts=False)
    names = evaluate.load_classes("mini:emoji")
    images, texts, own = cut(pairs.images), cut(pairs.texts), torch.arange(len(pairs.images))
    places = {name: place for place, name in enumerate(names)}
    targets = torch.tensor([places[name] for name in emoji.classes if name is not None])
    classes, numbers = cut(class_features(system, names, ("{}",), How())), torch.arange(len(names))
    found = [ranks(images, texts, own, pairs.owner, 256), ranks(texts, images, pairs.owner, own, 256),
             ranks(cut(emoji.images), classes, targets, numbers, 256)]
    return np.asarray(1 / (1 + torch.cat(found).double()))


@torch.no_grad()
def nats(system: Any) -> np.ndarray:
    """Minus the negative log-likelihood a word of each clip-art caption: larger is better."""
    from fastvlp.data.samples import samples

    found = []
    everything = list(samples(PAIRS))
    for first in range(0, len(everything), 64):
        part = everything[first:first + 64]
        texts = system.prepared("text", [sample.labels.captions[0] for sample in part])
        nll = system.caption_nll(system.prepared("image", [sample.image for sample in part]), texts)
        found.append(-nll.double().cpu() / (texts.lengths - 1))
    return np.asarray(torch.cat(found))


MEASURES = {"mrr": ("mean reciprocal rank", reciprocal_ranks), "mrr32": ("the same of 32 features", lambda s: reciprocal_ranks(s, 32)),
            "nats": ("log-likelihood a word", nats)}  # fmt: skip


def interval(ours: np.ndarray, baseline: np.ndarray, draws: int = 4000) -> tuple[float, float, float]:
    """The mean difference and its 95 % interval; [seeds, items] each, items resampled together for all seeds."""
    difference = (ours - baseline).mean(0)
    rng = np.random.default_rng(0)
    means = np.array([difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(draws)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def train_pair(row: Row, seed: int, minutes: float, folder: Path) -> list[Path]:
    """Train both arms at once; the folders of their runs.

    Raises:
        RuntimeError: one of them failed.
    """
    steps = [0, 0]
    if row.equal == "time":
        told = _together(row, seed, [CALIBRATION] * 2, folder / "calibration")
        steps = [max(20, int(minutes * 60 * CALIBRATION / _seconds(path))) for path in told]
    else:
        told = _together(row, seed, [CALIBRATION] * 2, folder / "calibration")
        steps = [max(20, int(minutes * 60 * CALIBRATION / max(map(_seconds, told))))] * 2
    return _together(row, seed, steps, folder / "run")


def _seconds(run: Path) -> float:
    return float(json.loads((run / "results.json").read_text(encoding="utf-8"))["train_seconds"])


def _together(row: Row, seed: int, steps: Sequence[int], folder: Path) -> list[Path]:
    cores = sorted(os.sched_getaffinity(0))[:2]
    cores = cores if seed % 2 == 0 else cores[::-1]
    started = []
    for name, arm, length, core in zip(("ours", "baseline"), (row.ours, row.baseline), steps, cores, strict=False):
        changes = [*arm.changes, "eval={}", f"schedule.steps={length}", f"schedule.warmup={max(1, length // 14)}", f"run.seed={seed}",
                   f"run.dir={folder}", f"run.name={name}", "train.checkpoint_every=0", "data.workers=0", "run.device=cpu"]
        command = ["taskset", "-c", str(core), sys.executable, "-m", "fastvlp", "train", arm.recipe, *changes]
        output = (folder / f"{name}.txt")
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w") as file:
            process = subprocess.Popen(command, env=environment() | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file)
        started.append((name, output, process))
    for name, output, process in started:
        if process.wait():
            raise RuntimeError(f"the arm {name} ended with exit code {process.returncode}: {output.read_text(encoding='utf-8')[-800:]}")
    return [folder / name for name, _, _ in started]


def measure_row(name: str, seeds: Sequence[int], minutes: float, folder: Path) -> dict[str, Any]:
    """Measure one row, keeping each seed's arms in ``folder``."""
    import fastvlp

    row, about = ROWS[name], []
    found: dict[str, list[list[float]]] = {"ours": [], "baseline": []}
    before = load()
    for seed in seeds:
        kept = folder / f"{name}-{seed}.json"
        if not kept.exists():
            with tempfile.TemporaryDirectory() as scratch:
                runs = train_pair(row, seed, minutes, Path(scratch))
                values = [MEASURES[row.measure][1](fastvlp.load(run)).tolist() for run in runs]
                results = [json.loads((run / "results.json").read_text(encoding="utf-8")) for run in runs]
            speed = [{key: result[key] for key in ("train_seconds", "images_per_second", "steps")} for result in results]
            write_text(kept, json.dumps({"items": values, "speed": speed}) + "\n")
        content = json.loads(kept.read_text(encoding="utf-8"))
        for side, items in zip(found, content["items"], strict=True):
            found[side].append(items)
        about.append(content["speed"])
        print(f"{name}, seed {seed}: ours {np.mean(content['items'][0]):.4f}, baseline {np.mean(content['items'][1]):.4f}", flush=True)
    ours, baseline = (np.array(found[side]) for side in found)
    difference, low, high = interval(ours, baseline)
    speeds = {f"{side}_{key}": float(np.mean([one[place][source] for one in about])) for place, side in enumerate(found)
              for key, source in (("seconds", "train_seconds"), ("samples_per_second", "images_per_second"))}
    return {"id": row.id, "row": name, "claim": row.claim, "measure": MEASURES[row.measure][0], "equal": row.equal,
            "ours": float(ours.mean()), "baseline": float(baseline.mean()), "difference": difference, "low": low, "high": high,
            "shown": "yes" if low > 0 else "no: worse" if high < 0 else "not shown", "seeds": len(seeds), "load_before": before,
            "command": f"python -m benchmarks recipes {name} --minutes {minutes:g}", **speeds}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks recipes``."""
    parser.add_argument("names", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; with --alone: systems (default: all that are not "
                        "measured)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=1.0, help="of an arm's training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--alone", action="store_true", help="the recipe of each system by itself, for fastvlp recipes")
    parser.add_argument("--measured", type=Path, default=alone.TARGET, metavar="FILE", help="with --alone: where it is written "
                        "(default: %(default)s)")  # fmt: skip


def run(arguments: argparse.Namespace, out: Path) -> int:
    """Measure rows and write <out>/<device>/recipes.csv, or with ``--alone`` systems; 0, or 2 for a name that is none."""
    if arguments.alone:
        return alone.run(arguments.names, arguments.minutes, arguments.seeds, arguments.measured)
    unknown = [name for name in arguments.names if name not in ROWS]
    if unknown:
        print(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}", file=sys.stderr)
        return 2
    machine = describe(torch.device("cpu"))
    folder = out / str(machine["device"])
    path = folder / "recipes.json"
    rows = {row["row"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]} if path.exists() else {}
    for name in arguments.names or [name for name in ROWS if name not in rows]:
        rows[name] = measure_row(name, arguments.seeds, arguments.minutes, folder / "recipes")
        known = [rows[name] for name in ROWS if name in rows]
        write_text(path, json.dumps({"op": "recipes", "machine": machine, "rows": known}, indent=1) + "\n")
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS)
        writer.writeheader()
        writer.writerows(known)
        write_text(path.with_suffix(".csv"), table.getvalue())
    return 0
